"""AlphaPruning: layers whose spectrum has a heavier tail are better trained and keep more.

Lu et al., arXiv 2410.10912. A tail is measured by the exponent α of the power law that the largest eigenvalues of WᵀW
follow: the smaller α, the heavier the tail, and the lower the sparsity.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.allocation.blocks import by_blocks
from phoenix_sparse.pruning.allocation.budget import HIGH, Allocation, Sizes, spread

WIDTH = 0.3
"""ε: the highest sparsity is (1 + ε) / (1 − ε) times the lowest, before clipping."""


def hill_alpha(weight: Tensor) -> float:
    """The Hill estimate of the tail exponent of a weight's spectrum, the tail being the upper half.

    α = 1 + k / Σ_{i=1..k} ln(λ_{n−i+1} / λ_{n−k}), k = ⌊n/2⌋, over the ascending eigenvalues λ of WᵀW that are not zero
    (Lu et al., arXiv 2410.10912: PL_Alpha_Hill).

    Args:
        weight: (out, in). The squared singular values are computed in float32, or in float64 for a float64 weight;
            those below rounding error are no part of the spectrum.

    Returns:
        α > 1; infinite where the upper half of the spectrum is one value.

    Raises:
        PhoenixError: fewer than two eigenvalues are not zero, or a weight is not finite.
    """
    matrix = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if not bool(torch.isfinite(matrix).all()):
        raise PhoenixError("sparsify.allocation: alphapruning can't take the spectrum of NaN or infinite weights")
    values = torch.linalg.svdvals(matrix).double()
    rounding = float(values.max()) * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    logs = 2 * values[values > rounding].sort().values.log()
    if len(logs) < 2:
        raise PhoenixError("sparsify.allocation: alphapruning needs weights of rank two or more; one has less")
    tail = len(logs) // 2
    excess = float((logs[-tail:] - logs[-tail - 1]).sum())
    return 1 + tail / excess if excess > 0 else math.inf


def alpha_allocation(
    alphas: Mapping[str, float],
    sizes: Sizes,
    target: float,
    *,
    width: float = WIDTH,
    per_block: bool = True,
    high: float = HIGH,
    units: Sizes | None = None,
) -> Allocation:
    """Share sparsity out by tail exponents: s = η · ((α − min α) / (max α − min α) · (s₂ − s₁) + s₁), s₁,₂ = 1 ∓ ε.

    η scales to the target (Lu et al., arXiv 2410.10912, section 3.2). Where a value would pass `high` it is
    clipped, and all others are shifted by one amount to make up for it.

    Args:
        alphas: by layer, or by decoder block.
        sizes: weights of each layer.
        target: share of all weights to drop.
        width: ε.
        per_block: replace the α of layers by their mean over the decoder block, as published.
        high: highest sparsity of a layer.
        units: weights of each layer that go at a time (see `budget.unit`); one without it.

    Returns:
        Sparsities by layer; all equal where all α are.

    Raises:
        PhoenixError: the names are not those of the layers or of their blocks, an α is not finite, or the target can't
            be reached.
    """
    of_layer = _of_layers(alphas, sizes, per_block)
    for name, alpha in alphas.items():
        if not math.isfinite(alpha):
            raise PhoenixError(f"sparsify.allocation: alphapruning found no tail in {name} (α = {alpha})")
    least, most = min(of_layer.values()), max(of_layer.values())
    slope = 2 * width / (most - least) if most > least else 0.0
    start = 1 - width if slope else 1.0
    shape = {name: (alpha - least) * slope + start for name, alpha in of_layer.items()}
    scale = target * sum(sizes.values()) / math.fsum(shape[name] * sizes[name] for name in sizes)
    wanted = {name: scale * value for name, value in shape.items()}
    return spread(wanted, sizes, target, high=high, units=units)


def _of_layers(alphas: Mapping[str, float], sizes: Sizes, per_block: bool) -> dict[str, float]:
    blocks = by_blocks(sizes)
    if alphas.keys() == blocks.keys():
        return {name: alphas[block] for block, inside in blocks.items() for name in inside}
    if different := sorted(alphas.keys() ^ sizes.keys()):
        raise PhoenixError(
            f"sparsify.allocation: tail exponents are given neither by layer nor by decoder block; {different[0]} is "
            "one too many or missing"
        )
    if not per_block:
        return dict(alphas)
    means = {block: math.fsum(alphas[name] for name in inside) / len(inside) for block, inside in blocks.items()}
    return {name: means[block] for block, inside in blocks.items() for name in inside}
