"""The masked linear as one matrix product: y = x · (W + M⊙(s·BA))ᵀ + bias.

SparsePEFT (arXiv 2410.03750) trains the same function with two products and keeps matrices of W's size for the
backward pass. Here the forward pass saves x, A and B; the backward pass builds the effective weight anew and reduces
the weight's gradient to those of A and B at once. The floor of an exact step is three products of W's size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def effective_weight(weight: Tensor, mask: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + M⊙(s·BA), in W's dtype.

    Training, evaluation and merging all come here, so that the merged weight is to the last bit the one that was
    trained: in bfloat16, too, where the sum is rounded at every step of training as it is in the merged file.

    Args:
        weight: W, (out, in).
        mask: M, boolean (out, in), or None for a dense update.
        a: A, (rank, in).
        b: B, (out, rank).
        scale: s.
    """
    update = (b * scale).to(weight.dtype) @ a.to(weight.dtype)
    if mask is not None:
        update.mul_(mask)
    return update.add_(weight)


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """x · (W + M⊙(s·BA))ᵀ + bias, with gradients for x, A and B; W, M and the bias are frozen.

    Args:
        x: (..., in); computed in W's dtype.
        weight, mask, a, b, scale: as in `effective_weight`.
        bias: (out,) or None.

    Returns:
        (..., out), in W's dtype.
    """
    return _MaskedLinear.apply(x.to(weight.dtype), weight, bias, mask, a, b, scale)


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, a, b)
        # W and M are the model's own and stay where they are: as attributes they are neither copied nor offloaded.
        ctx.weight, ctx.mask, ctx.scale = weight, mask, scale
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x, effective_weight(weight, mask, a, b, scale), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        (grad,) = grads
        grad_x = grad_a = grad_b = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = grad @ effective_weight(ctx.weight, ctx.mask, a, b, ctx.scale)
            if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
                grad_weight = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
                grad_weight.mul_(ctx.mask)
                grad_a = ((b.to(x.dtype).t() @ grad_weight) * ctx.scale).to(a.dtype)
                grad_b = ((grad_weight @ a.to(x.dtype).t()) * ctx.scale).to(b.dtype)
        return grad_x, None, None, None, grad_a, grad_b, None
