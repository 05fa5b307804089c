"""The masked linear as one matrix product: y = x · (W + G⊙(s·BA))ᵀ + bias.

G is the mask M of SparsePEFT (arXiv 2410.03750), which trains the same function with two products and keeps matrices
of W's size for the backward pass. Here the forward pass saves x, A and B; the backward pass builds the effective weight
anew and reduces the weight's gradient to those of A and B at once. The floor of an exact step is three products of W's
size; between them work the kernels of `fused` on a GPU, and plain PyTorch elsewhere. At most one matrix of W's size
lives at a time, and the allocator gives the same memory to every layer of that size.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def uses_kernels(weight: Tensor, rank: int = 1) -> bool:
    """Whether the fused kernels compute with a weight: on a GPU with Triton, in their dtypes, up to rank 256."""
    if not weight.is_cuda or weight.dtype not in KERNEL_DTYPES or not _has_triton():
        return False
    from phoenix_sparse.finetuning.fused import LARGEST_RANK

    return rank <= LARGEST_RANK and weight.is_contiguous()


def pack_mask(mask: Tensor) -> Tensor:
    """A boolean mask (out, in) as bits: uint8 (out, ⌈in/8⌉), bit j of byte b for column 8b + j."""
    out, columns = mask.shape
    bits = functional.pad(mask, (0, -columns % 8)).view(out, -1, 8).to(torch.uint8)
    return bits.mul_(1 << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(2, dtype=torch.uint8)


def unpack_mask(packed: Tensor, columns: int) -> Tensor:
    """The boolean mask (out, columns) of `pack_mask` again."""
    bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.view(packed.shape[0], -1)[:, :columns].to(torch.bool)


def effective_weight(weight: Tensor, gate: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + G⊙(s·BA), in W's dtype.

    Training, evaluation and merging all come here, so that the merged weight is to the last bit the one that was
    trained: in bfloat16, too, where the sum is rounded at every step of training as it is in the merged file.

    Args:
        weight: W, (out, in).
        gate: G: the mask M, boolean (out, in) or packed (`pack_mask`); W itself (HiRA); or None for a dense update.
        a: A, (rank, in).
        b: B, (out, rank).
        scale: s.
    """
    if uses_kernels(weight, a.shape[0]):
        from phoenix_sparse.finetuning.fused import write_effective

        return write_effective(weight, _for_kernels(gate), a, b, scale)
    update = (b * scale).to(weight.dtype) @ a.to(weight.dtype)
    if gate is not None:
        update.mul_(_plain(gate, weight))
    return update.add_(weight)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    collect: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """x · (W + G⊙(s·BA))ᵀ + bias, with gradients for x, A and B; W, G and the bias are frozen.

    Args:
        x: (..., in); computed in W's dtype.
        weight, gate, a, b, scale: as in `effective_weight`.
        bias: (out,) or None.
        collect: is shown the effective weight's gradient in the backward pass, (out, in), before it is used up.

    Returns:
        (..., out), in W's dtype.
    """
    return _MaskedLinear.apply(x.to(weight.dtype), weight, bias, gate, a, b, scale, collect)


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        collect: Callable[[Tensor], None] | None,
    ) -> Tensor:
        ctx.save_for_backward(x, a, b)
        # W and G are the model's own and stay where they are: as attributes they are neither copied nor offloaded.
        ctx.weight, ctx.gate, ctx.scale, ctx.collect = weight, gate, scale, collect
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
                if ctx.collect is not None:
                    ctx.collect(grad_weight)
                grad_a, grad_b = _factor_gradients(grad_weight, ctx.weight, ctx.gate, a, b, ctx.scale)
        return grad_x, None, None, None, grad_a, grad_b, None, None


def _factor_gradients(
    grad_weight: Tensor, weight: Tensor, gate: Tensor, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The gradients of A and B from that of the effective weight, whose memory is used up."""
    if uses_kernels(weight, a.shape[0]):
        from phoenix_sparse.finetuning.fused import factor_gradients

        grad_a, grad_b = factor_gradients(grad_weight, _for_kernels(gate), a, b, scale)
        return grad_a.to(a.dtype), grad_b.to(b.dtype)
    grad_weight.mul_(_plain(gate, weight))
    grad_a = (b.to(weight.dtype).t() @ grad_weight) * scale
    grad_b = (grad_weight @ a.to(weight.dtype).t()) * scale
    return grad_a.to(a.dtype), grad_b.to(b.dtype)


def _for_kernels(gate: Tensor | None) -> Tensor | None:
    return pack_mask(gate) if gate is not None and gate.dtype == torch.bool else gate


def _plain(gate: Tensor, weight: Tensor) -> Tensor:
    return unpack_mask(gate, weight.shape[1]) if gate.dtype == torch.uint8 else gate


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
