"""Search an allocation by evolution, in the manner of EvoPress (Sieberling et al., arXiv 2410.14649).

A level is the same number of weights in every layer, so that a level taken from one layer and given to another leaves
the total as it is, whatever their sizes. Children of a single parent are weeded out on little data first; the parent
gives way only to a child that is better on the most data.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.progress import Progress
from phoenix_sparse.pruning.allocation.budget import HIGH, Allocation, Sizes, counts, sparsity_of, uniform

Fitness = Callable[[Mapping[str, float], int], float]
"""(allocation, stage) -> how bad it is; later stages look at more data."""

LEVELS = 16
"""How many default levels lie between the target and the nearer of sparsity 0 and 1, in the median layer."""


@dataclass(frozen=True)
class Generation:
    """What the search knew after a generation; generation 0 is the start.

    Attributes:
        generation: its number.
        evaluations: calls of the fitness so far, at all stages, this generation's included.
        best: the parent's fitness at the last stage; never worse than the generation before.
    """

    generation: int
    evaluations: int
    best: float


def evolve(
    sizes: Sizes,
    target: float,
    fitness: Fitness,
    *,
    budget: int,
    seed: int,
    offspring: int = 64,
    survivors: Sequence[int] = (8, 2, 1),
    moves: int = 3,
    step: int | None = None,
    start: Mapping[str, float] | None = None,
    low: float = 0.0,
    high: float = HIGH,
    units: Sizes | None = None,
    progress: Progress | None = None,
) -> tuple[Allocation, list[Generation]]:
    """Improve an allocation within a budget of evaluations.

    Each child differs from the parent by the lower of two draws of 1 to `moves` levels, each from one random layer to
    another. Stage after stage the best `survivors` go on; a stage that all would survive is not run. What is left of
    the budget at the end goes to smaller generations, so that it is used in full.

    Args:
        sizes: weights of each layer.
        target: share of all weights to drop.
        fitness: lower is better; NaN counts as worst. Called with stages 0 to len(survivors) − 1, and assumed to give
            the same allocation the same value at the same stage.
        budget: calls of the fitness, at any stage.
        seed: of the mutations.
        offspring: children of a generation.
        survivors: of each stage; the last is 1.
        moves: the most levels that a child moves.
        step: weights of a level; a multiple of every unit. By default a sixteenth of the way from the target to the
            nearer of 0 and 1 in the median layer.
        start: the first parent; uniform without it.
        low: lowest sparsity that a layer is moved to.
        high: highest sparsity that a layer is moved to.
        units: weights of each layer that go at a time (see `budget.unit`); one without it.
        progress: called with (what, evaluations, budget).

    Returns:
        The best allocation, with the start's number of dropped weights exactly, and the history.

    Raises:
        PhoenixError: a setting is out of its range, the start doesn't meet the target, or no level can move anywhere.
    """
    _check_settings(budget, offspring, survivors, moves)
    units = dict.fromkeys(sizes, 1) if units is None else units
    if start is None:
        start = uniform(sizes, target, units=units)
    names = list(sizes)
    first = counts(start, sizes, target, units=units)
    step = _level(sizes, target, units, step)
    least = [math.ceil(low * sizes[name] - 1e-9) for name in names]
    most = [math.floor(high * sizes[name] + 1e-9) for name in names]
    spent = 0

    def allocation(drop: Sequence[int]) -> Allocation:
        return {
            name: sparsity_of(drop[index] // units[name], sizes[name] // units[name])
            for index, name in enumerate(names)
        }

    def measure(drop: Sequence[int], stage: int) -> float:
        nonlocal spent
        value = float(fitness(allocation(drop), stage))
        spent += 1
        if progress is not None:
            progress("allocation", spent, budget)
        return math.inf if math.isnan(value) else value

    parent = tuple(first[name] for name in names)
    best = measure(parent, len(survivors) - 1)
    history = [Generation(0, spent, best)]
    if budget > 1 and not _movable(parent, step, least, most):
        raise PhoenixError(
            f"sparsify.allocation: no level of {step} weights can move from one layer to another within the sparsities "
            f"{low} to {high}; use a smaller step"
        )
    generator = random.Random(f"evolve/{seed}")
    while spent < budget:
        size = _affordable(offspring, survivors, budget - spent)
        children = _children(parent, size, moves, step, least, most, generator)
        for stage, survive in enumerate(survivors):
            last = stage == len(survivors) - 1
            if len(children) <= survive and not last:
                continue
            scored = [(measure(child, stage), child) for child in children]
            scored.sort(key=lambda pair: pair[0])  # stable: of equals the earlier
            children = [child for _, child in scored[:survive]]
            if last and scored and scored[0][0] < best:
                best, parent = scored[0]
        history.append(Generation(len(history), spent, best))
    return allocation(parent), history


def _children(
    parent: tuple[int, ...],
    size: int,
    moves: int,
    step: int,
    least: Sequence[int],
    most: Sequence[int],
    generator: random.Random,
) -> list[tuple[int, ...]]:
    """Up to `size` children, all different; fewer where chance finds no more."""
    found: dict[tuple[int, ...], None] = {}
    for _ in range(20 * size):
        if len(found) == size:
            break
        child = list(parent)
        for _ in range(min(generator.randint(1, moves), generator.randint(1, moves))):
            _move(child, step, least, most, generator)
        if tuple(child) != parent:
            found[tuple(child)] = None
    return list(found)


def _move(child: list[int], step: int, least: Sequence[int], most: Sequence[int], generator: random.Random) -> None:
    """Move one level from a random layer to another, where any pair can."""
    givers = [index for index, drop in enumerate(child) if drop - step >= least[index]]
    takers = [index for index, drop in enumerate(child) if drop + step <= most[index]]
    if len(takers) == 1:
        givers = [index for index in givers if index != takers[0]]
    if givers and takers:
        giver = generator.choice(givers)
        taker = generator.choice([index for index in takers if index != giver])
        child[giver] -= step
        child[taker] += step


def _movable(parent: Sequence[int], step: int, least: Sequence[int], most: Sequence[int]) -> bool:
    givers = {index for index, drop in enumerate(parent) if drop - step >= least[index]}
    takers = {index for index, drop in enumerate(parent) if drop + step <= most[index]}
    return bool(givers and takers) and len(givers | takers) > 1


def _affordable(offspring: int, survivors: Sequence[int], left: int) -> int:
    """The largest number of children whose whole selection takes no more evaluations than are left."""

    def cost(children: int) -> int:
        total = 0
        for stage, survive in enumerate(survivors):
            if children > survive or stage == len(survivors) - 1:
                total += children
                children = min(children, survive)
        return total

    return next(children for children in range(min(offspring, left), 0, -1) if cost(children) <= left)


def _level(sizes: Sizes, target: float, units: Sizes, step: int | None) -> int:
    common = math.lcm(*units.values())
    if step is None:
        return max(int(min(target, 1 - target) / LEVELS * median_low(sizes.values())) // common, 1) * common
    if step < 1 or step % common:
        raise PhoenixError(
            f"sparsify.allocation: a level of {step} weights can't move between layers; use a multiple of {common}"
        )
    return step


def _check_settings(budget: int, offspring: int, survivors: Sequence[int], moves: int) -> None:
    for name, value in {"budget": budget, "offspring": offspring, "moves": moves}.items():
        if value < 1:
            raise PhoenixError(f"sparsify.allocation: evolution with {name} {value}; use 1 or more")
    if not survivors or survivors[-1] != 1 or list(survivors) != sorted(survivors, reverse=True):
        raise PhoenixError(
            f"sparsify.allocation: survivors {list(survivors)} don't lead to one; use falling numbers that end with 1"
        )
