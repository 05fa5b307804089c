"""2:4 matrices on the GPU through cuSPARSELt: recognising one, its compressed form, the product and how it is computed.

NVIDIA's tensor cores skip half of a matrix of which every four neighbours in a row keep at most two. With many rows of
x that is faster than a dense product, if the algorithm is searched for; with few it is slower, and slower than
Phoenix's own kernels. On an H200 the library's first algorithm takes as long as cuBLAS, or longer, with any number of
rows.
"""

from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError, first_line
from phoenix_sparse.runtime.cuda import cusparselt, cusparselt_product
from phoenix_sparse.runtime.cuda.compiling import OLDEST
from phoenix_sparse.runtime.cuda.cusparselt_product import Algorithm

KEPT, GROUP = 2, 4
DTYPE = torch.bfloat16
"""That cuSPARSELt is used with. In float16 its search (0.8.0, an H200) runs an illegal instruction, after which the
process can't use the GPU any more."""
SIZES = 16
"""What rows and columns of W must be a multiple of, in 2-byte floats: 32 bytes."""
ROWS, STEPS = 8, 32
"""What rows of x must be a multiple of, in 2-byte floats: 16 bytes; others are padded. Many rows are padded to steps of
which 32 to 64 make up their number, so that prompts of all lengths have few plans: at most 3% more rows."""
SEARCHED = 2048
"""Rows of x that the algorithm is searched for. On an H200 it is the fastest from 512 rows on, or within 5% of that; a
search for fewer rows finds others, which still lose to cuBLAS below 256."""
COMPRESSED = Fraction(9, 16)
"""Of the dense size: half the values, and two bits a value for its place among four."""
TOLERANCE = 1e-2  # of a product's relative error when cuSPARSELt is tried; rounding to bfloat16 gives 2e-3

_found: dict[tuple[torch.device, torch.dtype, tuple[int, int], bool], Algorithm] = {}
"""By GPU, dtype, W's shape, and whether there is a bias: what the search has found, for any number of rows."""


def is_two_four(weight: Tensor) -> bool:
    """Whether every four neighbours of a row keep at most two values: (out, in) with `in` a multiple of four."""
    if weight.dim() != 2 or weight.shape[1] % GROUP:
        return False
    return bool(((weight.reshape(-1, GROUP) != 0).sum(1, dtype=torch.int8) <= KEPT).all())


def fits(shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether matrices (out, in) of a dtype are for cuSPARSELt; `takes` asks it."""
    return dtype == DTYPE and all(size > 0 and size % SIZES == 0 for size in shape)


@cache
def takes(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether cuSPARSELt has a kernel for a matrix (out, in) that `fits`, on this GPU, for many rows of x and few."""
    return all(cusparselt_product.takes(device, dtype, shape, rows) for rows in (ROWS, SEARCHED))


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
    try:
        cusparselt.library()
    except PhoenixError as error:
        return str(error).removeprefix("prefill: ")
    return None


def compress(weight: Tensor) -> Tensor:
    """cuSPARSELt's form of a 2:4 matrix.

    Args:
        weight: (out, in) for which `is_two_four` and `fits`, on a GPU; any other would lose values unnoticed.

    Returns:
        (about 9/16 of out · in,) in its dtype: values and places, as only cuSPARSELt reads them; algorithms share it.

    Raises:
        PhoenixError: cuSPARSELt fails.
    """
    return cusparselt.compress(weight.contiguous())


def padded_rows(rows: int) -> int:
    """Of how many rows the product with so many rows of x is."""
    step = max(ROWS, (1 << rows.bit_length()) // (2 * STEPS))
    return -(-rows // step) * step


def padded(x: Tensor) -> Tensor:
    """x (rows, in) as cuSPARSELt reads it: zeros below it where rows are missing, row by row, at an even address."""
    missing = padded_rows(len(x)) - len(x)
    x = torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


# By a library of one's own and not by torch.library.custom_op, whose wrappers take the host 17 µs a call instead of 5.
_OPERATORS = torch.library.Library("phoenix_sparse", "FRAGMENT")
_OPERATORS.define(
    "semi_structured_linear(Tensor x, Tensor compressed, SymInt out, Tensor? bias, int[]? algorithm) -> Tensor"
)


def _semi_structured_linear(
    x: Tensor, compressed: Tensor, out: int, bias: Tensor | None, algorithm: list[int] | None
) -> Tensor:
    """`multiply` for torch, which need not look into it: addresses are asked for there."""
    if x.dtype != compressed.dtype or not (bias is None or (bias.dtype == x.dtype and bias.is_contiguous())):
        raise PhoenixError(
            f"prefill: x is {x.dtype} and the 2:4 weight {compressed.dtype}; give x in the weight's dtype"
        )
    if algorithm is None:
        way = _found.get((x.device, x.dtype, (out, x.shape[1]), bias is not None))
    else:
        way = (algorithm[0], algorithm[1], algorithm[2])
    y = cusparselt_product.multiply(padded(x), compressed, out, bias, way)
    return y if len(y) == len(x) else y[: len(x)]


_OPERATORS.impl("semi_structured_linear", _semi_structured_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("phoenix_sparse::semi_structured_linear", lib=_OPERATORS)
def _(x: Tensor, compressed: Tensor, out: int, *rest: object) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], out)


def multiply(
    x: Tensor, compressed: Tensor, out: int, bias: Tensor | None = None, algorithm: Algorithm | None = None
) -> Tensor:
    """x (rows, in) · Wᵀ + bias, summed in float32.

    Args:
        x: in W's dtype.
        compressed: W (out, in), see `compress`.
        out: W's rows.
        bias: (out,) in x's dtype, or None. It is best one that stays where it is: plans hold its address.
        algorithm: how to compute it; None for the one that `settle` has found for this shape, and for cuSPARSELt's own
            choice where there is none, or where it doesn't serve so many rows.

    Returns:
        (rows, out) in x's dtype.

    Raises:
        PhoenixError: cuSPARSELt fails.
    """
    chosen = None if algorithm is None else list(algorithm)
    y: Tensor = torch.ops.phoenix_sparse.semi_structured_linear.default(x, compressed, out, bias, chosen)
    if y.requires_grad and not torch.compiler.is_compiling():
        y.register_hook(_no_gradient)  # torch only warns, and gives none
    return y


def _no_gradient(_: Tensor) -> None:
    raise PhoenixError("prefill: 2:4 products have no gradients; train the dense model")


def search(x: Tensor, compressed: Tensor, out: int, bias: Tensor | None = None) -> Algorithm:
    """The fastest algorithm for x's number of rows, by trying all: that takes up to a second, and waits for the GPU.

    Arguments and errors are `multiply`'s.
    """
    return cusparselt_product.search(padded(x), compressed, out, bias)


def settle(weight: Tensor, compressed: Tensor, bias: Tensor | None) -> Algorithm:
    """Find the algorithm for products with a matrix of this shape, and try it; once for each GPU, dtype and shape.

    Args:
        weight: W (out, in), on a GPU.
        compressed: W too, see `compress`.
        bias: (out,) in W's dtype, or None.

    Returns:
        What `multiply` then uses for this shape, with a bias or without.

    Raises:
        PhoenixError: cuSPARSELt fails, or gives other products than cuBLAS.
    """
    out, columns = weight.shape
    key = (weight.device, weight.dtype, (out, columns), bias is not None)
    if key in _found:
        return _found[key]
    generator = torch.Generator(weight.device).manual_seed(0)  # one of its own: loading a model draws no numbers
    x = torch.randn(SEARCHED, columns, dtype=weight.dtype, device=weight.device, generator=generator)
    algorithm = search(x, compressed, out, bias)
    for rows in (SEARCHED, 9 * ROWS):
        some = slice(rows - 8 * ROWS, rows)
        y = multiply(x[:rows], compressed, out, bias, algorithm)[some]
        exact = torch.nn.functional.linear(x[some], weight, bias).float()
        if not bool((y.float() - exact).norm() <= TOLERANCE * exact.norm()):
            raise PhoenixError(
                f"prefill: cuSPARSELt gives wrong products with a weight of {out}x{columns} on this GPU; give "
                "prefill=dense or packed, and report it"
            )
    _found[key] = algorithm
    return algorithm


@cache
def prove(device: torch.device, dtype: torch.dtype) -> None:
    """Compare cuSPARSELt with float64 on this GPU, once: its own choice of an algorithm, and the one of a search.

    Raises:
        PhoenixError: it fails, or gives other results.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 160, generator=generator)
    places = torch.rand(96, 160 // GROUP, GROUP, generator=generator).argsort(-1).argsort(-1)
    weight = torch.where((places < KEPT).view(weight.shape), weight, 0.0).to(dtype)
    bias = torch.randn(96, generator=generator).to(dtype)
    placed, offset = weight.to(device), bias.to(device)
    for rows in (64, 83):
        x = torch.randn(rows, 160, generator=generator).to(dtype)
        exact = x.double() @ weight.double().t() + bias.double()
        try:
            compressed, there = compress(placed), x.to(device)
            found = search(there, compressed, len(weight), offset)
            products = [multiply(there, compressed, len(weight), offset, way).cpu() for way in (None, found)]
        except RuntimeError as error:
            raise PhoenixError(
                f"prefill: cuSPARSELt fails on this GPU ({first_line(error)}); give prefill=dense or packed"
            ) from error
        if not all(bool((y.double() - exact).norm() <= TOLERANCE * exact.norm()) for y in products):
            raise PhoenixError(
                "prefill: cuSPARSELt gives wrong products on this GPU; give prefill=dense or packed, and report it"
            )
