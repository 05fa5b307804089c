"""OWL: decoder blocks with more outliers among their Wanda scores keep more (Yin et al., arXiv 2310.05175).

The paper's layers are decoder blocks, here as in its repository: the mean that outliers stand above is that of all
scores of the block together, not of each matrix.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.allocation.blocks import by_blocks
from phoenix_sparse.pruning.allocation.budget import HIGH, Allocation, Sizes, spread

MULTIPLE = 5.0
"""M, in multiples of the mean: the paper's for LLaMA."""
WIDTH = 0.08
"""λ: sparsities differ by 2λ at most."""


def outliers(scores: Tensor | Iterable[Tensor], multiple: float = MULTIPLE) -> int:
    """Count the scores above `multiple` times their mean.

    Args:
        scores: Wanda scores |W|·‖X‖₂ of all linears of one decoder block (of one, where it is a single tensor), of
            any shapes, on one device or several.
        multiple: M, in means.

    Returns:
        How many are above. The mean is taken in float64 over all of them.

    Raises:
        PhoenixError: there are no scores.
    """
    parts = [scores] if isinstance(scores, Tensor) else list(scores)
    size = sum(part.numel() for part in parts)
    if not size:
        raise PhoenixError("sparsify.allocation: owl needs the scores of at least one layer of a block")
    mean = math.fsum(float(part.sum(dtype=torch.float64)) for part in parts) / size
    return sum(int((part > multiple * mean).sum()) for part in parts)


def owl_allocation(
    found: Mapping[str, tuple[int, int]],
    sizes: Sizes,
    target: float,
    *,
    width: float = WIDTH,
    high: float = HIGH,
    units: Sizes | None = None,
) -> Allocation:
    """Share sparsity out by outliers: keep_b = 2λ (D_b − min D) / (max D − min D), shifted to meet the target.

    D_b is a block's share of outliers (Yin et al., arXiv 2310.05175, section 3.2). The mean that has to be 1 − S is
    taken over weights; over blocks, as published, it is the same where these are of one size.

    Args:
        found: decoder block (`model.layers.3`) -> (outliers, weights), as counted over all its linears.
        sizes: weights of each layer.
        target: share of all weights to drop.
        width: λ.
        high: highest sparsity of a layer.
        units: weights of each layer that go at a time (see `budget.unit`); one without it.

    Returns:
        Sparsities by layer, equal within a block up to the rounding to whole units; all equal where the blocks have
        equal shares of outliers.

    Raises:
        PhoenixError: the blocks are not those of the layers, or the target can't be reached.
    """
    blocks = by_blocks(sizes)
    if different := sorted(found.keys() ^ blocks.keys()):
        raise PhoenixError(
            f"sparsify.allocation: outliers were counted in {len(found)} blocks and the layers are in {len(blocks)}; "
            f"{different[0]} is in one of them only"
        )
    shares = {block: count / weights for block, (count, weights) in found.items()}
    least, most = min(shares.values()), max(shares.values())
    scale = 2 * width / (most - least) if most > least else 0.0
    wanted = {name: target - scale * (shares[block] - least) for block, inside in blocks.items() for name in inside}
    return spread(wanted, sizes, target, high=high, units=units)
