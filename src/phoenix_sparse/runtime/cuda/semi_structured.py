"""2:4 matrices on the GPU through cuSPARSELt, as torch brings it: recognising one, its compressed form, the product.

NVIDIA's tensor cores skip half of a matrix of which every four neighbours in a row keep at most two. With many rows of
x that is faster than a dense product; with few it is slower, and slower than Phoenix's own kernels.
"""

from fractions import Fraction
from functools import cache
from typing import Any

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError, first_line
from phoenix_sparse.runtime.cuda.compiling import OLDEST
from phoenix_sparse.runtime.cuda.operands import FLOATS

KEPT, GROUP = 2, 4
SIZES = 16
"""What rows and columns of W must be a multiple of, in 2-byte floats (torch's table for cuSPARSELt)."""
ROWS = 8
"""What rows of x must be a multiple of, in 2-byte floats; others are padded."""
COMPRESSED = Fraction(9, 16)
"""Of the dense size: half the values, and two bits a value for its place among four."""
TOLERANCE = 1e-2  # of a product's relative error when cuSPARSELt is tried; rounding to bfloat16 gives 2e-3

Algorithm = tuple[int, int, int]
"""cuSPARSELt's number of a kernel, into how many parts the sum is split, and how."""
FIRST: Algorithm = (0, 1, -1)
"""What torch takes where nothing is searched for."""


def is_two_four(weight: Tensor) -> bool:
    """Whether every four neighbours of a row keep at most two values: (out, in) with `in` a multiple of four."""
    if weight.dim() != 2 or weight.shape[1] % GROUP:
        return False
    return bool(((weight.reshape(-1, GROUP) != 0).sum(1, dtype=torch.int8) <= KEPT).all())


def fits(shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether cuSPARSELt takes a matrix (out, in) of a dtype."""
    return dtype in FLOATS and all(size > 0 and size % SIZES == 0 for size in shape)


def why_not(device: torch.device) -> str | None:
    """Why cuSPARSELt can't be had on a device, or None."""
    if device.type != "cuda":
        return f"cuSPARSELt is for GPUs, and this is {device}"
    if torch.version.cuda is None or not torch.backends.cusparselt.is_available():
        return f"torch {torch.__version__} comes without cuSPARSELt"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        have, need = (".".join(map(str, pair)) for pair in (capability, OLDEST))
        return f"this GPU has compute capability {have}, and 2:4 products need {need}"
    return None


def compress(weight: Tensor) -> Tensor:
    """cuSPARSELt's form of a 2:4 matrix.

    Args:
        weight: (out, in) for which `is_two_four` and `fits`, on a GPU; any other would lose values unnoticed.

    Returns:
        (out, about 9/16 of in) in its dtype: values and places, as only cuSPARSELt reads them.
    """
    compressed: Tensor = torch._cslt_compress(weight.contiguous())
    return compressed


def padded(x: Tensor) -> Tensor:
    """x (rows, in) as cuSPARSELt reads it: rows in eights, zeros below them, one after another, at an even address."""
    missing = -len(x) % ROWS
    x = torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


@torch.library.custom_op("phoenix_sparse::semi_structured_linear", mutates_args=())
def semi_structured_linear(
    x: Tensor, compressed: Tensor, out: int, bias: Tensor | None, algorithm: list[int]
) -> Tensor:
    """`multiply` for torch, which need not look into it: addresses are asked for there."""
    del out  # what a trace needs to know, as the compressed form has no shape of its own in older torch
    number, parts, mode = algorithm
    split: dict[str, Any] = {} if parts == 1 else {"split_k": parts, "split_k_mode": mode}  # older torch has no such
    y: Tensor = torch._cslt_sparse_mm(
        compressed, padded(x).t(), bias=bias, transpose_result=True, alg_id=number, **split
    )
    return y[: len(x)]


@semi_structured_linear.register_fake
def _(x: Tensor, compressed: Tensor, out: int, *rest: Any) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], out)


def multiply(
    x: Tensor, compressed: Tensor, out: int, bias: Tensor | None = None, algorithm: Algorithm = FIRST
) -> Tensor:
    """x (rows, in) · Wᵀ + bias, summed in float32.

    cuSPARSELt computes W · xᵀ, the sparse matrix to the left, and writes the result transposed: nothing is copied.

    Args:
        x: in W's dtype.
        compressed: W (out, in), see `compress`.
        out: W's rows.
        bias: (out,) in x's dtype, or None.
        algorithm: how, as `search` finds it.

    Returns:
        (rows, out) in x's dtype.
    """
    y: Tensor = semi_structured_linear(x, compressed, out, bias, list(algorithm))
    return y


def search(x: Tensor, compressed: Tensor) -> Algorithm:
    """The fastest algorithm for x's number of rows, by trying all: that takes up to seconds, and waits for the GPU."""
    library: Any = torch._C._cusparselt
    found = library.mm_search(compressed, padded(x).t(), None, None, None, True)
    number, parts, mode = (int(part) for part in found[:3])
    return number, parts, mode


@cache
def prove(device: torch.device, dtype: torch.dtype) -> None:
    """Compare cuSPARSELt with float64 on this GPU, once.

    Raises:
        PhoenixError: it fails, or gives other results.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 160, generator=generator)
    places = torch.rand(96, 160 // GROUP, GROUP, generator=generator).argsort(-1).argsort(-1)
    weight = torch.where((places < KEPT).view(weight.shape), weight, 0.0).to(dtype)
    bias = torch.randn(96, generator=generator).to(dtype)
    for rows in (64, 83):
        x = torch.randn(rows, 160, generator=generator).to(dtype)
        exact = x.double() @ weight.double().t() + bias.double()
        try:
            y = multiply(x.to(device), compress(weight.to(device)), len(weight), bias.to(device)).cpu().double()
        except RuntimeError as error:
            raise PhoenixError(
                f"prefill: cuSPARSELt fails on this GPU ({first_line(error)}); give prefill=dense or packed"
            ) from error
        if not bool((y - exact).norm() <= TOLERANCE * exact.norm()):
            raise PhoenixError(
                "prefill: cuSPARSELt gives wrong products on this GPU; give prefill=dense or packed, and report it"
            )
