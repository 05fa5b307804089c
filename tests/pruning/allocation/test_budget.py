import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.allocation.blocks import block_of, by_blocks
from phoenix_sparse.pruning.allocation.budget import counts, drops, sparsity_of, spread, uniform, unit
from phoenix_sparse.pruning.patterns import STRUCTURED, UNSTRUCTURED, parse_pattern
from phoenix_sparse.pruning.selection import keep

sizes = st.lists(st.integers(1, 5000), min_size=1, max_size=12).map(lambda s: {f"l.{i}.x": n for i, n in enumerate(s)})
shares = st.floats(0, 1)


@st.composite
def problems(draw):
    layers = draw(sizes)
    return {name: draw(st.floats(-1, 2)) for name in layers}, layers


def dropped(allocation, layers):
    """As selection.py counts."""
    return {name: int(layers[name] * sparsity) for name, sparsity in allocation.items()}


def bisected(wanted, layers, target, low, high):
    """The common shift by plain bisection, in float64."""
    least, most = -4.0, 4.0
    for _ in range(200):
        middle = (least + most) / 2
        total = sum(layers[n] * min(max(wanted[n] + middle, low), high) for n in wanted)
        least, most = (middle, most) if total < target * sum(layers.values()) else (least, middle)
    return {n: min(max(wanted[n] + most, low), high) for n in wanted}


@given(problems(), shares)
@example(({"l.0.x": 0.3, "l.1.x": 0.3}, {"l.0.x": 10, "l.1.x": 100}), 0.29)
def test_the_total_is_met_exactly_and_the_shift_is_common(problem, target):
    wanted, layers = problem
    allocation = spread(wanted, layers, target, high=1.0)
    assert sum(dropped(allocation, layers).values()) == round(target * sum(layers.values()))
    reference = bisected(wanted, layers, target, 0.0, 1.0)
    for name in layers:
        assert 0 <= allocation[name] <= 1
        assert abs(allocation[name] - reference[name]) < 1.001 / layers[name]


@given(problems(), shares, st.tuples(shares, shares).map(sorted))
def test_bounds_are_kept_and_what_they_rule_out_is_refused(problem, target, bounds):
    wanted, layers = problem
    low, high = bounds
    total = sum(layers.values())
    try:
        allocation = spread(wanted, layers, target, low=low, high=high)
    except PhoenixError:
        assert not low <= target <= high
        return
    assert abs(sum(dropped(allocation, layers).values()) - target * total) <= 2 * len(layers)
    for name, sparsity in allocation.items():
        assert low - 1 / layers[name] <= sparsity <= high + 1e-9


@given(problems(), st.floats(0, 0.9))
def test_totals_are_within_a_weight_a_layer_below_the_highest_sparsity(problem, target):
    wanted, layers = problem
    drop = sum(dropped(spread(wanted, layers, target), layers).values())
    assert abs(drop - target * sum(layers.values())) <= len(layers)


@given(problems(), shares, shares)
def test_more_wanted_or_more_target_is_never_less(problem, one, other):
    wanted, layers = problem
    lower, higher = (dropped(spread(wanted, layers, t, high=1.0), layers) for t in sorted((one, other)))
    assert all(lower[name] <= higher[name] + 1 for name in layers)
    same = dict.fromkeys(layers, 1000)
    drop = dropped(spread(wanted, same, one, high=1.0), same)
    order = sorted(wanted, key=wanted.__getitem__)
    assert all(drop[a] <= drop[b] + 1 for a, b in pairwise(order))


large = st.lists(st.integers(1000, 9000), min_size=1, max_size=12)


@given(large.map(lambda s: {f"l.{i}.x": n for i, n in enumerate(s)}), st.floats(0, 0.98))
def test_equal_wishes_give_equal_sparsities(layers, target):
    for name, sparsity in uniform(layers, target).items():
        assert abs(sparsity - target) <= 1.001 / layers[name]


def test_what_needs_no_rounding_is_not_rounded():
    layers = {"l.0.q": 4096 * 4096, "l.0.k": 1024 * 4096, "l.0.down": 4096 * 14336}
    assert uniform(layers, 0.5) == dict.fromkeys(layers, 0.5)
    units = {"l.0.q": 4096, "l.0.k": 1024, "l.0.down": 4096}
    assert uniform(layers, 0.5, units=units) == dict.fromkeys(layers, 0.5)


shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=8)


@given(shapes, shares, st.integers(0, 99))
def test_with_units_rows_and_blocks_meet_the_total_as_near_as_whole_units_can(shapes, target, seed):
    generator = torch.Generator().manual_seed(seed)
    for pattern, group, factor in [
        (UNSTRUCTURED, "row", (1, 1)),
        (parse_pattern("2x3"), "row", (2, 3)),
        (parse_pattern("2x3"), "layer", (2, 3)),
        (parse_pattern("1x4"), "row", (1, 4)),
        (UNSTRUCTURED, "layer", (1, 1)),
    ]:
        matrices = {
            f"l.{i}.x": torch.rand(out * factor[0], inner * factor[1], generator=generator)
            for i, (out, inner) in enumerate(shapes)
        }
        layers = {name: matrix.numel() for name, matrix in matrices.items()}
        units = dict.fromkeys(matrices, unit(pattern))
        wanted = dict(zip(layers, torch.rand(len(layers), generator=generator).tolist(), strict=True))
        allocation = spread(wanted, layers, target, high=1.0, units=units)
        real = {
            name: int((~keep(matrix, allocation[name], group, pattern, exact=True)).sum())
            for name, matrix in matrices.items()
        }
        assert real == drops(allocation, layers, units=units)
        assert abs(sum(real.values()) - target * sum(layers.values())) <= max(units.values()) / 2 + 0.5


@given(st.integers(1, 10**9), st.data())
def test_a_share_gives_back_its_count(groups, data):
    drop = data.draw(st.integers(0, groups))
    assert int(groups * sparsity_of(drop, groups)) == drop


@given(problems(), shares)
def test_counts_of_an_allocation_are_its_own(problem, target):
    wanted, layers = problem
    allocation = spread(wanted, layers, target, high=1.0)
    assert counts(allocation, layers, target) == dropped(allocation, layers)


@given(sizes, st.floats(0.01, 0.98))
def test_counts_round_by_largest_remainder(layers, target):
    found = counts(dict.fromkeys(layers, target), layers, target)
    assert sum(found.values()) == round(target * sum(layers.values()))
    assert all(abs(found[name] - target * layers[name]) < 1.001 for name in layers)
    up = [target * layers[n] % 1 for n in layers if found[n] > target * layers[n] + 1e-6]
    down = [target * layers[n] % 1 for n in layers if found[n] < target * layers[n] - 1e-6]
    assume(up and down)
    assert min(up) >= max(down) - 1e-6


def test_counts_refuses_an_allocation_of_another_target():
    with pytest.raises(PhoenixError, match=r"give 0\.5000.* in all, and the target is 0\.6"):
        counts({"l.0.x": 0.5}, {"l.0.x": 100}, 0.6)


@pytest.mark.parametrize(
    ("wanted", "layers", "target", "more", "message"),
    [
        ({}, {}, 0.5, {}, "no layers"),
        ({"a": 0.5}, {"b": 4}, 0.5, {}, "a first"),
        ({"a": math.nan}, {"a": 4}, 0.5, {}, "finite"),
        ({"a": 0.5}, {"a": 0}, 0.5, {}, "a has 0 weights"),
        ({"a": 0.5}, {"a": 4}, 1.5, {}, "target 1.5"),
        ({"a": 0.5}, {"a": 4}, math.nan, {}, "target nan"),
        ({"a": 0.5}, {"a": 4}, 0.5, {"low": 0.6, "high": 0.4}, "not in order"),
        ({"a": 0.5}, {"a": 400}, 0.5, {"low": 0.6}, "0.6000 to 0.9900"),
        ({"a": 0.5}, {"a": 400}, 1.0, {}, "can't be reached"),
        ({"a": 0.5}, {"a": 10}, 0.5, {"units": {"a": 3}}, "3 at a time"),
        ({"a": 0.5}, {"a": 10}, 0.5, {"units": {"b": 1}}, "a first"),
    ],
)
def test_refusals(wanted, layers, target, more, message):
    with pytest.raises(PhoenixError, match=message):
        spread(wanted, layers, target, **more)


@pytest.mark.parametrize("pattern", [parse_pattern("2:4"), STRUCTURED])
def test_patterns_without_a_free_sparsity_are_refused(pattern):
    with pytest.raises(PhoenixError, match="can't be shared out"):
        unit(pattern)


def test_blocks_come_in_the_order_of_their_numbers():
    names = [f"model.layers.{i}.mlp.up_proj" for i in (10, 2, 0)] + ["model.layers.2.mlp.experts.7.w1"]
    assert list(by_blocks(names)) == ["model.layers.0", "model.layers.2", "model.layers.10"]
    assert by_blocks(names)["model.layers.2"] == [names[1], names[3]]
    assert block_of("model.decoder.layers.11.fc1") == "model.decoder.layers.11"
    with pytest.raises(PhoenixError, match="lm_head names no decoder block"):
        block_of("lm_head")
