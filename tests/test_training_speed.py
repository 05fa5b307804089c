import pytest
import torch

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.finetuning import elastic_linear
from phoenix_sparse.models import load_tokenizer, save_model
from phoenix_sparse.training_speed import measure_training
from tiny import pruned


def options(**changes):
    return {"batches": [1, 2], "length": 6, "repeats": 2, "dtype": "auto", "device": "cpu"} | changes


def test_both_ways_train_and_only_one_of_them_through_the_mask(tmp_path, model_directory, monkeypatch):
    model, masks = pruned()
    save_model(model, load_tokenizer(model_directory), tmp_path / "sparse")
    calls = []
    plain = elastic_linear.masked_linear

    def counted(x, weight, bias, gate, *rest):
        assert torch.equal(gate, weight != 0)
        calls.append(x.shape[0])
        return plain(x, weight, bias, gate, *rest)

    monkeypatch.setattr(elastic_linear, "masked_linear", counted)
    rows = measure_training(tmp_path / "sparse", **options())
    assert [row["batch"] for row in rows] == [1, 2]
    assert calls == [1] * 3 * len(masks) + [2] * 3 * len(masks)  # once to warm up, twice timed
    for row in rows:
        assert row["ratio"] > 0
        assert row["peak_bytes"] == {"dense": None, "masked": None}


def test_a_model_without_zeros_is_refused(model_directory):
    with pytest.raises(PhoenixError, match="has no zeros to train through"):
        measure_training(model_directory, **options())
