from collections import Counter

from phoenix_sparse.finetuning.elastic import draw, median, uniform

LAYERS = [f"layer{n}" for n in range(50)]


def test_a_draw_depends_on_seed_and_step_alone():
    assert draw(LAYERS, (8, 4), 0, 3) == draw(LAYERS, (8, 4), 0, 3)
    assert draw(LAYERS, (8, 4), 0, 3) != draw(LAYERS, (8, 4), 0, 4)
    assert draw(LAYERS, (8, 4), 1, 3) != draw(LAYERS, (8, 4), 0, 3)


def test_ranks_are_drawn_evenly():
    counts = Counter(rank for step in range(200) for rank in draw(LAYERS, (32, 24, 16), 0, step).values())
    assert set(counts) == {32, 24, 16}
    assert max(counts.values()) / min(counts.values()) < 1.1


def test_the_median_is_the_middle():
    assert median((32, 24, 16)) == 24
    assert median((32, 28, 24, 20)) == 24
    assert median((8,)) == 8
    assert uniform(["a", "b"], 4) == {"a": 4, "b": 4}
