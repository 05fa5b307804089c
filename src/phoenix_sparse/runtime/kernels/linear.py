"""y = x Wᵀ + b with a packed W, by the fastest way there is."""

import threading
from typing import Any

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.kernels import portable
from phoenix_sparse.runtime.kernels.checking import wrong_form
from phoenix_sparse.runtime.kernels.choice import FEWEST, dense_is_faster
from phoenix_sparse.runtime.kernels.library import CODES, Library, library

FLOATS = (torch.float32, torch.bfloat16)
PANEL = 2**24  # bytes of weights that are unpacked at a time

_kept = threading.local()


def sparse_linear(
    x: Tensor,
    bitmask: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply with a packed matrix, which `checking.check` has passed.

    Sums are taken in float32, and don't depend on the number of threads; for x in float64, in float64 by torch. Where
    gradients are wanted they reach x and the bias, never the weight.

    Args:
        x: (…, in) float32, bfloat16, float16 or float64.
        bitmask: uint8 (out, ⌈in/8⌉); bit j of byte b says whether column 8b + j is kept.
        values: (nnz,) row by row, columns ascending: float32, bfloat16, float16 or int8.
        row_offsets: int64 (out + 1), where each row's values begin, and at last nnz.
        scales: (out,) float32 or bfloat16 for int8 values: the weight is scale · value. None otherwise.
        bias: (out,), or None.

    Returns:
        (…, out) in x's dtype.

    Raises:
        PhoenixError: shapes or dtypes don't fit together.
    """
    if watched(x) or (torch.is_grad_enabled() and wants_gradient(x, bias)):
        return _operator(x, bitmask, values, row_offsets, scales, bias)
    return multiply(x, bitmask, values, row_offsets, scales, bias)


def watched(x: Tensor) -> bool:
    """Whether torch's operators are compiled, traced, faked or counted: a kernel of ours is not seen then."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return type(x) is not Tensor or bool(torch._C._len_torch_dispatch_stack())


def wants_gradient(x: Tensor, bias: Tensor | None) -> bool:
    """Whether either is to be differentiated by."""
    return x.requires_grad or (bias is not None and bias.requires_grad)


def multiply(
    x: Tensor, bitmask: Tensor, values: Tensor, row_offsets: Tensor, scales: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`sparse_linear` without gradients."""
    columns, rows = x.shape[-1], bitmask.shape[0]
    wrong = wrong_form(bitmask, values, row_offsets, columns, scales) or wrong_operands(x, bitmask.device, rows, bias)
    if wrong:
        raise PhoenixError(f"sparse_linear: {wrong}")
    compiled = library() if x.device.type == "cpu" and x.dtype in FLOATS and values.dtype in CODES else None
    if compiled is None:
        return portable.linear(x, bitmask, values, row_offsets, scales, bias)
    x = x.contiguous()
    batch = x.numel() // columns
    if bias is not None and (bias.dtype not in FLOATS or not bias.is_contiguous()):
        bias = bias.float().contiguous()
    if batch >= FEWEST:
        flat = x.view(batch, columns)
        if dense_is_faster(compiled, flat, values.dtype, _by_kernels, _by_panels):
            return _by_panels(compiled, flat, bitmask, values, row_offsets, scales, bias).view(*x.shape[:-1], rows)
    y = torch.empty((*x.shape[:-1], rows), dtype=x.dtype)
    compiled.linear(x, bitmask, values, row_offsets, scales, bias, y, columns)
    return y


def wrong_operands(x: Tensor, device: torch.device, rows: int, bias: Tensor | None) -> str | None:
    """What is wrong with x and the bias for a weight of that many rows on that device, or None."""
    if x.dtype not in (*FLOATS, torch.float16, torch.float64):
        return f"x is {x.dtype}; give it float32, bfloat16, float16 or float64"
    if x.device != device:
        return f"x is on {x.device}, the weight on {device}"
    if bias is not None and (bias.shape != (rows,) or bias.device != x.device):
        return f"the bias is {tuple(bias.shape)} on {bias.device}, not ({rows},) on {x.device}"
    return None


def _by_kernels(compiled: Library, x: Tensor, bitmask: Tensor, values: Tensor, row_offsets: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], bitmask.shape[0])
    compiled.linear(x, bitmask, values, row_offsets, None, None, y, x.shape[1])
    return y


def _by_panels(
    compiled: Library,
    x: Tensor,
    bitmask: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Unpack some rows, multiply x (batch, in) with them as torch does, go on with the next."""
    rows, columns = bitmask.shape[0], x.shape[1]
    dtype = portable.product_dtype(x.dtype, values.dtype)
    wide, y = x.to(dtype), x.new_empty(x.shape[0], rows)
    size = max(1, min(rows, PANEL // (columns * dtype.itemsize)))
    for first in range(0, rows, size):
        some = slice(first, min(rows, first + size))
        panel = scratch((some.stop - first) * columns, dtype).view(-1, columns)
        compiled.expand(bitmask, values, row_offsets, first, panel)
        product = torch.mm(wide, panel.t())
        y[:, some] = portable.finish(
            product, None if scales is None else scales[some], None if bias is None else bias[some], x.dtype
        )
    return y


def scratch(count: int, dtype: torch.dtype) -> Tensor:
    """Memory that a thread keeps: pages asked for anew would have to be cleared anew."""
    size = count * dtype.itemsize
    if getattr(_kept, "panel", None) is None or _kept.panel.numel() < size:
        _kept.panel = torch.empty(size, dtype=torch.uint8)
    panel: Tensor = _kept.panel[:size].view(dtype)
    return panel


@torch.library.custom_op("phoenix_sparse::sparse_linear", mutates_args=())
def _operator(
    x: Tensor,
    bitmask: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The same for torch's compiler and autograd; called directly it would cost tens of microseconds."""
    return multiply(x, bitmask, values, row_offsets, scales, bias)


@_operator.register_fake
def _(x: Tensor, bitmask: Tensor, *_: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], bitmask.shape[0]))


def _keep(ctx, inputs: tuple[Any, ...], output: Tensor) -> None:  # type: ignore[no-untyped-def]  # noqa: ARG001
    x, bitmask, values, row_offsets, scales, bias = inputs
    ctx.save_for_backward(bitmask, values, row_offsets, scales)
    ctx.columns, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    bitmask, values, row_offsets, scales = ctx.saved_tensors
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = gradient_of_x(gradient, bitmask, values, row_offsets, scales, ctx.columns)
    # Without a bias torch tells nothing of it: it leaves out last arguments that are their defaults.
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
        of_bias = gradient_of_bias(gradient, ctx.bias_dtype)
    return of_x, None, None, None, None, of_bias


def gradient_of_x(
    gradient: Tensor, bitmask: Tensor, values: Tensor, row_offsets: Tensor, scales: Tensor | None, columns: int
) -> Tensor:
    """Of the gradient of y (…, out), that of x (…, in)."""
    wide = portable.wide_dtype(gradient.dtype)
    weight = portable.unpack(bitmask, values, row_offsets, columns).to(wide)
    weight = weight if scales is None else weight * scales.to(wide)[:, None]
    return (gradient.to(wide) @ weight).to(gradient.dtype)


def gradient_of_bias(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the gradient of y (…, out), that of a bias of that dtype."""
    return gradient.to(portable.wide_dtype(gradient.dtype)).flatten(0, -2).sum(0).to(dtype)


_operator.register_autograd(_backward, setup_context=_keep)
