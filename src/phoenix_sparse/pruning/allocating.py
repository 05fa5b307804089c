"""Share the sparsity out among layers as the settings say, measuring the dense model where the method needs it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.models import linears, prunable_linears
from phoenix_sparse.progress import Progress
from phoenix_sparse.pruning.allocation.alphapruning import alpha_allocation, hill_alpha
from phoenix_sparse.pruning.allocation.blocks import block_of
from phoenix_sparse.pruning.allocation.budget import Sizes, uniform, unit
from phoenix_sparse.pruning.allocation.evolutionary import evolve
from phoenix_sparse.pruning.allocation.explicit import by_block, by_pattern
from phoenix_sparse.pruning.allocation.fitness import DivergenceFitness
from phoenix_sparse.pruning.allocation.owl import outliers, owl_allocation
from phoenix_sparse.pruning.blocks import Blocks
from phoenix_sparse.pruning.importance import find_importance
from phoenix_sparse.pruning.linear import Method
from phoenix_sparse.pruning.sequential import Gradients, score_blocks
from phoenix_sparse.pruning.settings import SparsifySettings


@dataclass
class Shares:
    """An allocation, and how it was found."""

    sparsity: dict[str, float]
    found: dict[str, Any] = field(default_factory=dict)


def allocate(
    blocks: Blocks,
    settings: SparsifySettings,
    method: Method,
    *,
    tokens: Tensor | None,
    labels: Tensor | None = None,
    gradients: Gradients | None = None,
    progress: Progress | None = None,
) -> Shares:
    """Give every linear its sparsity.

    Args:
        blocks: of the dense model; `evolutionary` needs one in memory.
        settings: of the recipe.
        method: the same, looked up.
        tokens: (sequences, tokens), the calibration set.
        labels: the same, -100 where a token doesn't count for the evolutionary fitness; all count without it.
        gradients: by linear, where the importance needs them.
        progress: called with (what, done, all).

    Raises:
        PhoenixError: the allocation names no layer of this model, or can't meet the sparsity; or it is evolutionary,
            and the model isn't in memory.
    """
    sizes = {name: layer.out_features * layer.in_features for name, layer in prunable_linears(blocks.model).items()}
    chosen, target = settings.allocation, settings.sparsity
    if chosen == "uniform" and method.pattern.kind != "block":
        return Shares(dict.fromkeys(sizes, target))
    units = dict.fromkeys(sizes, unit(method.pattern))
    if chosen == "uniform":  # some layers drop a block more than others, and all together meet the sparsity
        return Shares(uniform(sizes, target, units=units))
    if isinstance(chosen, dict):
        return Shares(by_pattern(sizes, chosen, target, sizes, units=units))
    if isinstance(chosen, tuple):
        return Shares(by_block(sizes, chosen, target, sizes, units=units))
    if chosen == "owl":
        return _owl(blocks, sizes, units, settings, tokens, progress)
    if chosen == "alphapruning":
        return _alphapruning(blocks, sizes, units, settings, progress)
    return _evolutionary(blocks, sizes, units, settings, method, tokens, labels, gradients, progress)


def _owl(
    blocks: Blocks,
    sizes: Sizes,
    units: Sizes,
    settings: SparsifySettings,
    tokens: Tensor | None,
    progress: Progress | None,
) -> Shares:
    """OWL counts outliers among Wanda scores, whatever importance chooses the weights afterwards."""
    scores: dict[str, Tensor] = {}
    found: dict[str, tuple[int, int]] = {}

    def count(name: str, _weight: Tensor, score: Tensor) -> None:
        block = block_of(name)
        scores[name] = score
        if sum(block_of(other) == block for other in sizes) == len(scores):
            found[block] = outliers(scores.values()), sum(one.numel() for one in scores.values())
            scores.clear()

    score_blocks(blocks, _wanda(settings), tokens=tokens, visit=count, progress=progress)
    shares = owl_allocation(found, sizes, settings.sparsity, units=units)
    return Shares(shares, {"outliers": {block: count / weights for block, (count, weights) in found.items()}})


def _wanda(settings: SparsifySettings) -> Method:
    return Method(find_importance("wanda"), "none", settings.parsed_pattern, settings.comparison_group, 0)


def _alphapruning(
    blocks: Blocks, sizes: Sizes, units: Sizes, settings: SparsifySettings, progress: Progress | None
) -> Shares:
    alphas: dict[str, float] = {}
    for index, name in enumerate(blocks.names):
        with blocks.opened(name) as block, torch.no_grad():
            alphas |= {layer: hill_alpha(module.weight) for layer, module in linears(block, name).items()}
        if progress is not None:
            progress("spectrum of block", index + 1, len(blocks.names))
    return Shares(alpha_allocation(alphas, sizes, settings.sparsity, units=units), {"alphas": alphas})


def _evolutionary(
    blocks: Blocks,
    sizes: Sizes,
    units: Sizes,
    settings: SparsifySettings,
    method: Method,
    tokens: Tensor | None,
    labels: Tensor | None,
    gradients: Gradients | None,
    progress: Progress | None,
) -> Shares:
    """Candidates are judged by masks of the importance's scores, without weight updates."""
    if tokens is None:
        raise PhoenixError("sparsify.allocation: evolutionary needs calibration tokens")
    if any(parameter.is_meta for parameter in blocks.model.parameters()):
        raise PhoenixError("sparsify.allocation: evolutionary runs the whole model; give one in memory")
    if settings.sparsity == 0:
        return Shares(dict.fromkeys(sizes, 0.0))  # nothing could move
    evolution, scores = settings.evolution, dict[str, Tensor]()
    score_blocks(
        blocks,
        method,
        tokens=tokens,
        gradients=gradients,
        visit=lambda name, _weight, score: scores.update({name: score}),
        progress=progress,
    )
    stages = [min(count, len(tokens)) for count in evolution.sequences]
    with DivergenceFitness(
        blocks.model,
        scores,
        tokens[: stages[-1]],
        labels=None if labels is None else labels[: stages[-1]],
        stages=stages,
        group=method.group,
        pattern=method.pattern,
        measure=evolution.fitness,
    ) as fitness:
        shares, history = evolve(
            sizes,
            settings.sparsity,
            fitness,
            budget=evolution.budget,
            seed=method.seed,
            offspring=evolution.offspring,
            moves=evolution.moves,
            units=units,
            progress=progress,
        )
    return Shares(shares, {"history": [asdict(generation) for generation in history]})


def sparsities(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """What masks give each layer."""
    return {name: 1 - float(mask.float().mean()) for name, mask in masks.items()}
