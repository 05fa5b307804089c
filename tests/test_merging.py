from pathlib import Path

import pytest
import torch

from phoenix_sparse import merging
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.finetuning.adapter import add_adapter, elastic_layers, save_adapter, set_ranks
from phoenix_sparse.finetuning.elastic import draw, spaces
from phoenix_sparse.masks import inspect, require_preserved
from phoenix_sparse.models import prunable_linears, save_model
from phoenix_sparse.pruning.initialise import prune
from phoenix_sparse.pruning.settings import SparsifySettings
from tiny import CONFIGS, make_model

TEXTS = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 10, 11]]


def trained(kind, dtype, masked=True):
    model = make_model(kind).to(dtype)
    masks = prune(model, SparsifySettings(importance="magnitude", sparsity=0.6), tokens=None, seed=0)
    adapter = add_adapter(model, rank=4, scale=2.0, masks=masks if masked else None, seed=1)
    torch.manual_seed(3)
    for layer in elastic_layers(adapter).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    set_ranks(adapter, draw(spaces(elastic_layers(adapter), (4, 2)), 0, 0))
    return adapter, masks


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_masked_merge_keeps_zeros_and_logits(kind, dtype):
    adapter, masks = trained(kind, dtype)
    before = merging.sample_logits(adapter, TEXTS, 256)
    merged = merging.merge(adapter)
    require_preserved(masks, prunable_linears(merged), "merged")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    after = merging.sample_logits(merged, TEXTS, 256)
    assert [tuple(logits.shape) for logits in after] == [(len(row), 257) for row in TEXTS]
    # The adapter computes with the very weights that are merged, in bfloat16, too.
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


def test_a_dense_merge_fills_zeros_and_remasking_costs(tmp_path, tokenizer):
    reports = {}
    for remask in (False, True):
        adapter, masks = trained("llama", torch.float32, masked=False)
        before = merging.sample_logits(adapter, TEXTS, 256)
        save_adapter(adapter, tmp_path / "adapter", None)
        merged = merging.merge(adapter, remask=masks if remask else None)
        save_model(merged, tokenizer, tmp_path / "merged")
        reports[remask] = merging.certify(
            merged,
            masks,
            before=before,
            after=merging.sample_logits(merged, TEXTS, 256),
            mode="sparse_to_dense",
            adapter=tmp_path / "adapter",
            merged=tmp_path / "merged",
        )
    assert reports[False]["off_mask_nonzeros"] > 0
    assert reports[False]["sparsity"] < 0.01
    assert reports[False]["max_abs_logit_difference"] < 1e-3
    assert reports[True]["off_mask_nonzeros"] == 0
    assert reports[True]["sparsity"] == pytest.approx(0.6, abs=0.01)
    assert reports[True]["max_abs_logit_difference"] > 1e-2
    assert reports[True]["logits_compared"] == sum(map(len, TEXTS)) * 257


def test_zeros_that_a_merge_makes_are_counted_as_zeros():
    adapter, masks = trained("llama", torch.bfloat16)
    name, layer = next(iter(elastic_layers(adapter).items()))
    with torch.no_grad():
        row, column = masks[name].nonzero()[0].tolist()
        layer.weight[row, column] = -(layer.merged_weight() - layer.weight)[row, column]
    merged = merging.merge(adapter)
    report = inspect(masks, prunable_linears(merged))
    assert report[name]["off_mask_nonzeros"] == 0
    assert report[name]["sparsity"] >= report[name]["mask_sparsity"]


def test_a_model_that_diverged_is_not_merged():
    merging.require_finite([torch.zeros(2, 3)], Path("adapter"))
    for value in (float("nan"), float("inf")):
        with pytest.raises(PhoenixError, match="merge: with adapter the model's logits are no longer finite"):
            merging.require_finite([torch.zeros(2, 3), torch.tensor([[1.0, value]])], Path("adapter"))
