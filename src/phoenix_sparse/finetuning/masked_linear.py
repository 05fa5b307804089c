"""The masked linear as one matrix product: y = x · (W + G⊙(s·BA))ᵀ + bias.

G is the mask M of SparsePEFT (arXiv 2410.03750), which trains the same function with two products and keeps matrices
of W's size for the backward pass. Here the forward pass saves x, A and B; the backward pass builds the effective weight
anew and reduces the weight's gradient to those of A and B at once. The floor of an exact step is three products of W's
size. With G = W it is HiRA (Huang et al., ICLR 2025), whose zeros are those of W.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def effective_weight(weight: Tensor, gate: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + G⊙(s·BA), in W's dtype.

    Training, evaluation and merging all come here, so that the merged weight is to the last bit the one that was
    trained: in bfloat16, too, where the sum is rounded at every step of training as it is in the merged file.

    Args:
        weight: W, (out, in).
        gate: G, (out, in): the mask M (boolean), W itself (HiRA), or None for a dense update.
        a: A, (rank, in).
        b: B, (out, rank).
        scale: s.
    """
    update = (b * scale).to(weight.dtype) @ a.to(weight.dtype)
    if gate is not None:
        update.mul_(gate)
    return update.add_(weight)


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """x · (W + G⊙(s·BA))ᵀ + bias, with gradients for x, A and B; W, G and the bias are frozen.

    Args:
        x: (..., in); computed in W's dtype.
        weight, gate, a, b, scale: as in `effective_weight`.
        bias: (out,) or None.

    Returns:
        (..., out), in W's dtype.
    """
    return _MaskedLinear.apply(x.to(weight.dtype), weight, bias, gate, a, b, scale)


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, a, b)
        # W and G are the model's own and stay where they are: as attributes they are neither copied nor offloaded.
        ctx.weight, ctx.gate, ctx.scale = weight, gate, scale
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x, effective_weight(weight, gate, a, b, scale), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        (grad,) = grads
        grad_x = grad_a = grad_b = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = grad @ effective_weight(ctx.weight, ctx.gate, a, b, ctx.scale)
            if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
                grad_weight = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
                grad_weight.mul_(ctx.gate)
                grad_a = ((b.to(x.dtype).t() @ grad_weight) * ctx.scale).to(a.dtype)
                grad_b = ((grad_weight @ a.to(x.dtype).t()) * ctx.scale).to(b.dtype)
        return grad_x, None, None, None, grad_a, grad_b, None
