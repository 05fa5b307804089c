from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.allocation.explicit import by_block, by_pattern

KINDS = {"self_attn.q_proj": 1024, "self_attn.o_proj": 1030, "mlp.down_proj": 1537}
SIZES = {f"model.layers.{block}.{kind}": size + block for block in range(12) for kind, size in KINDS.items()}
PATTERNS = ["*.o_proj", "*.q_proj", "model.layers.0.*", "model.layers.1?.*", "*.mlp.*", "model.layers.3.mlp.down_proj"]


def total(allocation, sizes=SIZES):
    return sum(int(sizes[name] * sparsity) for name, sparsity in allocation.items())


@given(st.dictionaries(st.sampled_from(PATTERNS), st.floats(0, 0.9), max_size=5), st.floats(0, 0.9))
def test_the_last_pattern_wins_and_the_others_share_what_is_left(table, target):
    try:
        allocation = by_pattern(SIZES, table, target, SIZES)
    except PhoenixError:
        # Only where even the extremes of the layers without a pattern can't meet the target.
        values = [[v for p, v in table.items() if fnmatchcase(name, p)] for name in SIZES]
        least, most = (
            sum(size * (v[-1] if v else free) for size, v in zip(SIZES.values(), values, strict=True))
            for free in (0, 0.99)
        )
        assert not least <= target * sum(SIZES.values()) - len(SIZES) <= most - 2 * len(SIZES)
        return
    assert abs(total(allocation) - target * sum(SIZES.values())) <= len(SIZES)
    shared = []
    for name, sparsity in allocation.items():
        matching = [value for pattern, value in table.items() if fnmatchcase(name, pattern)]
        if matching:
            assert sparsity == matching[-1]
        else:
            shared.append((sparsity, name))
    assert list(allocation) == list(SIZES)
    if shared:
        assert max(shared)[0] - min(shared)[0] <= 1.5 / min(SIZES[name] for _, name in shared)


def test_an_example_by_hand():
    sizes = {
        "model.layers.0.a": 100,
        "model.layers.0.o_proj": 100,
        "model.layers.1.a": 100,
        "model.layers.1.o_proj": 100,
    }
    allocation = by_pattern(sizes, {"*.o_proj": 0.4, "model.layers.0.*": 0.2}, 0.4, sizes)
    assert allocation == {
        "model.layers.0.a": 0.2,
        "model.layers.0.o_proj": 0.2,
        "model.layers.1.a": 0.8,
        "model.layers.1.o_proj": 0.4,
    }


def test_units_count_as_selection_drops():
    sizes = {"m.0.a": 30 * 7, "m.1.a": 30 * 7, "m.2.b": 11 * 20}
    units = {"m.0.a": 30, "m.1.a": 30, "m.2.b": 11}
    allocation = by_pattern(sizes, {"m.0.*": 0.5}, 0.5, sizes, units=units)
    drop = 30 * int(7 * 0.5) + 30 * int(7 * allocation["m.1.a"]) + 11 * int(20 * allocation["m.2.b"])
    assert abs(drop - 0.5 * sum(sizes.values())) <= 15.5


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("*.o_prj", r"did you mean \*\.o_proj"),
        ("model.layer.0.*", r"did you mean model\.layers\.0\.\*"),
        ("model.layers.3.mlp.down", r"did you mean .*model\.layers\.3\.mlp\.down_proj"),
        ("zzz", "layers are called like model.layers.0.self_attn.q_proj"),
    ],
)
def test_a_pattern_without_a_layer_is_refused_with_a_suggestion(pattern, hint):
    with pytest.raises(PhoenixError, match="matches no layer" + ".*" + hint):
        by_pattern(SIZES, {"*.o_proj": 0.4, pattern: 0.5}, 0.5, SIZES)


def test_a_table_that_fixes_all_must_meet_the_target():
    assert set(by_pattern(SIZES, {"*": 0.5}, 0.5, SIZES).values()) == {0.5}
    with pytest.raises(
        PhoenixError, match=r"the table fixes every layer and gives a sparsity of 0\.399\d+ in all, not 0.5"
    ):
        by_pattern(SIZES, {"*": 0.4}, 0.5, SIZES)


@pytest.mark.parametrize(("value", "need"), [(0.9, "-0.2"), (0.0, "1.2")])
def test_a_table_that_the_others_cannot_make_up_for_is_refused(value, need):
    sizes = {"m.0.a": 1000, "m.1.a": 1000}
    target = {0.9: 0.35, 0.0: 0.6}[value]
    with pytest.raises(PhoenixError, match=f"the 1 layers without a pattern would need a sparsity of {need}"):
        by_pattern(sizes, {"m.0.*": value}, target, sizes)


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan"), "0.5", True, None])
def test_values_that_are_no_sparsity_are_refused(value):
    with pytest.raises(PhoenixError, match=r"'\*.o_proj' is given .*; a sparsity is from 0 to below 1"):
        by_pattern(SIZES, {"*.o_proj": value}, 0.5, SIZES)
    with pytest.raises(PhoenixError, match=r"model.layers.0 is given"):
        by_block(SIZES, [value] * 12)


def test_one_value_per_block():
    values = [0.3 + 0.02 * block for block in range(12)]
    allocation = by_block(sorted(SIZES), values)  # layers.10 sorts before layers.2
    assert set(allocation) == set(SIZES)
    assert all(sparsity == values[int(name.split(".")[2])] for name, sparsity in allocation.items())
    share = sum(SIZES[name] * sparsity for name, sparsity in allocation.items()) / sum(SIZES.values())
    assert by_block(SIZES, values, share, SIZES) == allocation
    with pytest.raises(PhoenixError, match="the list fixes every layer"):
        by_block(SIZES, values, 0.5, SIZES)
    with pytest.raises(PhoenixError, match="11 values for 12 decoder blocks"):
        by_block(SIZES, values[:-1])
    with pytest.raises(PhoenixError, match="needs the layers' sizes"):
        by_block(SIZES, values, 0.5)
