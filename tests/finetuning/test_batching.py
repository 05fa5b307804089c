"""Batches: the same examples an epoch in every way of laying them out, and the same loss."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.finetuning.batching import (
    PackRows,
    first_fit,
    micro_batches,
    require_separate,
    rows_of,
    shares,
    training_order,
)
from phoenix_sparse.finetuning.examples import IGNORED, PadRight
from phoenix_sparse.finetuning.settings import FinetuneSettings
from tiny import CONFIGS, make_model


def settings(**changes):
    return FinetuneSettings(**({"epochs": 1, "batch_size": 4} | changes))


def rows_of_lengths(lengths, prompt=2):
    return [
        {
            "input_ids": [(7 * place + length + start) % 250 for place in range(length)],
            "labels": [IGNORED] * min(prompt, length - 1)
            + [(7 * place + length + start) % 250 for place in range(min(prompt, length - 1), length)],
        }
        for start, length in enumerate(lengths)
    ]


lengths = st.lists(st.integers(2, 40), min_size=1, max_size=60)


@given(lengths, st.integers(1, 9), st.sampled_from(["padded", "grouped", "packed"]), st.integers(0, 3))
def test_every_epoch_is_a_permutation(lengths, batch, batching, seed):
    count = len(lengths)
    chosen = settings(epochs=2.5, batch_size=batch, batching=batching)
    order = training_order(lengths, chosen, seed)
    assert len(order) == -(-5 * count // 2)
    assert sorted(order[:count]) == sorted(order[count : 2 * count]) == list(range(count))
    assert len(set(order[2 * count :])) == len(order) - 2 * count
    assert order == training_order(lengths, chosen, seed)
    assert len(training_order(lengths, settings(max_steps=7, batch_size=batch, batching=batching), seed)) == 7 * batch


def test_another_seed_is_another_order():
    for batching in ("padded", "grouped"):
        chosen = settings(epochs=2, batching=batching)
        one, two = (training_order(list(range(2, 42)), chosen, seed) for seed in (0, 1))
        assert one != two
        assert one[:40] != one[40:]


def test_grouped_batches_have_like_lengths():
    torch.manual_seed(0)
    lengths = torch.randint(2, 300, (403,)).tolist()

    def padding(batching):
        chosen = settings(epochs=2, batch_size=8, batching=batching)
        order = training_order(lengths, chosen, 0)
        steps = [[lengths[index] for index in order[start : start + 8]] for start in range(0, len(order), 8)]
        return sum(max(step) * len(step) - sum(step) for step in steps) / sum(map(sum, steps))

    assert padding("padded") > 0.5
    assert padding("grouped") < 0.1
    # The order of the batches is not that of the lengths.
    order = training_order(lengths, settings(epochs=1, batch_size=8, batching="grouped"), 0)
    means = [sum(lengths[index] for index in order[start : start + 8]) for start in range(0, 400, 8)]
    assert 15 < sum(one < two for one, two in pairwise(means)) < 35


@given(lengths, st.sampled_from([(1, None), (1, 2), (2, 1), (2, None), (4, 1)]), st.sampled_from(["padded", "grouped"]))
def test_micro_batches_hold_every_step_s_examples(lengths, way, batching):
    processes, micro = way
    chosen = settings(batch_size=4, micro_batch_size=micro, batching=batching)
    rows = rows_of_lengths(lengths)
    order = training_order(lengths, chosen, 0)
    found, parts = micro_batches(rows, order, chosen, processes)
    size = micro or 4 // processes
    assert parts * size * processes == 4
    assert len(found) % processes == 0
    for step, start in enumerate(range(0, len(order), 4)):
        here = found[step * parts * processes : (step + 1) * parts * processes]
        scored = [tuple(row["input_ids"]) for one in here for row in one if max(row["labels"]) != IGNORED]
        assert Counter(scored) == Counter(tuple(rows[index]["input_ids"]) for index in order[start : start + 4])
        assert all(len(one) <= size for one in here)


@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(40, 100))
def test_rows_are_packed_whole_and_come_out_again(lengths, width):
    rows = rows_of_lengths(lengths)
    packed = list(first_fit(rows, width))
    assert Counter(str(row) for one in packed for row in one) == Counter(map(str, rows))
    used = [sum(len(row["input_ids"]) for row in one) for one in packed]
    assert max(used) <= width
    assert sum(2 * one <= width for one in used) <= 1  # two such would have gone into one
    for collate in (PackRows(256, width), PadRight(256)):
        again = rows_of(collate(rows))
        expected = [{**row, "labels": [IGNORED, *row["labels"][1:]]} for row in rows]
        got = [{**row, "labels": [IGNORED, *row["labels"][1:]]} for row in again]
        assert Counter(map(str, got)) == Counter(map(str, expected))


@pytest.mark.parametrize("kind", sorted(set(CONFIGS) - {"opt"}))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_examples_have_the_loss_and_the_gradient_that_they_have_alone(kind, checkpointing):
    """In float64; Mistral's sliding window is shorter than the rows."""
    model = make_model(kind).double()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train(checkpointing)
    rows = rows_of_lengths([5, 23, 2, 30, 11, 17, 3, 9])
    tokens = sum(label != IGNORED for row in rows for label in row["labels"][1:])

    def loss_and_gradient(batches):
        model.zero_grad()
        total = 0.0
        for batch in batches:
            loss = model(**batch, use_cache=False, num_items_in_batch=torch.tensor(tokens)).loss
            loss.backward()
            total += loss.item()
        return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    alone, expected = loss_and_gradient([PadRight(256)([row]) for row in rows])
    batch = PackRows(256, 40)(rows)
    assert batch["input_ids"].shape[0] < len(rows)
    for batches in ([batch], [PadRight(256)(rows)], [PackRows(256, 40)(rows[:3]), PackRows(256, 64)(rows[3:])]):
        loss, gradient = loss_and_gradient(batches)
        # The loss itself is computed in float32 by transformers.
        assert loss == pytest.approx(alone, rel=1e-6)
        for name in expected:
            torch.testing.assert_close(gradient[name], expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_looks_across_examples_is_refused(monkeypatch, dtype):
    words = "looks across the examples of a packed row; use grouped or padded"
    for kind in CONFIGS:
        model = make_model(kind).to(dtype)
        if kind == "opt":
            with pytest.raises(PhoenixError, match=words):
                require_separate(model, 256)
        else:
            require_separate(model, 256)
    model = make_model().to(dtype)
    plain = model.forward
    monkeypatch.setattr(model, "forward", lambda position_ids=None, **inputs: plain(**inputs))
    with pytest.raises(PhoenixError, match=words):
        require_separate(model, 256)


def test_the_smallest_shares():
    assert shares(settings(batch_size=1), 1) == (1, 1)
