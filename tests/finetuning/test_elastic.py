from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.finetuning.elastic import (
    draw,
    is_fixed,
    largest,
    median,
    middle,
    sandwich,
    smallest,
    spaces,
    uniform,
)

LAYERS = [f"layer{n}" for n in range(50)]
MODEL = [
    f"model.layers.{block}.{name}"
    for block in range(12)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]


def test_a_draw_depends_on_seed_and_step_alone():
    space = spaces(LAYERS, (8, 4))
    assert draw(space, 0, 3) == draw(space, 0, 3)
    assert draw(space, 0, 3) != draw(space, 0, 4)
    assert draw(space, 1, 3) != draw(space, 0, 3)


def test_ranks_are_drawn_evenly():
    space = spaces(LAYERS, (32, 24, 16))
    counts = Counter(rank for step in range(200) for rank in draw(space, 0, step).values())
    assert set(counts) == {32, 24, 16}
    assert max(counts.values()) / min(counts.values()) < 1.1


def test_the_median_is_the_middle():
    assert median((32, 24, 16)) == 24
    assert median((32, 28, 24, 20)) == 24
    assert median((8,)) == 8
    assert uniform(["a", "b"], 4) == {"a": 4, "b": 4}


def test_a_layer_takes_the_first_pattern_that_fits():
    found = spaces(MODEL, {"q_proj": (32, 16), "model.layers.1.*": (4,), "mlp.*": (8, 24), "*": (5, 3)})
    assert found["model.layers.0.self_attn.q_proj"] == (32, 16)
    assert found["model.layers.1.self_attn.q_proj"] == (32, 16)
    assert found["model.layers.1.mlp.up_proj"] == (4,)
    assert found["model.layers.11.mlp.up_proj"] == (24, 8)
    assert found["model.layers.0.self_attn.o_proj"] == (5, 3)
    assert list(found) == MODEL
    assert spaces(MODEL, found) == found


def test_patterns_begin_at_a_part_of_the_name():
    with pytest.raises(PhoenixError, match=r"'proj' fits no adapted linear; there are down_proj, o_proj, q_proj"):
        spaces(MODEL, {"proj": (2,), "*": (1,)})
    with pytest.raises(PhoenixError, match=r"no ranks for model.layers.0.self_attn.o_proj; give '\*' some"):
        spaces(MODEL, {"q_proj": (2,), "mlp.*": (1,)})


@given(st.dictionaries(st.sampled_from(MODEL), st.sets(st.integers(1, 64), min_size=1), min_size=1), st.integers(0, 99))
def test_every_choice_is_from_the_layer_s_own_ranks(written, step):
    space = spaces(written, {name: tuple(ranks) for name, ranks in written.items()})
    for choice in (largest(space), smallest(space), middle(space), *sandwich(space, 0, step)):
        assert choice.keys() == written.keys()
        assert all(rank in written[name] for name, rank in choice.items())
    assert largest(space) == {name: max(ranks) for name, ranks in written.items()}
    assert smallest(space) == {name: min(ranks) for name, ranks in written.items()}
    assert sandwich(space, 0, step) == [largest(space), smallest(space), draw(space, 0, step)]
    assert is_fixed(space) == all(len(ranks) == 1 for ranks in written.values())
