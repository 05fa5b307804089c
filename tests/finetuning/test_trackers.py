"""Where the training log goes: files that the trackers' own readers read, and clear words where one is missing."""

import pytest

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.finetuning import trackers
from phoenix_sparse.finetuning.adapter import add_adapter
from phoenix_sparse.finetuning.settings import FinetuneSettings
from phoenix_sparse.finetuning.trackers import choose_trackers
from phoenix_sparse.finetuning.trainer import train
from tiny import pruned

ROWS = [{"input_ids": [n, 2, 3, 4], "labels": [-100, 2, 3, 4]} for n in range(8)]


def trained(tmp_path, **changes):
    chosen = FinetuneSettings(ranks=(2,), max_steps=3, batch_size=4, log_every=1, validate_every=2, **changes)
    model, masks = pruned()
    adapted = add_adapter(model, rank=2, scale=2.0, masks=masks, seed=0)
    places = {"work": tmp_path / "work", "logs": tmp_path / "logs"}
    return train(adapted, ROWS, chosen, pad=256, seed=0, validation=ROWS[:2], **places)


def test_tensorboard_unless_said_otherwise(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    record = trained(tmp_path)
    assert record["trackers"] == ["tensorboard"]
    read = events.EventAccumulator(str(tmp_path / "logs"))
    read.Reload()
    assert [one.value for one in read.Scalars("train/loss")] == pytest.approx([e["loss"] for e in record["log"]])
    curve = record["validation"]["curve"]
    assert [one.step for one in read.Scalars("eval/loss")] == [entry["step"] for entry in curve]
    assert [one.value for one in read.Scalars("eval/loss")] == pytest.approx([entry["loss"] for entry in curve])


def test_none_where_none_is_wanted(tmp_path):
    assert trained(tmp_path, trackers=())["trackers"] == []
    assert not (tmp_path / "logs").exists()


def test_the_environment_has_the_last_word(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    trained(tmp_path)
    assert list((tmp_path / "elsewhere").iterdir())
    assert not (tmp_path / "logs").exists()


def test_a_tracker_that_is_not_there_is_named(monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["mlflow"])
    assert choose_trackers(None) == []
    assert choose_trackers(("mlflow",)) == ["mlflow"]
    with pytest.raises(PhoenixError, match=r"finetune\.trackers: wandb is not installed; `pip install wandb`"):
        choose_trackers(("mlflow", "wandb"))
    with pytest.raises(PhoenixError, match=r"finetune\.trackers: 'tensorbord' is unknown; there are .*tensorboard"):
        choose_trackers(("tensorbord",))


def test_places_are_put_back(tmp_path, monkeypatch):
    import os

    monkeypatch.delenv("WANDB_DIR", raising=False)
    with trackers.writing_to(tmp_path / "logs", ["wandb", "mlflow"]):
        assert os.environ["WANDB_DIR"] == str(tmp_path / "logs")
    assert "WANDB_DIR" not in os.environ
