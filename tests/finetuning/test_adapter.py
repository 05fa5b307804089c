import json

import pytest
import torch
from peft import PeftModel

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.finetuning.adapter import (
    adapter_parameters,
    add_adapter,
    elastic_layers,
    load_adapter,
    save_adapter,
    set_ranks,
    written_out,
)
from phoenix_sparse.finetuning.elastic import draw, spaces, uniform
from phoenix_sparse.models import prunable_linears
from tiny import CONFIGS, pruned

TOKENS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(5))


def adapted(kind="llama", masked=True, rank=4):
    """A model with an adapter that does something: B is drawn, not zero."""
    model, masks = pruned(kind)
    adapter = add_adapter(model, rank=rank, scale=2.0, masks=masks if masked else None, seed=1)
    torch.manual_seed(2)
    for layer in elastic_layers(adapter).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return adapter, masks


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_new_adapter_changes_nothing(kind):
    model, masks = pruned(kind)
    before = logits(model)
    adapter = add_adapter(model, rank=4, scale=2.0, masks=masks, seed=0)
    assert torch.equal(logits(adapter), before)
    assert {n for n, p in adapter.named_parameters() if p.requires_grad} == {
        n for n, _ in adapter.named_parameters() if "lora_" in n
    }


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("masked", [True, False])
def test_logits_are_those_of_the_written_out_weights(kind, masked):
    adapter, masks = adapted(kind, masked)
    names = list(elastic_layers(adapter))
    set_ranks(adapter, draw(spaces(names, (4, 3, 1)), 0, 0))
    plain, _ = pruned(kind)
    with torch.no_grad():
        for name, layer in elastic_layers(adapter).items():
            a, b = layer.lora_A["default"].weight[: layer.rank], layer.lora_B["default"].weight[:, : layer.rank]
            update = 2.0 * (b @ a)
            prunable_linears(plain)[name].weight += update * masks[name] if masked else update
    torch.testing.assert_close(logits(adapter), logits(plain), rtol=1e-4, atol=1e-5)


def test_a_saved_sub_adapter_comes_back(tmp_path):
    adapter, masks = adapted()
    ranks = draw(spaces(elastic_layers(adapter), (4, 2, 1)), 0, 7)
    set_ranks(adapter, ranks)
    save_adapter(adapter, tmp_path / "a", masks)
    model, _ = pruned()
    again = load_adapter(model, tmp_path / "a", masks)
    assert {name: layer.rank for name, layer in elastic_layers(again).items()} == ranks
    assert torch.equal(logits(again), logits(adapter))


def test_stock_peft_loads_a_dense_sub_adapter(tmp_path):
    adapter, _ = adapted(masked=False)
    set_ranks(adapter, draw(spaces(elastic_layers(adapter), (4, 2, 1)), 0, 7))
    save_adapter(adapter, tmp_path / "a", None)
    stock = PeftModel.from_pretrained(pruned()[0], tmp_path / "a")
    torch.testing.assert_close(logits(stock), logits(adapter), rtol=1e-5, atol=1e-5)


def test_other_masks_are_refused(tmp_path):
    adapter, masks = adapted()
    save_adapter(adapter, tmp_path / "a", masks)
    other = {name: ~mask for name, mask in masks.items()}
    with pytest.raises(PhoenixError, match="other masks"):
        load_adapter(pruned()[0], tmp_path / "a", other)
    with pytest.raises(PhoenixError, match="trained through masks"):
        load_adapter(pruned()[0], tmp_path / "a", None)


@pytest.mark.parametrize("record", [{}, [], {"masked": None}, {"masked": True}, {"masked": False, "space": 5}])
def test_a_record_that_says_nothing_is_no_dense_adapter(tmp_path, record):
    adapter, masks = adapted()
    save_adapter(adapter, tmp_path / "a", masks)
    (tmp_path / "a" / "phoenix.json").write_text(json.dumps(record))
    with pytest.raises(PhoenixError, match=r"phoenix.json (does not say|has no)"):
        load_adapter(pruned()[0], tmp_path / "a", masks)


def test_damaged_adapters_are_one_line(tmp_path):
    adapter, masks = adapted()
    save_adapter(adapter, tmp_path / "a", masks)
    file = tmp_path / "a" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PhoenixError, match="can't be loaded"):
        load_adapter(pruned()[0], tmp_path / "a", masks)
    file.write_bytes(whole)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    with pytest.raises(PhoenixError, match="does not fit|can't be loaded"):
        load_adapter(pruned()[0], tmp_path / "a", masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_out_weights_change_nothing(dtype):
    adapter, _ = adapted()
    adapter.get_base_model().to(dtype)
    names = list(elastic_layers(adapter))
    for step in range(2):
        set_ranks(adapter, draw(spaces(names, (4, 3, 1)), 0, step))
        before = logits(adapter)
        with written_out(adapter):
            assert torch.equal(logits(adapter), before)
            assert all(layer.written_out is not None for layer in elastic_layers(adapter).values())
        assert all(layer.written_out is None for layer in elastic_layers(adapter).values())


def test_targets_and_ranks_are_checked():
    model, masks = pruned()
    with pytest.raises(PhoenixError, match="no linear is called w_proj"):
        add_adapter(model, rank=2, scale=1.0, masks=masks, seed=0, targets=("w_proj",))
    adapter = add_adapter(model, rank=2, scale=1.0, masks=masks, seed=0, targets=("q_proj",))
    layers = list(elastic_layers(adapter))
    assert all(name.endswith("q_proj") for name in layers)
    assert len(layers) == 2
    with pytest.raises(PhoenixError, match="rank 3 is outside 1 to 2"):
        set_ranks(adapter, uniform(layers, 3))
    assert adapter_parameters(adapter, uniform(layers, 2)) == 2 * 2 * (32 + 32)


def test_bfloat16_keeps_float32_factors():
    model, masks = pruned()
    adapter = add_adapter(model.to(torch.bfloat16), rank=4, scale=2.0, masks=masks, seed=0)
    assert {p.dtype for n, p in adapter.named_parameters() if "lora_" in n} == {torch.float32}
    loss = adapter(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    assert all(p.grad is not None for n, p in adapter.named_parameters() if "lora_B" in n)
