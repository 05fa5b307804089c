"""Sparse LoRA as a pair of calls for people with a training loop of their own: a configuration, and putting it on.

The other two of the four functions, `merge_all_lora_weights` and `validate_sparsity_preserved`, are merging's.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from peft import PeftModel
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.finetuning.adapter import add_adapter, elastic_layers
from phoenix_sparse.finetuning.settings import Mode
from phoenix_sparse.masks import Masks, apply_masks, check_fit, validate_mask
from phoenix_sparse.models import prunable_linears


@dataclass
class SparseLoRAConfig:
    """An adapter of one rank.

    Args:
        r: the rank.
        alpha: s·r, so that the update is M⊙(alpha/r·BA); 32 unless given. `lora_alpha` is another name for it.
        dropout: on the input of a dense update; 0 unless given. `lora_dropout` is another name for it.
        target_modules: last names of the linears to adapt, or "Linear" (or None) for all of the decoder blocks.
        sparsity_mode: sparse_to_sparse, with the masks in the forward pass, or sparse_to_dense, a plain LoRA on the
            sparse weights.
        initial_sparsity: what the masks' sparsity must be, to 0.01; anything unless given.
        maintain_sparsity: another way to say sparse_to_sparse.
        preserve_sparsity_on_merge: whether a merge keeps the zeros of a sparse_to_dense adapter, by masking again.

    Raises:
        PhoenixError: a value is out of its range, or two contradict each other.
    """

    r: int = 16
    alpha: float | None = None
    dropout: float | None = None
    target_modules: Sequence[str] | str | None = "Linear"
    sparsity_mode: Mode = "sparse_to_sparse"
    initial_sparsity: float | None = None
    maintain_sparsity: bool | None = None
    preserve_sparsity_on_merge: bool = True
    lora_alpha: float | None = None
    lora_dropout: float | None = None

    def __post_init__(self) -> None:
        self.alpha = self.lora_alpha = _one("alpha", self.alpha, self.lora_alpha, 32.0)
        self.dropout = self.lora_dropout = _one("dropout", self.dropout, self.lora_dropout, 0.0)
        for name, value in (
            ("alpha", self.alpha),
            ("dropout", self.dropout),
            ("initial_sparsity", self.initial_sparsity),
        ):
            if value is not None and not isinstance(value, Real):
                raise PhoenixError(f"SparseLoRAConfig: {name} is {value!r}; it should be a number")
        if not isinstance(self.target_modules, str | Sequence | None):
            raise PhoenixError(
                f'SparseLoRAConfig: target_modules is {self.target_modules!r}; give last names of linears, or "Linear"'
            )
        if not isinstance(self.preserve_sparsity_on_merge, bool):
            raise PhoenixError(
                f"SparseLoRAConfig: preserve_sparsity_on_merge is {self.preserve_sparsity_on_merge!r}; "
                "it should be True or False"
            )
        if self.target_modules is not None and not self.target_modules:
            raise PhoenixError(
                'SparseLoRAConfig: target_modules is empty; give last names of linears, or "Linear" for all'
            )
        if type(self.r) is not int or self.r < 1:
            raise PhoenixError(f"SparseLoRAConfig: r is {self.r!r}; it should be a whole number from 1 up")
        if not 0 < self.alpha < math.inf:
            raise PhoenixError(f"SparseLoRAConfig: alpha is {self.alpha}; it should be finite and above 0")
        if not 0 <= self.dropout < 1:
            raise PhoenixError(f"SparseLoRAConfig: dropout is {self.dropout}; it should be from 0 to below 1")
        if self.sparsity_mode not in ("sparse_to_sparse", "sparse_to_dense"):
            raise PhoenixError(
                f"SparseLoRAConfig: sparsity_mode is {self.sparsity_mode!r}; use sparse_to_sparse or sparse_to_dense"
            )
        sparse = self.sparsity_mode == "sparse_to_sparse"
        if self.maintain_sparsity is not None and self.maintain_sparsity != sparse:
            raise PhoenixError(
                f"SparseLoRAConfig: maintain_sparsity={self.maintain_sparsity} contradicts {self.sparsity_mode}"
            )
        if sparse and self.dropout:
            raise PhoenixError(
                "SparseLoRAConfig: the masked update has one product with the input and none to drop; use dropout=0"
            )

    @property
    def targets(self) -> tuple[str, ...] | None:
        """As `add_adapter` has them."""
        if self.target_modules is None:
            return None
        names = (self.target_modules,) if isinstance(self.target_modules, str) else tuple(self.target_modules)
        return None if "Linear" in names else names


def apply_sparse_lora(model: Any, masks: Masks, config: SparseLoRAConfig, *, seed: int = 0) -> PeftModel:
    """Set a model's weights to zero off their masks and put an adapter on it; only the adapter trains.

    Args:
        model: a causal language model, changed in place.
        masks: of every prunable linear, by exact name.
        config: the adapter.
        seed: for its A.

    Returns:
        The model to train, as `merge_all_lora_weights` takes it.

    Raises:
        PhoenixError: a mask that fits no layer, a layer without a mask, a target that no linear has, or masks of
            another sparsity than `initial_sparsity`.
    """
    if not isinstance(config, SparseLoRAConfig):
        raise PhoenixError(f"apply_sparse_lora: config is {type(config).__name__}; give a SparseLoRAConfig")
    assert config.alpha is not None
    assert config.dropout is not None
    if config.initial_sparsity is not None:
        right, found = validate_mask(masks, expected_sparsity=config.initial_sparsity)
        if not right:
            raise PhoenixError(f"SparseLoRAConfig: initial_sparsity: {found['error']}")
    apply_masks(masks, prunable_linears(model))
    adapted = add_adapter(
        model,
        rank=config.r,
        scale=config.alpha / config.r,
        masks=masks if config.sparsity_mode == "sparse_to_sparse" else None,
        seed=seed,
        targets=config.targets,
        dropout=config.dropout,
    )
    # A plain attribute, neither moved nor saved with the model.
    adapted.__dict__["sparse_lora"] = (config, dict(masks))
    return adapted


def require_adapter(model: Any) -> PeftModel:
    """Refuse a model without an adapter of Phoenix's, whose merge would come to nothing."""
    if not isinstance(model, PeftModel) or not elastic_layers(model):
        raise PhoenixError("merge: the model has no adapter to merge; put one on with apply_sparse_lora")
    return model


def kept_masks(model: PeftModel) -> Masks | None:
    """The masks that a merge has to apply once more to keep the zeros; None where the update itself keeps them."""
    if all(layer.gate is not None for layer in elastic_layers(model).values()):
        return None
    config, masks = model.__dict__.get("sparse_lora", (None, None))
    if config is None:
        raise PhoenixError("merge: the update is dense, and the model has no masks; put it on with apply_sparse_lora")
    return masks if config.preserve_sparsity_on_merge else None


def adapted_weights(model: Any, masks: Masks) -> Iterator[tuple[str, Tensor]]:
    """The weights of the prunable linears by name, with the adapter's update where there is one.

    Raises:
        PhoenixError: a mask that fits no layer, or a layer without a mask.
    """
    adapted = elastic_layers(model) if isinstance(model, PeftModel) else {}
    plain = prunable_linears(model.get_base_model() if isinstance(model, PeftModel) else model)
    # Inside an adapted layer lie linears of its own: the frozen one, A and B.
    layers: dict[str, Any] = {
        name: layer for name, layer in plain.items() if not any(name.startswith(f"{one}.") for one in adapted)
    }
    check_fit(masks, layers | adapted)
    for name in masks:
        yield name, adapted[name].merged_weight() if name in adapted else layers[name].weight


def _one(name: str, value: float | None, other: float | None, default: float) -> float:
    if value is not None and other is not None and value != other:
        raise PhoenixError(f"SparseLoRAConfig: {name} is {value} and lora_{name} is {other}; give one of them")
    return next((one for one in (value, other) if one is not None), default)
