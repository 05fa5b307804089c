import pytest
import torch

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.report import bench_tables
from phoenix_sparse.runtime.bench import Pair, Spread, layers, measure, measure_bandwidth, throughput
from phoenix_sparse.runtime.packing import pack_model
from phoenix_sparse.runtime.sparse_linear import SparseLinear
from tiny import make_model, pruned


def test_both_forms_answer_alike_and_take_turns():
    model, masks = pruned()
    pair = Pair(model, "auto")
    ids = torch.tensor([[3, 5, 7]])
    answers = {}
    for form in ("dense", "sparse", "dense"):
        with pair.as_(form) as chosen, torch.no_grad():
            answers.setdefault(form, chosen(ids).logits)
            kind = SparseLinear if form == "sparse" else torch.nn.Linear
            assert sum(isinstance(module, kind) for module in chosen.model.layers.modules()) == len(masks)
    assert torch.allclose(answers["dense"], answers["sparse"], atol=1e-4)
    assert pair.bytes("sparse") < pair.bytes("dense")


def test_throughput_has_every_figure():
    pair = Pair(pruned()[0], "int8")
    rows = throughput(pair, batches=[1, 2], prompt=5, tokens=2, repeats=2)
    assert [row["batch"] for row in rows] == [1, 2]
    for row in rows:
        for phase in ("prefill", "decode"):
            for form in ("dense", "sparse"):
                found = row[phase]["tokens_per_second"][form]
                assert 0 < found["low"] <= found["median"] <= found["high"]
            assert row[phase]["ratio"] > 0
        for form, peak in row["peak_bytes"].items():
            assert peak is None or pair.bytes(form) <= peak < pair.bytes(form) + 2**30


def test_layers_are_measured_by_shape():
    model, masks = pruned()
    rows = layers(Pair(model.to(torch.bfloat16), "auto"), batches=[1], repeats=2)
    assert sum(row["layers"] for row in rows) == len(masks)
    assert set(rows[0]["kinds"]) == {"sparse", "torch bfloat16", "torch float32", "torch int8"}
    for row in rows:
        out, inner = row["shape"]
        assert row["kinds"]["torch bfloat16"]["weight_bytes"] == 2 * out * inner
        assert row["kinds"]["torch int8"]["weight_bytes"] == out * inner
        for found in row["kinds"].values():
            share = found["weight_bytes"] / found["seconds"]["median"] / row["bandwidth"]
            assert found["bandwidth_share"] == pytest.approx(share)


OPTIONS = {"values": "auto", "batches": [1], "repeats": 2, "threads": None, "dtype": "auto", "device": "cpu"}


def test_the_record_of_a_packed_directory(tmp_path):
    pruned()[0].to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    pack_model(tmp_path / "dense", tmp_path / "packed", values="int8")
    record = measure(tmp_path / "packed", prompt=6, tokens=2, with_layers=True, **OPTIONS)
    assert record["values"] == "int8"
    assert record["weight_bytes"]["sparse"] < record["weight_bytes"]["dense"]
    assert len(record["throughput"]) == 1
    texts = [str(column._cells) for table in bench_tables(record) for column in table.columns]
    assert any("torch int8" in text for text in texts)
    with pytest.raises(PhoenixError, match="tokens are more than the model's context of 256"):
        measure(tmp_path / "packed", prompt=250, tokens=10, with_layers=False, **OPTIONS)


def test_a_dense_model_is_refused():
    with pytest.raises(PhoenixError, match="prune it first"):
        Pair(make_model(), "auto")


def test_other_values_of_a_packed_model_are_refused():
    packed = Pair(pruned()[0], "int8").model
    assert Pair(packed, "auto").forms.keys() == {"dense", "sparse"}
    with pytest.raises(PhoenixError, match="packed already"):
        Pair(packed, "bf16")


def test_spread_and_bandwidth():
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert measure_bandwidth(torch.device("cpu"), 2**20) > 0
