"""Elastic ranks: one super-adapter whose prefixes A[:r], B[:, :r] are the sub-adapters."""

import random
from collections.abc import Iterable

Ranks = dict[str, int]


def draw(layers: Iterable[str], space: tuple[int, ...], seed: int, step: int) -> Ranks:
    """Draw a rank for every layer, uniformly from the space.

    The draw depends on (seed, step) alone, so one optimizer step has one draw: under gradient checkpointing, over all
    its micro-batches, after a resume and on every data-parallel rank.
    """
    generator = random.Random(f"{seed}/{step}")
    return {layer: generator.choice(space) for layer in layers}


def uniform(layers: Iterable[str], rank: int) -> Ranks:
    return dict.fromkeys(layers, rank)


def median(space: tuple[int, ...]) -> int:
    """The middle rank of the space, the lower one of two (the heuristic of Shears, arXiv 2404.10934)."""
    return sorted(space)[(len(space) - 1) // 2]
