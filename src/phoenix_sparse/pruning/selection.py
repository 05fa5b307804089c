"""From scores to masks: the lowest of each comparison group go, exactly as many as the sparsity says.

Ties are broken by position (stable sort), so the same scores always give the same mask.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError


def keep_per_row(scores: Tensor, sparsity: float) -> Tensor:
    """Drop the lowest ⌊in · sparsity⌋ scores of each output row, as Wanda does. (out, in) -> boolean (out, in)."""
    drop = int(scores.shape[1] * sparsity)  # in floating point, as published: 0.29 of 100 is 28
    order = torch.sort(scores, dim=-1, stable=True).indices[:, :drop]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order, False)


def keep_per_layer(scores: Tensor, sparsity: float) -> Tensor:
    """Drop the lowest ⌊out · in · sparsity⌋ scores of the whole matrix. (out, in) -> boolean (out, in)."""
    return keep_per_row(scores.reshape(1, -1), sparsity).reshape(scores.shape)


def keep_globally(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Drop the lowest scores of all layers together; layers end up with sparsities of their own.

    Raises:
        PhoenixError: a layer would lose its last weight.
    """
    # On the CPU: CUDA sorts at most 2³¹ values at once, and a large model has more.
    flat = torch.cat([layer.reshape(-1).cpu() for layer in scores.values()])
    kept = keep_per_layer(flat.reshape(1, -1), sparsity).reshape(-1)
    masks = {}
    for (name, layer), part in zip(scores.items(), kept.split([s.numel() for s in scores.values()]), strict=True):
        if not part.any():
            raise PhoenixError(
                f"sparsify.group: global would empty {name} at sparsity {sparsity}; use group=layer or a lower sparsity"
            )
        masks[name] = part.reshape(layer.shape).to(layer.device)
    return masks
