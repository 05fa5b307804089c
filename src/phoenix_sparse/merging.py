"""Step 3: merge the adapter into the weights, and certify what came out."""

from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import sha256
from phoenix_sparse.finetuning.adapter import elastic_layers
from phoenix_sparse.finetuning.sparse_lora import adapted_weights, kept_masks, require_adapter
from phoenix_sparse.masks import Masks, apply_masks, inspect, masks_sha256
from phoenix_sparse.models import prunable_linears


@torch.no_grad()
def merge(model: PeftModel, *, remask: Masks | None = None) -> Any:
    """Add the adapter's update to the weights: W += M⊙(s·BA), with M all ones where the adapter has no mask.

    HiRA has W in the place of M.

    Args:
        model: with its adapter; it is taken apart.
        remask: masks to apply once more after a dense update, which loses what the update put off the mask.

    Returns:
        The plain model.
    """
    for layer in elastic_layers(model).values():
        layer.weight.copy_(layer.merged_weight())
    plain: Any = model.unload()  # type: ignore[operator]
    if remask is not None:
        apply_masks(remask, prunable_linears(plain))
    return plain


def merge_all_lora_weights(model: PeftModel, preserve_sparsity: bool = True) -> Any:
    """Merge the adapter that `apply_sparse_lora` put on a model.

    Args:
        model: with its adapter; it is taken apart.
        preserve_sparsity: keep every zero of the masks: an update through them does by itself, after a dense one they
            are applied once more. False lets a dense update fill the zeros.

    Returns:
        The plain model.

    Raises:
        PhoenixError: there is no adapter; or its update is dense, and the model has no masks to apply.
    """
    return merge(require_adapter(model), remask=kept_masks(model) if preserve_sparsity else None)


@torch.no_grad()
def validate_sparsity_preserved(model: Any, masks: Masks, tolerance: float = 0.0) -> tuple[bool, dict[str, Any]]:
    """Say whether every weight off its mask is zero, in a plain model, or in what an adapter would merge to.

    Args:
        model: a causal language model, with an adapter or without.
        masks: of every prunable linear, by exact name.
        tolerance: the largest size of a weight that still counts as zero; NaN never does.

    Returns:
        The verdict, and the figures `num_violations`, `total_masked`, `violation_rate`, `max_violation` and `sparsity`
        by layer (`per_layer`), and `all_valid`, `total_violations`, `violation_rate` and `sparsity` (`global`).

    Raises:
        PhoenixError: a mask that fits no layer, a layer without a mask, or a tolerance that is no number from 0 up.
    """
    if not isinstance(tolerance, Real) or not tolerance >= 0:  # with NaN every weight would count as zero
        raise PhoenixError(f"tolerance: {tolerance!r} given; it should be a number from 0 up")
    layers: dict[str, dict[str, Any]] = {}
    weights = masked = violations = zeros = 0
    for name, weight in adapted_weights(model, masks):
        off = weight[~masks[name].to(weight.device)].abs().float()
        wrong, none = int((~(off <= tolerance)).sum()), weight.numel() - int(weight.count_nonzero())
        layers[name] = {
            "num_violations": wrong,
            "total_masked": off.numel(),
            "violation_rate": wrong / max(off.numel(), 1),
            "max_violation": float(off.max()) if off.numel() else 0.0,
            "sparsity": none / weight.numel(),
        }
        weights, masked = weights + weight.numel(), masked + off.numel()
        violations, zeros = violations + wrong, zeros + none
    valid = violations == 0
    summary = {
        "all_valid": valid,
        "total_violations": violations,
        "violation_rate": violations / max(masked, 1),
        "sparsity": zeros / weights,
    }
    return valid, {"per_layer": layers, "global": summary}


@torch.no_grad()
def sample_logits(model: Any, rows: Sequence[list[int]], pad: int) -> list[Tensor]:
    """Logits of some token sequences, each (tokens, vocabulary), float32 on the CPU."""
    device = next(model.parameters()).device
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
    seen = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits.float().cpu()
    return [logits[index, : len(row)] for index, row in enumerate(rows)]


def require_finite(logits: Sequence[Tensor], adapter: Path) -> None:
    """Refuse to merge what has diverged: finite weights may still be too large to compute with.

    Raises:
        PhoenixError: a logit is NaN or infinite.
    """
    if not all(bool(torch.isfinite(one).all()) for one in logits):
        raise PhoenixError(
            f"merge: with {adapter} the model's logits are no longer finite; the training diverged: lower "
            "finetune.learning_rate and train again"
        )


def certify(
    model: Any,
    masks: Masks,
    *,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    mode: str,
    adapter: Path,
    merged: Path,
) -> dict[str, Any]:
    """Say what the merge did, in figures that anyone can check again.

    Args:
        model: the merged model as it was loaded from its directory.
        masks: the pruning's masks.
        before: the adapter model's logits on some sequences (`sample_logits`).
        after: the merged model's on the same.
        mode: sparse_to_sparse or sparse_to_dense.
        adapter: the sub-adapter's directory.
        merged: the merged model's directory.
    """
    layers = inspect(masks, prunable_linears(model))
    total = sum(mask.numel() for mask in masks.values())
    nonzero = sum(layer["nnz"] for layer in layers.values())
    pairs = list(zip(before, after, strict=True))
    agreeing = sum(int((one.argmax(-1) == two.argmax(-1)).sum()) for one, two in pairs)
    positions = sum(one.shape[0] for one in before)
    return {
        "mode": mode,
        "off_mask_nonzeros": sum(layer.pop("off_mask_nonzeros") for layer in layers.values()),
        "max_abs_logit_difference": max(float((one - two).abs().max()) for one, two in pairs),
        "logits_compared": sum(one.numel() for one in before),
        "argmax_agreement": agreeing / positions,
        "sparsity": 1 - nonzero / total,
        "layers": layers,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "masks_sha256": masks_sha256(masks),
        "adapter_sha256": sha256(adapter),
        "merged_sha256": sha256(merged),
    }
