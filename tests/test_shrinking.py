"""The smaller model on disk is the masked one, in fewer parameters."""

import pytest
import torch

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.masks import apply_masks
from phoenix_sparse.models import load_model, prunable_linears
from phoenix_sparse.pruning.mask_generator import compute_structured_mask, compute_unstructured_mask
from phoenix_sparse.shrinking import write_smaller
from phoenix_sparse.steps import Machine
from tiny import CONFIGS, make_model


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_directory_gives_the_masked_model_s_logits(tmp_path, tokenizer, kind, dtype):
    model = make_model(kind).to(dtype)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    masks = compute_structured_mask(model, 0.3)
    found = write_smaller(tmp_path / "dense", masks, tmp_path / "small", Machine())
    apply_masks(masks, prunable_linears(model))
    small = load_model(tmp_path / "small")
    ids = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    close = 1e-5 if dtype == torch.float32 else 0.1
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, model(ids).logits, atol=close, rtol=0)
    dropped = sum(int((~mask).sum()) for mask in masks.values())
    assert found["dropped_nonzeros"] == dropped  # the source was dense
    assert found["parameters"] == sum(parameter.numel() for parameter in small.parameters())
    # An OPT channel takes its bias with it.
    assert found["parameters_before"] - found["parameters"] >= dropped > 0
    assert found["max_abs_logit_difference"] <= close
    assert small.dtype == dtype


def test_masks_that_are_not_structured_leave_nothing_behind(tmp_path, model_directory):
    masks = compute_unstructured_mask(load_model(model_directory), 0.5)
    with pytest.raises(PhoenixError, match="doesn't keep or drop whole channels or groups"):
        write_smaller(model_directory, masks, tmp_path / "small", Machine())
    assert list(tmp_path.iterdir()) == []
