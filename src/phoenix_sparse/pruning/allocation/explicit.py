"""Allocations that people write down: by patterns of layer names, or one value per decoder block."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.allocation.blocks import by_blocks
from phoenix_sparse.pruning.allocation.budget import Allocation, Sizes, drops, spread


def by_pattern(
    names: Iterable[str],
    table: Mapping[str, float],
    target: float,
    sizes: Sizes,
    *,
    units: Sizes | None = None,
) -> Allocation:
    """Give layers the sparsity of the last pattern that matches them; the others share what is left.

    Args:
        names: all layers.
        table: pattern -> sparsity, as in `{"*.o_proj": 0.4, "model.layers.0.*": 0.2}`: `*`, `?` and `[...]`, matched
            against whole names.
        target: share of all weights to drop.
        sizes: weights of each layer.
        units: weights of each layer that go at a time (see `budget.unit`); one without it.

    Returns:
        Sparsities by layer: those of the table as they stand there, one common value for all others.

    Raises:
        PhoenixError: a pattern matches no layer, a value is no sparsity, or what the table fixes can't be made up for.
    """
    names = list(names)
    fixed: Allocation = {}
    for pattern, sparsity in table.items():
        _check_sparsity(sparsity, repr(pattern))
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise PhoenixError(f"sparsify.allocation: {pattern!r} matches no layer{_suggestion(pattern, names)}")
        fixed |= dict.fromkeys(matching, float(sparsity))
    rest = {name: sizes[name] for name in names if name not in fixed}
    if not rest:
        _require_total(fixed, target, sizes, units, "the table")
        return {name: fixed[name] for name in names}
    total = sum(sizes[name] for name in names)
    spent = sum(drops(fixed, sizes, units=units).values())
    share = (target * total - spent) / sum(rest.values())
    # Beyond what rounding to whole weights explains, the others can't make up for the table.
    slack = len(names) / sum(rest.values())
    if not -slack <= share <= 1:
        raise PhoenixError(
            f"sparsify.allocation: the table drops {spent} of {total} weights and the target {target} takes "
            f"{round(target * total)}; the {len(rest)} layers without a pattern would need a sparsity of {share:.4f}"
        )
    share = max(share, 0.0)
    rest_units = None if units is None else {name: units[name] for name in rest}
    shared = spread(dict.fromkeys(rest, share), rest, share, units=rest_units)
    return {name: fixed.get(name, shared.get(name, 0.0)) for name in names}


def by_block(
    names: Iterable[str],
    values: Sequence[float],
    target: float | None = None,
    sizes: Sizes | None = None,
    *,
    units: Sizes | None = None,
) -> Allocation:
    """Give all layers of a decoder block the block's sparsity.

    Args:
        names: all layers.
        values: one sparsity per block, in the order of the blocks' numbers.
        target: what the values have to amount to; without it they speak for themselves.
        sizes: weights of each layer, needed for a target.
        units: as in `by_pattern`.

    Raises:
        PhoenixError: there are more or fewer values than blocks, a value is no sparsity, or they contradict the target.
    """
    blocks = by_blocks(names)
    if len(values) != len(blocks):
        raise PhoenixError(
            f"sparsify.allocation: {len(values)} values for {len(blocks)} decoder blocks; give one value per block"
        )
    for block, value in zip(blocks, values, strict=True):
        _check_sparsity(value, block)
    of_block = dict(zip(blocks, values, strict=True))
    allocation = {name: float(of_block[block]) for block, inside in blocks.items() for name in inside}
    if target is not None:
        if sizes is None:
            raise PhoenixError("sparsify.allocation: a target for values per block needs the layers' sizes")
        _require_total(allocation, target, sizes, units, "the list")
    return allocation


def _require_total(fixed: Allocation, target: float, sizes: Sizes, units: Sizes | None, what: str) -> None:
    total = sum(sizes[name] for name in fixed)
    spent = sum(drops(fixed, sizes, units=units).values())
    slack = sum(1 if units is None else units[name] for name in fixed)
    if abs(spent - target * total) > slack:
        way = "its values, or leave layers out of it to share what is left" if what == "the table" else "its values"
        raise PhoenixError(
            f"sparsify.allocation: {what} fixes every layer and gives a sparsity of {spent / total:.6f} in all, "
            f"not {target}; change {way}, or sparsity"
        )


def _check_sparsity(value: float, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise PhoenixError(f"sparsify.allocation: {where} is given {value!r}; a sparsity is from 0 to below 1")


def _suggestion(pattern: str, names: Sequence[str]) -> str:
    """Layers of one block and patterns that would match, as far as they look like the one given."""
    known = [*(f"*.{name.rpartition('.')[2]}" for name in names), *names]
    known += [
        f"{'.'.join(parts[:end])}.*" for parts in (name.split(".") for name in names) for end in range(1, len(parts))
    ]
    close = difflib.get_close_matches(pattern, dict.fromkeys(known), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(close)}?" if close else f"; layers are called like {names[0]}"
