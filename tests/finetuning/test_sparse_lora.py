"""The four functions for people with a loop of their own."""

import pytest
import torch

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.finetuning.adapter import add_adapter, elastic_layers
from phoenix_sparse.finetuning.sparse_lora import SparseLoRAConfig, apply_sparse_lora
from phoenix_sparse.merging import merge_all_lora_weights, validate_sparsity_preserved
from phoenix_sparse.models import prunable_linears
from tiny import make_model, pruned

TOKENS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(5))
MASKS = pruned()[1]


def trained(config, model=None):
    """A few steps of plain torch."""
    model = apply_sparse_lora(make_model() if model is None else model, MASKS, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(layer.lora_B["default"].weight.any() for layer in elastic_layers(model).values())
    return model


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("modules", ["Linear", ["Linear"], ["q_proj", "up_proj"]])
def test_sparse_to_sparse_keeps_zeros_and_logits(modules):
    model = trained(SparseLoRAConfig(r=4, lora_alpha=8, target_modules=modules, lora_dropout=0.0))
    valid, stats = validate_sparsity_preserved(model, MASKS)
    assert valid
    before = logits(model)
    merged = merge_all_lora_weights(model)
    assert torch.equal(logits(merged), before)
    valid, again = validate_sparsity_preserved(merged, MASKS)
    assert valid
    assert again == stats
    assert again["global"]["sparsity"] == pytest.approx(0.6, abs=0.01)
    assert again["global"]["total_violations"] == 0
    assert again["per_layer"].keys() == MASKS.keys()


@pytest.mark.parametrize("preserve", [True, False])
def test_a_dense_update_is_masked_when_merged_or_said_to_fill_the_zeros(preserve):
    config = SparseLoRAConfig(16, 32, 0.05, ["Linear"], "sparse_to_dense", initial_sparsity=0.6)
    model = trained(config)
    valid, stats = validate_sparsity_preserved(model, MASKS)
    assert not valid  # what a merge without masks would give
    assert stats["global"]["violation_rate"] > 0.9
    valid, stats = validate_sparsity_preserved(merge_all_lora_weights(model, preserve_sparsity=preserve), MASKS)
    assert valid == preserve
    name, layer = next(iter(stats["per_layer"].items()))
    assert layer["total_masked"] == int((~MASKS[name]).sum())
    assert (layer["num_violations"] == 0) == (layer["max_violation"] == 0) == preserve


def test_the_configuration_can_say_that_zeros_need_not_stay():
    model = trained(SparseLoRAConfig(r=2, sparsity_mode="sparse_to_dense", preserve_sparsity_on_merge=False))
    assert not validate_sparsity_preserved(merge_all_lora_weights(model), MASKS)[0]


def test_the_weights_are_masked_first_and_the_scale_is_alpha_over_r():
    model = make_model()
    dense = {name: layer.weight.clone() for name, layer in prunable_linears(model).items()}
    adapted = apply_sparse_lora(model, MASKS, SparseLoRAConfig(r=8, alpha=4))
    for name, layer in elastic_layers(adapted).items():
        assert torch.equal(layer.weight, dense[name] * MASKS[name])
        assert layer.scale == 0.5
        assert torch.equal(layer.mask, MASKS[name])


def test_masks_are_found_by_exact_name():
    first = next(iter(MASKS))
    without = {name: mask for name, mask in MASKS.items() if name != first}
    short = without | {first.removeprefix("model."): MASKS[first]}
    config = SparseLoRAConfig(r=2)
    for masks, words in ((without, f"no mask for {first}"), (short, "is no prunable linear"), ({}, "no mask for")):
        with pytest.raises(PhoenixError, match=words):
            apply_sparse_lora(make_model(), masks, config)
        with pytest.raises(PhoenixError, match=words):
            validate_sparsity_preserved(make_model(), masks)
        with pytest.raises(PhoenixError, match=words):
            validate_sparsity_preserved(apply_sparse_lora(make_model(), MASKS, config), masks)
    with pytest.raises(PhoenixError, match="no linear is called w_proj"):
        apply_sparse_lora(make_model(), MASKS, SparseLoRAConfig(target_modules=["w_proj"]))
    with pytest.raises(PhoenixError, match=r"initial_sparsity: the sparsity is 0.5996, not 0.5"):
        apply_sparse_lora(make_model(), MASKS, SparseLoRAConfig(initial_sparsity=0.5))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"r": 0}, "r is 0"),
        ({"alpha": -1}, "alpha is -1"),
        ({"alpha": 1, "lora_alpha": 2}, "alpha is 1 and lora_alpha is 2; give one"),
        ({"lora_dropout": 1, "sparsity_mode": "sparse_to_dense"}, "dropout is 1"),
        ({"dropout": 0.05}, "use dropout=0"),
        ({"sparsity_mode": "none"}, "use sparse_to_sparse or sparse_to_dense"),
        ({"sparsity_mode": "sparse_to_dense", "maintain_sparsity": True}, "contradicts sparse_to_dense"),
    ],
)
def test_contradictions_are_refused(values, words):
    with pytest.raises(PhoenixError, match=words):
        SparseLoRAConfig(**values)


def test_a_weight_off_its_mask_that_is_no_number_is_no_zero():
    model, name = make_model(), next(iter(MASKS))
    for one, layer in prunable_linears(model).items():
        layer.weight.data.masked_fill_(~MASKS[one], 0)
    assert validate_sparsity_preserved(model, MASKS)[0]
    model.get_submodule(name).weight.data.masked_fill_(~MASKS[name], float("nan"))
    kept, stats = validate_sparsity_preserved(model, MASKS, tolerance=1.0)
    assert not kept
    assert stats["global"]["total_violations"] == int((~MASKS[name]).sum())


def test_there_must_be_something_to_merge_and_something_to_mask_with():
    with pytest.raises(PhoenixError, match="no adapter to merge"):
        merge_all_lora_weights(make_model())
    dense = add_adapter(make_model(), rank=2, scale=1.0, masks=None, seed=0)
    with pytest.raises(PhoenixError, match="the update is dense"):
        merge_all_lora_weights(dense)
