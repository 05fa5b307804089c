"""y = x Wᵀ + b with a sliced W: `linear.sparse_linear` for matrices with few values."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.kernels import portable
from phoenix_sparse.runtime.kernels.choice import FEWEST, dense_is_faster
from phoenix_sparse.runtime.kernels.library import Library, library
from phoenix_sparse.runtime.kernels.linear import (
    FLOATS,
    PANEL,
    gradient_of_bias,
    gradient_of_x,
    scratch,
    wants_gradient,
    watched,
    wrong_operands,
)
from phoenix_sparse.runtime.kernels.slices import ROWS, Slices
from phoenix_sparse.runtime.kernels.slicing import count_steps, fill, unslice


def sliced_linear(x: Tensor, slices: Slices, scales: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Multiply with a sliced matrix.

    Sums are taken in float32, and don't depend on the number of threads; for x in float64, in float64 by torch. Where
    gradients are wanted they reach x and the bias, never the weight.

    Args:
        x: (…, in) float32, bfloat16, float16 or float64.
        slices: W (out, in).
        scales: (out,) float32 or bfloat16 for int8 values: the weight is scale · value. None otherwise.
        bias: (out,), or None.

    Returns:
        (…, out) in x's dtype.

    Raises:
        PhoenixError: shapes or dtypes don't fit together, or the compiled kernels aren't here.
    """
    parts = (x, slices.steps, slices.windows, slices.starts, slices.order, slices.columns, scales, bias)
    if watched(x) or (torch.is_grad_enabled() and wants_gradient(x, bias)):
        return _operator(*parts)
    return _multiply(x, slices, scales, bias)


def _multiply(x: Tensor, slices: Slices, scales: Tensor | None, bias: Tensor | None) -> Tensor:
    rows, columns = slices.order.numel(), slices.columns
    wrong = wrong_operands(x, slices.steps.device, rows, bias)
    if wrong is None and x.shape[-1] != columns:
        wrong = f"x has {x.shape[-1]} columns, the weight {columns}"
    compiled = library()
    if wrong is None and compiled is None:
        wrong = "this weight's layout needs the compiled kernels; load the model again"
    if wrong or compiled is None:
        raise PhoenixError(f"sparse_linear: {wrong}")
    x = x.contiguous()
    flat = x.view(-1, columns)
    if compiled.has_sliced and x.dtype in FLOATS and not _dense_is_faster(compiled, flat, slices):
        if bias is not None and (bias.dtype not in FLOATS or not bias.is_contiguous()):
            bias = bias.float().contiguous()
        y = torch.empty((*x.shape[:-1], rows), dtype=x.dtype)
        if compiled.sliced(x, slices, scales, bias, y):
            return y
    # With activations that aren't finite, too: a weight that isn't there makes a NaN of them, in a dense product.
    return by_panels(compiled, flat, slices, scales, bias).view(*x.shape[:-1], rows)


def _dense_is_faster(compiled: Library, x: Tensor, slices: Slices) -> bool:
    if x.shape[0] < FEWEST:
        return False
    share = max(1, slices.places) / (slices.order.numel() * slices.columns)
    return dense_is_faster(compiled, x, slices.values, _by_kernels, by_panels, partial(_sliced, compiled), share)


def _sliced(compiled: Library, bitmask: Tensor, values: Tensor, row_offsets: Tensor, columns: int) -> tuple[Slices]:
    counted = count_steps(compiled, bitmask, values, row_offsets, columns)
    return (fill(compiled, bitmask, values, row_offsets, counted),)


def _by_kernels(compiled: Library, x: Tensor, slices: Slices) -> Tensor:
    y = x.new_empty(x.shape[0], slices.order.numel())
    compiled.sliced(x, slices, None, None, y)
    return y


def by_panels(
    compiled: Library, x: Tensor, slices: Slices, scales: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Unpack some slices, multiply x (batch, in) with them as torch does, go on with the next."""
    rows, columns = slices.order.numel(), slices.columns
    dtype = portable.product_dtype(x.dtype, slices.values)
    held = torch.float32 if dtype == torch.float64 else dtype  # which holds all values, too
    wide, y = x.to(dtype), x.new_empty(x.shape[0], rows)
    size = max(1, PANEL // (columns * dtype.itemsize * ROWS))
    last = len(slices.starts) - 1
    for first in range(0, last, size):
        end = min(last, first + size)
        some = slices.order[first * ROWS : end * ROWS].long()
        panel = scratch(len(some) * columns, held).view(-1, columns)
        compiled.expand_slices(slices, first, end, panel)
        product = torch.mm(wide, panel.to(dtype).t())
        y[:, some] = portable.finish(
            product, None if scales is None else scales[some], None if bias is None else bias[some], x.dtype
        )
    return y


@torch.library.custom_op("phoenix_sparse::sliced_linear", mutates_args=())
def _operator(
    x: Tensor,
    steps: Tensor,
    windows: Tensor,
    starts: Tensor,
    order: Tensor,
    columns: int,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The same for torch's compiler and autograd; called directly it would cost tens of microseconds."""
    return _multiply(x, Slices(steps, windows, starts, order, columns), scales, bias)


@_operator.register_fake
def _(x: Tensor, *parts: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], parts[3].shape[0]))


def _keep(ctx, inputs: tuple[Any, ...], output: Tensor) -> None:  # type: ignore[no-untyped-def]  # noqa: ARG001
    _, steps, windows, starts, order, columns, scales, bias = inputs
    ctx.save_for_backward(steps, windows, starts, order, scales)
    ctx.columns, ctx.bias_dtype = columns, None if bias is None else bias.dtype


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    steps, windows, starts, order, scales = ctx.saved_tensors
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        packed = unslice(Slices(steps, windows, starts, order, ctx.columns))
        of_x = gradient_of_x(gradient, *packed, scales, ctx.columns)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[7]:  # as in `linear`
        of_bias = gradient_of_bias(gradient, ctx.bias_dtype)
    return of_x, *[None] * 6, of_bias


_operator.register_autograd(_backward, setup_context=_keep)
