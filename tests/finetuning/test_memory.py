"""A full memory is answered by fewer examples at once, and the step stays the same."""

import pytest
import torch

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.finetuning.adapter import add_adapter
from phoenix_sparse.finetuning.full import train_weights
from phoenix_sparse.finetuning.memory import AtOnce, is_full
from phoenix_sparse.finetuning.settings import FinetuneSettings
from phoenix_sparse.finetuning.trained import trained_tensors
from phoenix_sparse.finetuning.trainer import train
from tiny import make_model, pruned

ROWS = [
    {"input_ids": [n % 250, (n * 7) % 250, *range(3, 5 + n % 6)], "labels": [-100, -100, *range(3, 5 + n % 6)]}
    for n in range(24)
]


class Device:
    """A device with room for so many examples (or packed tokens) at once, which fails in the backward pass."""

    def __init__(self, monkeypatch, model, room, from_step=0, packed=False):
        self.room, self.packed, self.sizes, self.steps = room, packed, [], 0
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        embeddings = plain.get_input_embeddings()
        embeddings.register_forward_pre_hook(self.see)
        self.from_step, self.in_training = from_step, plain
        last = plain.model.layers[0].mlp.down_proj
        last.register_full_backward_hook(self.fail)

    def see(self, module, inputs):
        self.sizes.append(inputs[0].numel() if self.packed else inputs[0].shape[0])

    def fail(self, *_):
        self.steps += 1
        if self.steps > self.from_step and self.sizes[-1] > self.room:
            raise torch.OutOfMemoryError("the memory is full, they say")


def made(method):
    model, masks = pruned()
    return train_weights(model, masks) if method == "full" else add_adapter(model, rank=4, scale=2, masks=masks, seed=0)


def run(work, monkeypatch=None, room=None, method="lora", from_step=0, **changes):
    base = {"ranks": (4, 2), "max_steps": 4, "batch_size": 8, "learning_rate": 1e-2, "log_every": 1, "trackers": []}
    chosen = FinetuneSettings(**(base | {"method": method} | changes))
    model = made(method)
    teacher = make_model(seed=3) if chosen.distill is not None else None
    packed = chosen.batching == "packed"
    device = Device(monkeypatch, model, room, from_step, packed) if room is not None else None
    record = train(model, ROWS, chosen, pad=256, seed=0, work=work, validation=ROWS[:3], teacher=teacher)
    return trained_tensors(model), record, device


def close(one, two):
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("lora", {}),
        ("lora", {"sampling": "sandwich", "micro_batch_size": 4}),
        ("lora", {"batching": "packed"}),
        ("full", {"batching": "grouped"}),
        ("lora", {"distill": {"hidden": 0.5}, "micro_batch_size": 4}),
    ],
)
def test_the_same_weights_with_fewer_examples_at_once(tmp_path, monkeypatch, method, changes):
    room = 30 if changes.get("batching") == "packed" else 2
    calm, before, _ = run(tmp_path / "1", method=method, **changes)
    after, record, device = run(tmp_path / "2", monkeypatch, room, method, **changes)
    sizes = [entry["micro_batch_size"] for entry in record["out_of_memory"]]
    started = changes.get("micro_batch_size", 8)
    assert sizes == [size for size in (4, 2, 1) if size < started][: len(sizes)]
    assert sizes
    assert {entry["step"] for entry in record["out_of_memory"]} <= {0, 1, 2, 3}
    assert record["micro_batch_size"] == sizes[-1]
    assert before["out_of_memory"] == []
    assert max(device.sizes[-3:]) <= room
    close(calm, after)
    for name in ["loss", *(["loss_task", "loss_logits", "loss_hidden"] if "distill" in changes else [])]:
        assert [entry[name] for entry in record["log"]] == pytest.approx([e[name] for e in before["log"]], rel=1e-3)


def test_in_the_middle_of_a_step_of_several_micro_batches(tmp_path, monkeypatch):
    """The gradient of the parts before is not counted twice."""
    calm, _, _ = run(tmp_path / "1", micro_batch_size=4)
    after, record, _ = run(tmp_path / "2", monkeypatch, 2, from_step=3, micro_batch_size=4)
    assert record["out_of_memory"] == [{"step": 1, "micro_batch_size": 2}]
    close(calm, after)


def test_one_example_that_does_not_fit_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(PhoenixError, match=r"full with one example of \d+ tokens .*gradient_checkpointing=true"):
        run(tmp_path, monkeypatch, 0)


def test_validation_halves_as_well(tmp_path, monkeypatch):
    import phoenix_sparse.finetuning.stopping as stopping

    plain, sizes = stopping.completion_loss, []

    def fail(model, batch):
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("full")
        return plain(model, batch)

    calm, before, _ = run(tmp_path / "1", validate_every=2)
    monkeypatch.setattr(stopping, "completion_loss", fail)
    after, record, _ = run(tmp_path / "2", validate_every=2)
    assert record["out_of_memory"] == [{"step": 2, "micro_batch_size": 4}, {"step": 2, "micro_batch_size": 2}]
    assert max(sizes[-2:]) <= 2
    close(calm, after)
    for one, two in zip(before["validation"]["curve"], record["validation"]["curve"], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


def test_a_resumed_training_begins_with_what_fitted(tmp_path, monkeypatch):
    whole, _, _ = run(tmp_path / "whole", monkeypatch, 2, max_steps=4, checkpoint_every=2)

    class Killed(Exception):
        pass

    chosen = FinetuneSettings(
        **{"ranks": (4, 2), "max_steps": 4, "batch_size": 8, "learning_rate": 1e-2, "log_every": 1, "trackers": []},
        checkpoint_every=2,
    )
    model = made("lora")
    Device(monkeypatch, model, 2)

    def killed(_what, step, _steps):
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        train(model, ROWS, chosen, pad=256, seed=0, work=tmp_path / "w", progress=killed)
    after, record, device = run(tmp_path / "w", monkeypatch, 2, max_steps=4, checkpoint_every=2)
    assert max(device.sizes) <= 2
    assert [entry["step"] for entry in record["out_of_memory"]] == [0, 0]
    assert all(torch.equal(whole[name], after[name]) for name in whole)


def test_other_errors_come_through(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr("transformers.Trainer.training_step", fail)
    with pytest.raises(RuntimeError, match="something else"):
        run(tmp_path)
    assert not is_full(RuntimeError("something else"))
    assert is_full(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1"))


def test_several_processes_are_told_what_to_set():
    with pytest.raises(PhoenixError, match=r"one of 2 processes is full with 8 examples at once; set it to 4 or less"):
        AtOnce(8).halve(3, 100, processes=2)
