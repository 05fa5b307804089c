"""Elastic ranks: one super-adapter whose prefixes A[:r], B[:, :r] are the sub-adapters."""

import random
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from phoenix_sparse.errors import PhoenixError

Ranks = dict[str, int]
Spaces = dict[str, tuple[int, ...]]
# What people write: the same ranks for all layers, or ranks by names and patterns of layers.
Space = tuple[int, ...] | Mapping[str, tuple[int, ...]]


def spaces(layers: Iterable[str], space: Space) -> Spaces:
    """The ranks that each layer may have, its largest first.

    Args:
        layers: full names, such as `model.layers.0.self_attn.q_proj`.
        space: ranks for all layers; or ranks by pattern (`*`, `?`, `[...]`) of full names or of their ends, such as
            `q_proj` or `mlp.*`. A layer takes the first pattern that fits, in the order written.

    Raises:
        PhoenixError: a layer that no pattern fits, or a pattern that fits no layer.
    """
    names = list(layers)
    if not isinstance(space, Mapping):
        return dict.fromkeys(names, _sorted(space))
    fitting = {pattern: {name for name in names if _fits(name, pattern)} for pattern in space}
    for pattern, found in fitting.items():
        if not found:
            raise PhoenixError(
                f"finetune.ranks: {pattern!r} fits no adapted linear; there are "
                f"{', '.join(sorted({name.rsplit('.', 1)[-1] for name in names}))}"
            )
    result: Spaces = {}
    for name in names:
        chosen = name if name in space else next((one for one in space if name in fitting[one]), None)
        if chosen is None:
            raise PhoenixError(f"finetune.ranks: no ranks for {name}; give '*' some, for all that are left")
        result[name] = _sorted(space[chosen])
    return result


def largest(space: Spaces) -> Ranks:
    return {layer: ranks[0] for layer, ranks in space.items()}


def smallest(space: Spaces) -> Ranks:
    return {layer: ranks[-1] for layer, ranks in space.items()}


def middle(space: Spaces) -> Ranks:
    """Every layer at its middle rank (the heuristic of Shears, arXiv 2404.10934)."""
    return {layer: median(ranks) for layer, ranks in space.items()}


def is_fixed(space: Spaces) -> bool:
    """Whether there is one sub-adapter only."""
    return all(len(ranks) == 1 for ranks in space.values())


def draw(space: Spaces, seed: int, step: int) -> Ranks:
    """Draw a rank for every layer, uniformly from its ranks.

    The draw depends on (seed, step) alone, so one optimizer step has one draw: under gradient checkpointing, over all
    its micro-batches, after a resume and on every data-parallel rank.
    """
    generator = random.Random(f"{seed}/{step}")
    return {layer: generator.choice(ranks) for layer, ranks in space.items()}


def sandwich(space: Spaces, seed: int, step: int) -> list[Ranks]:
    """The largest sub-adapter, the smallest, and the one that the step draws.

    One random sub-adapter between the two is the least that the sandwich rule of Yu & Huang (arXiv 1903.05134,
    section 3.2) asks for; its gradients are averaged with those of the bounds.
    """
    return [largest(space), smallest(space), draw(space, seed, step)]


def uniform(layers: Iterable[str], rank: int) -> Ranks:
    return dict.fromkeys(layers, rank)


def median(ranks: tuple[int, ...]) -> int:
    """The middle one of some ranks, the lower one of two."""
    return sorted(ranks)[(len(ranks) - 1) // 2]


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _sorted(ranks: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(ranks, reverse=True))
