"""Meet the target exactly: sparsities whose drop counts, as selection makes them, add up to the share asked for.

Selection drops int(groups · sparsity) groups of a layer. A group is one weight, or one block for blocks. How many
weights go at a time is a layer's unit; without units it is one.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.patterns import Pattern

Allocation = dict[str, float]
Sizes = Mapping[str, int]

HIGH = 0.99
"""The highest sparsity that a layer is given, so that none dies."""


def unit(pattern: Pattern) -> int:
    """How many weights selection drops at a time.

    Raises:
        PhoenixError: the pattern has its own sparsity (N:M), or doesn't drop single weights or blocks (structured).
    """
    if pattern.kind not in ("unstructured", "block"):
        raise PhoenixError(
            f"sparsify.allocation: the pattern {pattern} can't be shared out among layers; use unstructured or blocks"
        )
    return pattern.first * pattern.second


def spread(
    wanted: Mapping[str, float],
    sizes: Sizes,
    target: float,
    *,
    low: float = 0.0,
    high: float = HIGH,
    units: Sizes | None = None,
) -> Allocation:
    """Shift wanted sparsities by one common amount, within bounds, until they meet the target.

    Args:
        wanted: by layer; any finite numbers, only their differences count.
        sizes: weights of each layer.
        target: share of all weights to drop, 0 to 1.
        low: lowest sparsity of a layer.
        high: highest sparsity of a layer.
        units: weights of each layer that go at a time (see `unit`); one without it.

    Returns:
        Sparsities for which the drops add up to the nearest whole number to target · all weights (with units, to
        within half the largest one). Rounding moves a layer by less than one unit.

    Raises:
        PhoenixError: names don't match, a number is out of its range, or the bounds rule the target out.
    """
    units = dict.fromkeys(sizes, 1) if units is None else units
    _check(wanted, sizes, target, low, high, units)
    groups = {name: sizes[name] // units[name] for name in wanted}
    # Rounding errors of the products must not cost a group.
    most = {name: math.floor(high * count + 1e-9) for name, count in groups.items()}
    least = {name: min(math.ceil(low * count - 1e-9), most[name]) for name, count in groups.items()}
    fewest, greatest = (sum(bound[name] * units[name] for name in sizes) for bound in (least, most))
    share = _feasible(target * sum(sizes.values()), fewest, greatest, sizes, units, target)
    bottom = {name: least[name] / groups[name] for name in wanted}
    top = {name: most[name] / groups[name] for name in wanted}
    shift = _shift(wanted, sizes, bottom, top, share)
    exact = {name: groups[name] * min(max(wanted[name] + shift, bottom[name]), top[name]) for name in wanted}
    floors = {name: min(max(math.floor(exact[name]), least[name]), most[name]) for name in wanted}
    missing = round(share) - sum(floors[name] * units[name] for name in wanted)
    # Largest remainder first; a whole unit goes only where that comes closer to the target than leaving it.
    for name in sorted(wanted, key=lambda name: floors[name] - exact[name]):
        if missing > 0 and 2 * missing >= units[name] and floors[name] < most[name]:
            floors[name] += 1
            missing -= units[name]
    return {name: sparsity_of(floors[name], groups[name]) for name in wanted}


def uniform(sizes: Sizes, target: float, *, units: Sizes | None = None) -> Allocation:
    """The same sparsity for all layers, up to the rounding that meets the target."""
    return spread(dict.fromkeys(sizes, target), sizes, target, high=max(HIGH, target), units=units)


def counts(
    allocation: Mapping[str, float], sizes: Sizes, target: float, *, units: Sizes | None = None
) -> dict[str, int]:
    """Whole numbers of weights to drop, by largest remainder, that add up to the target as `spread` says.

    Raises:
        PhoenixError: the allocation is off the target by more than one unit a layer, or `spread` refuses it.
    """
    units = dict.fromkeys(sizes, 1) if units is None else units
    _check(allocation, sizes, target, 0.0, 1.0, units)
    if any(not 0 <= sparsity <= 1 for sparsity in allocation.values()):
        raise PhoenixError("sparsify.allocation: a layer's sparsity is not between 0 and 1")
    total = math.fsum(allocation[name] * sizes[name] for name in allocation)
    if abs(total - target * sum(sizes.values())) > sum(units.values()):
        raise PhoenixError(
            f"sparsify.allocation: the layers' sparsities give {total / sum(sizes.values()):.6f} in all, "
            f"and the target is {target}; share them out with that target"
        )
    return drops(spread(allocation, sizes, target, high=1.0, units=units), sizes, units=units)


def drops(allocation: Mapping[str, float], sizes: Sizes, *, units: Sizes | None = None) -> dict[str, int]:
    """The weights that selection will drop in each layer: unit · int(size / unit · sparsity)."""
    units = dict.fromkeys(sizes, 1) if units is None else units
    return {name: units[name] * int(sizes[name] // units[name] * sparsity) for name, sparsity in allocation.items()}


def sparsity_of(drop: int, groups: int) -> float:
    """A sparsity whose int(groups · sparsity) is `drop`; drop / groups itself may fall one short."""
    sparsity = drop / groups
    while int(groups * sparsity) < drop:
        sparsity = math.nextafter(sparsity, 2.0)
    return sparsity


def _shift(
    wanted: Mapping[str, float], sizes: Sizes, bottom: Mapping[str, float], top: Mapping[str, float], share: float
) -> float:
    """The amount at which the clipped sparsities drop `share` weights: their total is linear between its kinks."""

    def total(shift: float) -> float:
        return math.fsum(sizes[name] * min(max(wanted[name] + shift, bottom[name]), top[name]) for name in wanted)

    kinks = sorted({bound[name] - wanted[name] for bound in (bottom, top) for name in wanted})
    index = max(bisect_right(kinks, share, key=total) - 1, 0)
    here = kinks[index]
    if index + 1 == len(kinks):
        return here
    middle = (here + kinks[index + 1]) / 2
    slope = sum(sizes[name] for name in wanted if bottom[name] < wanted[name] + middle < top[name])
    return here + (share - total(here)) / slope if slope else here


def _feasible(share: float, fewest: int, greatest: int, sizes: Sizes, units: Sizes, target: float) -> float:
    """The share of weights to drop; bounds that whole groups can't meet exactly may cost up to one unit a layer."""
    total, slack = sum(sizes.values()), sum(units.values())
    if not fewest - slack <= share <= greatest + slack:
        raise PhoenixError(
            f"sparsify.allocation: a sparsity of {target} in all can't be reached within the layers' bounds, "
            f"which allow {fewest / total:.4f} to {greatest / total:.4f}; change the target or the bounds"
        )
    return min(max(share, fewest), greatest)


def _check(wanted: Mapping[str, float], sizes: Sizes, target: float, low: float, high: float, units: Sizes) -> None:
    where = "sparsify.allocation"
    if not sizes:
        raise PhoenixError(f"{where}: there are no layers to share the sparsity out among")
    if different := sorted(wanted.keys() ^ sizes.keys()) or sorted(units.keys() ^ sizes.keys()):
        raise PhoenixError(f"{where}: the layers with a sparsity and those with a size differ, in {different[0]} first")
    if not 0 <= target <= 1:
        raise PhoenixError(f"{where}: the target {target} is no share; use 0 to 1")
    if not 0 <= low <= high <= 1:
        raise PhoenixError(f"{where}: the bounds {low} and {high} are not in order between 0 and 1")
    for name, size in sizes.items():
        if size < 1 or units[name] < 1 or size % units[name]:
            raise PhoenixError(f"{where}: {name} has {size} weights, which can't go {units[name]} at a time")
        if not math.isfinite(wanted[name]):
            raise PhoenixError(f"{where}: {name} is to have a sparsity of {wanted[name]}; it must be a finite number")
