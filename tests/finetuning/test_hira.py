"""HiRA: the update is W⊙(s·BA), so that the zeros are the weight's own."""

import json

import pytest
import torch
from peft import PeftModel, PeftType

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.finetuning.adapter import (
    add_adapter,
    elastic_layers,
    load_adapter,
    save_adapter,
    set_ranks,
    written_out,
)
from phoenix_sparse.finetuning.elastic import draw, spaces
from phoenix_sparse.finetuning.settings import FinetuneSettings
from phoenix_sparse.finetuning.trainer import train
from phoenix_sparse.masks import require_preserved
from phoenix_sparse.merging import merge
from phoenix_sparse.models import prunable_linears
from phoenix_sparse.recipe import check
from tiny import CONFIGS, pruned

TOKENS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(5))


def adapted(kind="llama", scale_rule="fixed", dtype=torch.float32, scale=3.0):
    model, masks = pruned(kind)
    adapter = add_adapter(
        model.to(dtype), rank=4, scale=scale, masks=masks, seed=1, method="hira", scale_rule=scale_rule
    )
    torch.manual_seed(2)
    for layer in elastic_layers(adapter).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    set_ranks(adapter, draw(spaces(elastic_layers(adapter), (4, 2, 1)), 0, 7))
    return adapter, masks


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_the_written_out_weights(kind):
    adapter, _ = adapted(kind)
    plain, _ = pruned(kind)
    with torch.no_grad():
        for name, layer in elastic_layers(adapter).items():
            a, b = layer.lora_A["default"].weight[: layer.rank], layer.lora_B["default"].weight[:, : layer.rank]
            prunable_linears(plain)[name].weight.mul_(1 + 3.0 * (b @ a))
    torch.testing.assert_close(logits(adapter), logits(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_keeps_every_zero_and_every_logit(dtype):
    adapter, masks = adapted(dtype=dtype)
    assert all(layer.mask is None for layer in elastic_layers(adapter).values())
    before = logits(adapter)
    with written_out(adapter):
        assert torch.equal(logits(adapter), before)
    merged = merge(adapter)
    require_preserved(masks, prunable_linears(merged), "merged")
    assert torch.equal(logits(merged), before)


@pytest.mark.parametrize("scale_rule", ["fixed", "alpha_over_rank"])
def test_a_saved_sub_adapter_comes_back(tmp_path, scale_rule):
    adapter, masks = adapted(scale_rule=scale_rule)
    save_adapter(adapter, tmp_path / "a", masks)
    assert "note" not in json.loads((tmp_path / "a" / "phoenix.json").read_text())
    again = load_adapter(pruned()[0], tmp_path / "a", masks)
    assert torch.equal(logits(again), logits(adapter))
    with pytest.raises(PhoenixError, match="other masks"):
        load_adapter(pruned()[0], tmp_path / "a", {name: ~mask for name, mask in masks.items()})


@pytest.mark.parametrize("scale_rule", ["fixed", "alpha_over_rank"])
def test_a_super_adapter_comes_back_with_its_rule(tmp_path, scale_rule):
    adapter, masks = adapted(scale_rule=scale_rule)
    layers = elastic_layers(adapter)
    set_ranks(adapter, dict.fromkeys(layers, 4))
    save_adapter(adapter, tmp_path / "a", masks, (4, 2))
    again = load_adapter(pruned()[0], tmp_path / "a", masks)
    for model in (adapter, again):
        set_ranks(model, draw(spaces(layers, (4, 2)), 0, 3))
    torch.testing.assert_close(logits(again), logits(adapter), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not hasattr(PeftType, "HIRA"), reason="this PEFT has no HiRA")
@pytest.mark.parametrize("scale_rule", ["fixed", "alpha_over_rank"])
def test_stock_peft_loads_it_whole(tmp_path, scale_rule):
    adapter, masks = adapted(scale_rule=scale_rule)
    save_adapter(adapter, tmp_path / "a", masks)
    stock = PeftModel.from_pretrained(pruned()[0], tmp_path / "a")
    torch.testing.assert_close(logits(stock), logits(adapter), rtol=1e-5, atol=1e-5)
    merged = stock.merge_and_unload()
    require_preserved(masks, prunable_linears(merged), "stock PEFT's merge")


def test_a_record_and_a_configuration_that_disagree_are_refused(tmp_path):
    adapter, masks = adapted()
    save_adapter(adapter, tmp_path / "a", masks)
    record = tmp_path / "a" / "phoenix.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"method": "lora"}))
    with pytest.raises(PhoenixError, match=r"adapter_config.json says HIRA and phoenix.json lora"):
        load_adapter(pruned()[0], tmp_path / "a", masks)
    record.write_text(json.dumps(json.loads(record.read_text()) | {"method": "dora"}))
    with pytest.raises(PhoenixError, match="no known method"):
        load_adapter(pruned()[0], tmp_path / "a", masks)


def test_it_trains(tmp_path):
    rows = [{"input_ids": [n % 250, (n * 7) % 250, 3, 4, 5, 6], "labels": [-100, -100, 3, 4, 5, 6]} for n in range(24)]
    settings = FinetuneSettings(
        method="hira", ranks=(4, 2), scale=8.0, epochs=4, batch_size=4, learning_rate=5e-2, log_every=1
    )
    model, masks = pruned()
    adapter = add_adapter(model, rank=4, scale=8.0, masks=masks, seed=0, method="hira")
    record = train(adapter, rows, settings, pad=256, seed=0, work=tmp_path)
    losses = [entry["loss"] for entry in record["log"]]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert record["method"] == "hira"
    require_preserved(masks, prunable_linears(merge(adapter)), "merged")


def test_what_does_not_go_with_it():
    with pytest.raises(PhoenixError, match=r"method: hira multiplies W and keeps its zeros; it goes with mode: sparse"):
        check(FinetuneSettings, {"method": "hira", "mode": "sparse_to_dense"}, "test")
    with pytest.raises(PhoenixError, match="dropout"):
        add_adapter(pruned()[0], rank=2, scale=1.0, masks=None, seed=0, dropout=0.1, method="hira")
