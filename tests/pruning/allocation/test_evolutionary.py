import math
import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.allocation.budget import drops, spread
from phoenix_sparse.pruning.allocation.evolutionary import evolve

SIZES = {f"model.layers.{i}.x": (400, 1000, 3600)[i % 3] for i in range(21)}
WANTED = {name: 0.35 + 0.3 * ((7 * i) % 11) / 10 for i, name in enumerate(SIZES)}
OPTIMUM = spread(WANTED, SIZES, 0.5)


def loss(allocation, stage=0):
    """Convex, and least among all allocations of the target at OPTIMUM: the gradient by weight is the same everywhere.

    It is the sum over layers of size · (sparsity − wanted)², which a common shift of `wanted` minimises.
    """
    return sum(SIZES[name] * (sparsity - OPTIMUM[name]) ** 2 for name, sparsity in allocation.items())


def drop(allocation, sizes=SIZES):
    return sum(int(sizes[name] * sparsity) for name, sparsity in allocation.items())


def uniform_loss():
    return loss(dict.fromkeys(SIZES, 0.5))


def random_search(budget, seed):
    generator = random.Random(seed)
    best = uniform_loss()
    for _ in range(budget - 1):
        wanted = {name: 0.5 + generator.uniform(-0.15, 0.15) for name in SIZES}
        best = min(best, loss(spread(wanted, SIZES, 0.5)))
    return best


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_nears_a_known_optimum_and_beats_random_search(seed):
    allocation, history = evolve(SIZES, 0.5, loss, budget=1500, seed=seed, offspring=16)
    assert drop(allocation) == round(0.5 * sum(SIZES.values()))
    assert history[-1].best == loss(allocation)
    assert loss(allocation) < 0.1 * uniform_loss()
    assert loss(allocation) < 0.2 * random_search(1500, seed)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(40, 3000), min_size=2, max_size=9),
    st.floats(0.1, 0.9),
    st.integers(1, 90),
    st.integers(1, 70),
    st.sampled_from([(8, 2, 1), (1,), (5, 1), (4, 4, 1)]),
    st.integers(0, 99),
)
def test_totals_the_budget_and_the_history_are_exact(weights, target, budget, offspring, survivors, seed):
    sizes = {f"l.{i}.x": size for i, size in enumerate(weights)}
    generator, calls, steps = random.Random(seed), [], []
    tastes = {name: generator.random() for name in sizes}

    def fitness(allocation, stage):
        calls.append(stage)
        assert drop(allocation, sizes) == round(target * sum(weights))
        assert all(0 <= sparsity <= 0.99 + 1 / sizes[name] for name, sparsity in allocation.items())
        return sum((sparsity - tastes[name]) ** 2 for name, sparsity in allocation.items())

    allocation, history = evolve(
        sizes,
        target,
        fitness,
        budget=budget,
        seed=seed,
        offspring=offspring,
        survivors=survivors,
        step=3,
        progress=lambda what, done, of: steps.append((done, of)),
    )
    assert len(calls) == budget == history[-1].evaluations
    assert steps == [(done, budget) for done in range(1, budget + 1)]
    assert drop(allocation, sizes) == round(target * sum(weights))
    assert history[0].evaluations == 1
    assert calls[0] == len(survivors) - 1
    assert [entry.generation for entry in history] == list(range(len(history)))
    assert all(later.best <= earlier.best for earlier, later in pairwise(history))
    assert history[-1].best == pytest.approx(sum((s - tastes[n]) ** 2 for n, s in allocation.items()))


def test_a_generation_is_64_then_8_then_2():
    stages = []
    evolve(SIZES, 0.5, lambda a, stage: stages.append(stage) or loss(a), budget=1 + 2 * 74, seed=0)
    assert stages == [2] + 2 * (64 * [0] + 8 * [1] + 2 * [2])


def test_the_parent_stays_unless_a_child_is_better_on_the_most_data():
    def misleading(allocation, stage):
        return loss(allocation) if stage == 2 else -loss(allocation)

    start = dict(OPTIMUM)
    allocation, history = evolve(SIZES, 0.5, misleading, budget=300, seed=0, start=start)
    assert allocation == start
    assert {entry.best for entry in history} == {0.0}


def test_the_same_seed_gives_the_same_result():
    first, again, other = (evolve(SIZES, 0.5, loss, budget=200, seed=seed, offspring=8) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_it_starts_where_it_is_told():
    start = spread({name: 0.5 + 0.01 * i for i, name in enumerate(SIZES)}, SIZES, 0.5)
    seen = []
    evolve(SIZES, 0.5, lambda a, _: seen.append(dict(a)) or 0.0, budget=1, seed=0, start=start)
    assert seen == [start]
    with pytest.raises(PhoenixError, match="the target is 0.6"):
        evolve(SIZES, 0.6, loss, budget=1, seed=0, start=start)


def test_children_move_few_levels():
    parents = Counter()

    def fitness(allocation, stage):
        moved = sum(abs(int(SIZES[n] * s) - SIZES[n] // 2) for n, s in allocation.items())
        assert moved % 20 == 0
        parents[moved // 20] += 1
        return float(moved)  # nothing beats the start

    evolve(SIZES, 0.5, fitness, budget=800, seed=0, step=10)
    assert set(parents) == {0, 1, 2, 3}
    assert parents[1] > parents[3] > 0


def test_rows_stay_whole():
    shapes = {"m.0.a": (6, 50), "m.1.a": (4, 90), "m.2.a": (6, 40)}
    sizes = {name: out * inner for name, (out, inner) in shapes.items()}
    units = {name: out for name, (out, _) in shapes.items()}
    totals = set()

    def fitness(allocation, stage):
        totals.add(sum(drops(allocation, sizes, units=units).values()))
        return allocation["m.0.a"]

    allocation, _ = evolve(sizes, 0.5, fitness, budget=80, seed=0, offspring=8, units=units)
    assert totals == {450}
    assert allocation["m.0.a"] < 0.1


def test_nan_never_wins():
    def fitness(allocation, stage):
        return math.nan if allocation["m.0.a"] < 0.5 else 1 - allocation["m.0.a"]

    allocation, history = evolve({"m.0.a": 500, "m.1.a": 500}, 0.5, fitness, budget=60, seed=0, offspring=6)
    assert allocation["m.0.a"] > 0.7
    assert not math.isnan(history[-1].best)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"budget": 0}, "budget 0"),
        ({"offspring": 0}, "offspring 0"),
        ({"moves": 0}, "moves 0"),
        ({"survivors": (8, 2)}, "survivors"),
        ({"survivors": (2, 8, 1)}, "survivors"),
        ({"survivors": ()}, "survivors"),
        ({"step": 0}, "level of 0"),
        ({"step": 10**6}, "no level of 1000000 weights"),
        ({"units": dict.fromkeys(SIZES, 4), "step": 6}, "multiple of 4"),
    ],
)
def test_refusals(more, message):
    with pytest.raises(PhoenixError, match=message):
        evolve(SIZES, 0.5, loss, **{"budget": 50, "seed": 0} | more)


def test_one_layer_leaves_nothing_to_move():
    assert evolve({"m.0.a": 500}, 0.5, loss_of_one, budget=1, seed=0)[0] == {"m.0.a": 0.5}
    with pytest.raises(PhoenixError, match="can move from one layer to another"):
        evolve({"m.0.a": 500}, 0.5, loss_of_one, budget=9, seed=0)


def loss_of_one(allocation, stage):
    return 1.0
