"""From scores to masks: the lowest of each comparison group go, exactly as many as the sparsity says.

Ties are broken by position (stable sort), so the same scores always give the same mask.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from phoenix_sparse.pruning.patterns import UNSTRUCTURED, Pattern

Group = Literal["row", "layer", "global"]


def keep(
    scores: Tensor, sparsity: float, group: Group, pattern: Pattern = UNSTRUCTURED, *, exact: bool = False
) -> Tensor:
    """Choose a layer's mask by its scores.

    Args:
        scores: (out, in), higher is kept.
        sparsity: share to drop; N:M patterns have their own and ignore it.
        group: `row`, or anything else for the whole layer. Blocks compete within the layer in any case.
        pattern: unstructured, N:M or block.
        exact: meet the layer's sparsity to the weight also where rows compete (see `keep_per_row`).

    Returns:
        Boolean (out, in), True where a weight is kept.
    """
    if pattern.kind == "n:m":
        return keep_n_of_m(scores, pattern.first, pattern.second)
    if pattern.kind == "block":
        return keep_blocks(scores, sparsity, pattern.first, pattern.second)
    return keep_per_row(scores, sparsity, exact=exact) if group == "row" else keep_per_layer(scores, sparsity)


def keep_per_row(scores: Tensor, sparsity: float, *, exact: bool = False) -> Tensor:
    """Drop the lowest ⌊in · sparsity⌋ scores of each output row, as Wanda does. (out, in) -> boolean (out, in).

    So the layer falls up to one weight a row short of ⌊out · in · sparsity⌋. With `exact` it loses as many: some rows
    lose one more than others, those whose next score is lowest.
    """
    rows, columns = scores.shape
    drop, more = int(columns * sparsity), 0  # in floating point, as published: 0.29 of 100 is 28
    if exact:
        drop, more = divmod(int(scores.numel() * sparsity), rows)
    order = torch.sort(scores, dim=-1, stable=True).indices
    kept = torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :drop], False)
    if more:
        following = order[:, drop]
        lowest = torch.sort(scores.gather(1, following[:, None])[:, 0], stable=True).indices[:more]
        kept[lowest, following[lowest]] = False
    return kept


def keep_per_layer(scores: Tensor, sparsity: float) -> Tensor:
    """Drop the lowest ⌊out · in · sparsity⌋ scores of the whole matrix. (out, in) -> boolean (out, in)."""
    return _keep_all_but(scores.reshape(-1), int(scores.numel() * sparsity)).reshape(scores.shape)


def _keep_all_but(flat: Tensor, drop: int) -> Tensor:
    """Keep all but the `drop` lowest, of equal ones the later; as a stable sort would choose, without sorting all."""
    if drop == 0:
        return torch.ones_like(flat, dtype=torch.bool)
    flat = flat.detach() if flat.dtype in (torch.float32, torch.float64) else flat.detach().float()
    if flat.device.type == "cpu":
        values = flat.numpy()
        threshold = torch.tensor(float(np.partition(values, drop - 1)[drop - 1]), dtype=flat.dtype)
    else:
        threshold = torch.sort(flat).values[drop - 1]
    kept = flat > threshold
    equal = (flat == threshold).nonzero().flatten()
    kept[equal[drop - int((flat < threshold).sum()) :]] = True
    return kept


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the N highest of each M neighbours in a row. (out, in) -> boolean (out, in); M divides in.

    Of equal scores the ones further left go, as with the Wanda repository's N:M masks of distinct scores.
    """
    groups = scores.reshape(-1, m)
    order = torch.sort(groups, dim=-1, stable=True).indices[:, : m - n]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(1, order, False).reshape(scores.shape)


def keep_blocks(scores: Tensor, sparsity: float, rows: int, columns: int) -> Tensor:
    """Keep or drop blocks of rows x columns of a layer by the sum of their scores. (out, in) -> boolean (out, in)."""
    out, inner = scores.shape
    sums = scores.float().reshape(out // rows, rows, inner // columns, columns).sum((1, 3))
    kept = keep_per_layer(sums, sparsity)
    return kept[:, None, :, None].expand(-1, rows, -1, columns).reshape(out, inner).contiguous()


def keep_globally(scores: Mapping[str, Tensor], sparsity: float, floor: float = 0.01) -> dict[str, Tensor]:
    """Drop the lowest scores of all layers together; layers end up with sparsities of their own.

    Args:
        scores: by layer, comparable with each other.
        sparsity: of all layers together.
        floor: share of its weights that each layer keeps whatever their scores, so that none dies; at most the
            density.
    """
    # On the CPU: CUDA sorts at most 2³¹ values at once, and a large model has more.
    floor = min(floor, 1 - sparsity)
    parts, reserved = [], 0
    for layer in scores.values():
        flat = layer.detach().reshape(-1).float().cpu().clone()
        safe = min(flat.numel(), max(1, round(floor * flat.numel())))
        # As many of its highest as the floor says are beyond any competition.
        flat[_keep_all_but(flat, flat.numel() - safe)] = torch.inf
        parts.append(flat)
        reserved += safe
    together = torch.cat(parts)
    kept = _keep_all_but(together, min(int(together.numel() * sparsity), together.numel() - reserved))
    return {
        name: part.reshape(layer.shape).to(layer.device)
        for (name, layer), part in zip(scores.items(), kept.split([p.numel() for p in parts]), strict=True)
    }
