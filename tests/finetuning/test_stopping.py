"""Validation while training: the measured loss, the best weights kept, the stop, and all of it again after a kill."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_json
from phoenix_sparse.finetuning import loop
from phoenix_sparse.finetuning.adapter import add_adapter, elastic_layers, set_ranks
from phoenix_sparse.finetuning.batching import PackRows
from phoenix_sparse.finetuning.elastic import middle, spaces
from phoenix_sparse.finetuning.examples import PadRight
from phoenix_sparse.finetuning.full import train_weights
from phoenix_sparse.finetuning.loop import COMPLETE
from phoenix_sparse.finetuning.memory import AtOnce
from phoenix_sparse.finetuning.settings import FinetuneSettings
from phoenix_sparse.finetuning.stopping import Best, best_step, validation_loss
from phoenix_sparse.finetuning.trained import read_tensors, trained_tensors, write_tensors
from phoenix_sparse.finetuning.trainer import train
from tiny import make_model, pruned

ROWS = [
    {"input_ids": [n % 250, (n * 7) % 250, *range(3, 7 + n % 3)], "labels": [-100, -100, *range(3, 7 + n % 3)]}
    for n in range(24)
]
HELD_OUT = [{"input_ids": [n, 9, 3, 4, n, 6], "labels": [-100, -100, 3, 4, n, 6]} for n in range(30, 37)]


def settings(**changes):
    base = {"ranks": (4, 2, 1), "epochs": 2, "batch_size": 4, "learning_rate": 3e-2, "log_every": 1, "trackers": []}
    return FinetuneSettings(**(base | {"validate_every": 2} | changes))


def made(chosen):
    model, masks = pruned()
    if chosen.method == "full":
        return train_weights(model, masks)
    return add_adapter(model, rank=4, scale=2.0, masks=masks, seed=0)


def trained(work, model=None, **changes):
    chosen = settings(**changes)
    model = model or made(chosen)
    record = train(model, ROWS, chosen, pad=256, seed=0, work=work, validation=HELD_OUT)
    return trained_tensors(model), record


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("collate", [PadRight(256), PackRows(256, 20)])
@pytest.mark.parametrize("examples", [1, 3, 100])
def test_the_loss_is_the_mean_over_completion_tokens(collate, examples):
    model = make_model().train()
    got = validation_loss(model, ROWS, collate, AtOnce(examples), step=0)
    total = tokens = 0.0
    for row in ROWS:
        with torch.no_grad():
            logits = make_model().double()(torch.tensor([row["input_ids"]])).logits[0]
        scores = functional.log_softmax(logits.double(), -1)
        for place, label in enumerate(row["labels"]):
            if label != -100:
                total, tokens = total - scores[place - 1, label].item(), tokens + 1
    assert got == pytest.approx(total / tokens, rel=1e-5)
    assert model.training


def test_processes_share_the_examples():
    model, sums = make_model(), []
    for process in range(2):
        validation_loss(
            *(model, ROWS, PadRight(256), AtOnce(5)), step=0, share=(process, 2), together=lambda x: sums.append(x) or x
        )
    loss, tokens = sum(sums).tolist()
    assert tokens == sum(label != -100 for row in ROWS for label in row["labels"])
    assert loss / tokens == pytest.approx(validation_loss(model, ROWS, PadRight(256), AtOnce(5), step=0))


@given(st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0]), max_size=12), st.integers(1, 4))
def test_patience(tmp_path_factory, losses, patience):
    best, expected, stopped = Best(tmp_path_factory.getbasetemp(), patience), None, None
    for step, loss in enumerate(losses, start=1):
        improved = expected is None or loss < losses[expected - 1]
        assert best.note(step, loss) == improved
        expected = step if improved else expected
        assert best.step == expected
        assert best.exhausted == (step - expected >= patience)
        stopped = stopped or (step if best.exhausted else None)
    assert best_step([]) is None


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_best_weights_are_what_is_left(tmp_path, monkeypatch, method):
    losses, there = [3.0, 1.0, 2.0, 1.0, 5.0, 4.0], []

    def pretend(model, *_args, **_kwargs):
        there.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        return losses[len(there) - 1]

    monkeypatch.setattr(loop, "validation_loss", pretend)
    after, record = trained(tmp_path, method=method)
    assert record["validation"]["best_step"] == 4
    assert not record["validation"]["stopped_early"]
    assert [entry["loss"] for entry in record["validation"]["curve"]] == losses
    assert record["steps"] == record["steps_planned"] == 12
    kept = {name.removeprefix("base_model.model."): value for name, value in after.items()}
    assert same(kept, there[1])
    assert not same(kept, there[-1])


def test_training_stops_where_patience_ends(tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.1, 1.0])
    monkeypatch.setattr(loop, "validation_loss", lambda *_args, **_kwargs: next(losses))
    _, record = trained(tmp_path, patience=2, epochs=4)
    assert record["steps"] == 8
    assert record["steps_planned"] == 24
    assert record["examples"] == 32
    assert record["validation"]["stopped_early"]
    assert record["validation"]["best_step"] == 4


def test_an_elastic_adapter_is_measured_at_its_middle_ranks(tmp_path):
    chosen = settings(max_steps=2)
    model = made(chosen)
    _, record = trained(tmp_path, model, max_steps=2)
    set_ranks(model, middle(spaces(elastic_layers(model), chosen.ranks)))
    expected = validation_loss(model, HELD_OUT, PadRight(256), AtOnce(4), step=2)
    assert record["validation"]["curve"][0]["loss"] == pytest.approx(expected)
    assert record["validation"]["examples"] == len(HELD_OUT)


def test_validation_changes_nothing_but_what_is_kept(tmp_path):
    _, plain = trained(tmp_path / "1", validate_every=None)
    _, measured = trained(tmp_path / "2")
    assert plain["log"] == measured["log"]
    assert plain["validation"] is None


def test_a_last_step_that_no_validation_falls_on_is_validated_too(tmp_path):
    _, record = trained(tmp_path, max_steps=5)
    assert [entry["step"] for entry in record["validation"]["curve"]] == [2, 4, 5]


@pytest.mark.parametrize(("method", "back_to"), [("lora", 3), ("full", 9)])
def test_a_resumed_training_ends_the_same(tmp_path, method, back_to):
    """From each of its checkpoints, with the best weights of before or after it: the same curve and weights."""
    options = {"method": method, "checkpoint_every": 3, "learning_rate": 0.1}
    whole, record = trained(tmp_path / "whole", **options)
    chosen = settings(**options)

    class Killed(Exception):
        pass

    def killed(_what, step, _steps):
        if step == back_to + 2:
            raise Killed

    with pytest.raises(Killed):
        train(
            *(made(chosen), ROWS, chosen),
            **{"pad": 256, "seed": 0, "work": tmp_path / "w", "validation": HELD_OUT, "progress": killed},
        )
    again, resumed = trained(tmp_path / "w", **options)
    assert resumed["resumed_from"] == back_to
    assert same(whole, again)
    assert resumed["validation"] == record["validation"]
    assert len(list((tmp_path / "w").glob("best-*"))) <= 3


def test_a_training_that_had_stopped_is_not_gone_on_with(tmp_path, monkeypatch):
    losses = iter([1.0, 2.0, 3.0, 0.0])
    monkeypatch.setattr(loop, "validation_loss", lambda *_args, **_kwargs: next(losses))
    options = {"patience": 2, "checkpoint_every": 2}
    whole, record = trained(tmp_path, **options)
    assert record["steps"] == 6
    assert (tmp_path / "checkpoint-6" / COMPLETE).is_file()
    again, resumed = trained(tmp_path, **options)
    assert same(whole, again)
    assert resumed["steps"] == 6
    assert resumed["log"] == record["log"]
    assert resumed["validation"] == record["validation"]


def test_best_weights_stay_while_a_checkpoint_has_them_for_its_best(tmp_path):
    best = Best(tmp_path, None)
    for step in (2, 4, 6):
        best.note(step, 10.0 - step)
        (tmp_path / f"best-{step}.safetensors").touch()
    best.forget_others([best.curve[:1]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-2.safetensors", "best-6.safetensors"]


def test_weights_of_another_training_are_refused(tmp_path):
    model = made(settings())
    write_tensors(trained_tensors(model), tmp_path / "best-1.safetensors")
    read_tensors(model, tmp_path / "best-1.safetensors")
    with pytest.raises(PhoenixError, match="holds the weights of another training"):
        read_tensors(made(settings(method="full")), tmp_path / "best-1.safetensors")
    (tmp_path / "best-1.safetensors").write_bytes(b"")
    with pytest.raises(PhoenixError, match="can't be read"):
        read_tensors(model, tmp_path / "best-1.safetensors")


def test_nothing_to_validate_with_is_an_error(tmp_path):
    chosen = settings()
    with pytest.raises(PhoenixError, match="no example to validate with; set task.validation above 0"):
        train(made(chosen), ROWS, chosen, pad=256, seed=0, work=tmp_path)


def test_a_lost_validation_loss_ends_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "validation_loss", lambda *_args, **_kwargs: float("nan"))
    with pytest.raises(PhoenixError, match="the validation loss is nan at step 2; lower finetune.learning_rate"):
        trained(tmp_path)


def test_checkpoints_say_what_a_resumed_training_has_to_know(tmp_path):
    _, record = trained(tmp_path, checkpoint_every=4)
    known = read_json(tmp_path / "checkpoint-8" / COMPLETE)
    assert known == {"step": 8, "halvings": [], "validation": record["validation"]["curve"][:4]}
