"""The adapter as PEFT holds it: LoRA layers that know a mask and an elastic rank."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional

from phoenix_sparse.errors import PhoenixError, first_line
from phoenix_sparse.files import atomic_path, read_json
from phoenix_sparse.finetuning.elastic import Ranks
from phoenix_sparse.finetuning.masked_linear import effective_weight, masked_linear
from phoenix_sparse.masks import Masks, check_fit, masks_sha256
from phoenix_sparse.models import LIBRARY_ERRORS, prunable_linears

ADAPTER = "default"
RECORD = "phoenix.json"


class ElasticLinear(lora.Linear):
    """A LoRA layer with a mask (or none, for a dense update) and a rank that can be lowered to a prefix."""

    mask: Tensor | None

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.register_buffer("mask", None, persistent=False)
        self.rank = self.r[adapter_name]
        self.written_out: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen W, (out, in)."""
        weight = self.get_base_layer().weight
        assert isinstance(weight, Tensor)
        return weight

    def set_mask(self, mask: Tensor) -> None:
        self.mask = mask.to(self.weight.device)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank), cut to the present rank."""
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        return a[: self.rank], b[:, : self.rank]

    def merged_weight(self) -> Tensor:
        """W + M⊙(s·BA) in W's dtype: what is merged, and what a masked layer computes with."""
        return effective_weight(self.weight, self.mask, *self.factors(), self.scaling[ADAPTER])

    def get_delta_weight(self, adapter: str) -> Tensor:
        assert adapter == ADAPTER
        return (self.merged_weight() - self.weight).to(self.factors()[1].dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        scale = self.scaling[ADAPTER]
        a, b = self.factors()
        if self.written_out is not None:
            return functional.linear(x.to(self.written_out.dtype), self.written_out, base.bias)
        if self.mask is not None:
            return masked_linear(x, base.weight, base.bias, self.mask, a, b, scale)
        low = functional.linear(self.lora_dropout[ADAPTER](x), a.to(x.dtype))
        return base(x) + functional.linear(low, (b * scale).to(x.dtype))


def add_adapter(
    model: Any,
    *,
    rank: int,
    scale: float,
    masks: Masks | None,
    seed: int,
    targets: tuple[str, ...] | None = None,
    dropout: float = 0.0,
    rank_pattern: Mapping[str, int] | None = None,
) -> PeftModel:
    """Put an adapter on a model's prunable linears; only its A (float32, random) and B (float32, zero) train.

    Args:
        model: a causal language model, changed in place.
        rank: the largest rank of a layer.
        scale: s, the same for all layers and ranks.
        masks: for sparse_to_sparse, every prunable linear's mask; None for a dense update.
        seed: for A.
        targets: last names of the linears to adapt; all unless given.
        dropout: on the input of a dense update.
        rank_pattern: layers with ranks of their own.

    Raises:
        PhoenixError: masks don't fit the model, or a target names no linear.
    """
    layers = prunable_linears(model)
    if masks is not None:
        check_fit(masks, layers)
    names = target_names(model, targets)
    ranks = dict(rank_pattern or {})
    config = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=names,
        rank_pattern=ranks,
        alpha_pattern={name: scale * r for name, r in ranks.items()},
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({nn.Linear: ElasticLinear})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    for name, layer in elastic_layers(adapted).items():
        if masks is not None:
            layer.set_mask(masks[name])
    return adapted


def target_names(model: Any, targets: tuple[str, ...] | None) -> list[str]:
    """The last names of the linears to adapt: those asked for, or all prunable ones.

    Raises:
        PhoenixError: a name that no prunable linear has.
    """
    names = {name.rsplit(".", 1)[-1] for name in prunable_linears(model)}
    unknown = set(targets or ()) - names
    if unknown:
        raise PhoenixError(
            f"finetune.targets: no linear is called {sorted(unknown)[0]}; there are {', '.join(sorted(names))}"
        )
    return sorted(names if targets is None else targets)


def elastic_layers(model: PeftModel) -> dict[str, ElasticLinear]:
    """The adapted layers by the names that their linears have in the plain model."""
    return {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, ElasticLinear)}


def set_ranks(model: PeftModel, ranks: Ranks) -> None:
    """Choose the sub-adapter that computes from now on."""
    layers = elastic_layers(model)
    for name, rank in ranks.items():
        if not 1 <= rank <= layers[name].r[ADAPTER]:
            raise PhoenixError(f"{name}: rank {rank} is outside 1 to {layers[name].r[ADAPTER]}")
        layers[name].rank = rank


@contextmanager
def written_out(model: PeftModel) -> Iterator[None]:
    """Compute with the masked layers' weights written out, for the block: the same results to the last bit, and much
    faster where many forward passes follow, at the price of a second copy of the weights. Nothing trains meanwhile.
    """
    masked = [layer for layer in elastic_layers(model).values() if layer.mask is not None]
    try:
        with torch.no_grad():
            for layer in masked:
                layer.written_out = layer.merged_weight()
        yield
    finally:
        for layer in masked:
            layer.written_out = None


def adapter_parameters(model: PeftModel, ranks: Ranks) -> int:
    """Count the weights of a sub-adapter."""
    layers = elastic_layers(model)
    return sum(rank * sum(layers[name].weight.shape) for name, rank in ranks.items())


def save_adapter(model: PeftModel, directory: Path, masks: Masks | None, space: tuple[int, ...] | None = None) -> None:
    """Write the present sub-adapter in PEFT's format, with the hash of the mask that it was trained through.

    Every layer's factors are cut to its rank, and `rank_pattern` and `alpha_pattern` say so: stock PEFT loads it with
    the same update, but without the mask, which is what `phoenix.json` is there to tell. A super-adapter's record
    holds the space of its ranks, too.
    """
    from safetensors.torch import save_file

    layers = elastic_layers(model)
    tensors = {}
    for name, layer in layers.items():
        a, b = layer.factors()
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.detach().cpu().contiguous()
    config = model.peft_config[ADAPTER].to_dict()
    largest = max(layer.rank for layer in layers.values())
    scale = next(iter(layers.values())).scaling[ADAPTER]
    pattern = {name: layer.rank for name, layer in layers.items() if layer.rank != largest}
    config |= {
        "r": largest,
        "lora_alpha": scale * largest,
        "rank_pattern": pattern,
        "alpha_pattern": {name: scale * rank for name, rank in pattern.items()},
        "target_modules": sorted(config["target_modules"]),
        "inference_mode": True,
        "base_model_name_or_path": None,
    }
    record: dict[str, Any] = {
        "masked": masks is not None,
        "masks_sha256": masks_sha256(masks) if masks is not None else None,
    }
    record |= {"space": list(space)} if space else {}
    if masks is not None:
        record["note"] = "Trained through masks: stock PEFT applies it without them and fills the zeros. Use merged/."
    with atomic_path(directory) as temporary:
        temporary.mkdir()
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True, default=str) + "\n")
        (temporary / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def _read_record(directory: Path) -> dict[str, Any]:
    """What `save_adapter` noted; a record that doesn't say whether there is a mask must not pass for one without."""
    path = Path(directory) / RECORD
    record = read_json(path)
    if not isinstance(record, dict) or type(record.get("masked")) is not bool:
        raise PhoenixError(f"adapter: {path} does not say whether the adapter is masked; give one that phx tune wrote")
    if record["masked"] and not isinstance(record.get("masks_sha256"), str):
        raise PhoenixError(f"adapter: {path} has no hash of the masks; give an adapter that phx tune wrote")
    space = record.get("space", [])
    if not isinstance(space, list) or not all(type(rank) is int and rank > 0 for rank in space):
        raise PhoenixError(f"adapter: {path} has no valid space of ranks; give an adapter that phx tune wrote")
    return record


def is_masked(directory: Path) -> bool:
    """Whether an adapter was trained through masks."""
    return bool(_read_record(directory)["masked"])


def adapter_space(directory: Path) -> tuple[int, ...]:
    """The ranks that a super-adapter was trained with, the largest first."""
    space = _read_record(directory).get("space")
    if not space:
        raise PhoenixError(f"adapter: {directory} is no super-adapter; give the one that fine-tuning wrote")
    return tuple(space)


def load_adapter(model: Any, directory: Path, masks: Masks | None) -> PeftModel:
    """Put a saved adapter on a model, masked as it was trained.

    Raises:
        PhoenixError: files are missing or damaged, the adapter was trained through other masks, or it has
            tensors that fit nothing.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    directory = Path(directory)
    record, config = _read_record(directory), read_json(directory / "adapter_config.json")
    if record["masked"]:
        if masks is None:
            raise PhoenixError(f"adapter: {directory} was trained through masks; give its masks.safetensors")
        if record["masks_sha256"] != masks_sha256(masks):
            raise PhoenixError(
                f"adapter: {directory} was trained through other masks than these; give the ones of its run"
            )
    try:
        tensors = load_file(directory / "adapter_model.safetensors")
        adapted = add_adapter(
            model,
            rank=int(config["r"]),
            scale=float(config["lora_alpha"]) / int(config["r"]),
            masks=masks if record["masked"] else None,
            seed=0,
            targets=tuple(config["target_modules"]),
            rank_pattern=config["rank_pattern"],
        )
        outcome: Any = set_peft_model_state_dict(adapted, tensors, adapter_name=ADAPTER)
    except (*LIBRARY_ERRORS, SafetensorError, re.error) as error:
        raise PhoenixError(f"adapter: {directory} can't be loaded ({first_line(error)})") from error
    stray = [*outcome.unexpected_keys, *(key for key in outcome.missing_keys if "lora_" in key)]
    if stray:
        raise PhoenixError(f"adapter: {directory} does not fit this model ({stray[0]})")
    return adapted.to(next(model.parameters()).device).eval()
