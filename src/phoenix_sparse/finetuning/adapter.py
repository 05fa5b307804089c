"""The adapter as PEFT holds it: LoRA layers that know a mask and an elastic rank."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional

from phoenix_sparse.errors import PhoenixError, first_line
from phoenix_sparse.files import atomic_path, read_json
from phoenix_sparse.finetuning.elastic import Ranks, Space, Spaces, largest
from phoenix_sparse.finetuning.elastic_linear import ADAPTER, ElasticLinear, write_out
from phoenix_sparse.finetuning.settings import Method, ScaleRule
from phoenix_sparse.masks import Masks, apply_masks, check_fit, masks_sha256, require_pruned
from phoenix_sparse.models import LIBRARY_ERRORS, prunable_linears

RECORD = "phoenix.json"
# The type in adapter_config.json and the names of A and B in the file, by method.
PEFT_NAMES = {"lora": ("LORA", "lora_{}.weight"), "hira": ("HIRA", "hira_{}")}


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
    alpha_pattern: Mapping[str, float] | None = None,
    method: Method = "lora",
    scale_rule: ScaleRule = "fixed",
) -> PeftModel:
    """Put an adapter on a model's prunable linears; only its A (float32, random) and B (float32, zero) train.

    Args:
        model: a causal language model, changed in place.
        rank: the largest rank of a layer.
        scale: s, the same for all layers at their largest ranks.
        masks: for sparse_to_sparse, every prunable linear's mask; None for a dense update. HiRA reads none: its zeros
            are those of the weights.
        seed: for A.
        targets: last names of the linears to adapt; all unless given.
        dropout: on the input of a dense update.
        rank_pattern: layers with largest ranks of their own.
        alpha_pattern: layers with a scale of their own, times their largest rank.
        method: lora, or hira.
        scale_rule: whether s holds at every rank or is alpha/r.

    Raises:
        PhoenixError: masks don't fit the model, a target names no linear, or dropout is asked of a masked update.
    """
    layers = prunable_linears(model)
    if masks is not None:
        check_fit(masks, layers)
    if dropout and (masks is not None or method == "hira"):
        raise PhoenixError("dropout: the masked update has one product with the input and none to drop; use dropout=0")
    names = target_names(model, targets)
    ranks = dict(rank_pattern or {})
    config = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=names,
        rank_pattern=ranks,
        alpha_pattern={name: scale * r for name, r in ranks.items()} | dict(alpha_pattern or {}),
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({nn.Linear: ElasticLinear})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    for name, layer in elastic_layers(adapted).items():
        layer.method, layer.scale_rule = method, scale_rule
        if masks is not None and method == "lora":
            layer.set_mask(masks[name])
    return adapted


def add_super_adapter(model: Any, space: Spaces, **options: Any) -> PeftModel:
    """Put an adapter on a model whose layers have the largest ranks of a space.

    Args:
        model: as in `add_adapter`.
        space: of the layers to adapt (`elastic.spaces`).
        options: of `add_adapter`, without the ranks.
    """
    ranks = largest(space)
    rank = max(ranks.values())
    return add_adapter(model, rank=rank, rank_pattern={n: r for n, r in ranks.items() if r != rank}, **options)


def target_linears(model: Any, targets: tuple[str, ...] | None) -> dict[str, nn.Linear]:
    """The linears to adapt by their full names.

    Raises:
        PhoenixError: a target that no prunable linear has.
    """
    names = target_names(model, targets)
    return {name: layer for name, layer in prunable_linears(model).items() if name.rsplit(".", 1)[-1] in names}


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
    gated = [layer for layer in elastic_layers(model).values() if layer.gate is not None]
    try:
        for layer in gated:
            write_out(layer)
        yield
    finally:
        for layer in gated:
            layer.written_out = None


def adapter_parameters(model: PeftModel, ranks: Ranks) -> int:
    """Count the weights of a sub-adapter."""
    layers = elastic_layers(model)
    return sum(rank * sum(layers[name].weight.shape) for name, rank in ranks.items())


def save_adapter(
    model: PeftModel, directory: Path, masks: Masks | None, space: Space | None = None, *, evolved: bool = False
) -> None:
    """Write the present sub-adapter in PEFT's format, with the hash of the mask that it was trained through.

    Every layer's factors are cut to its rank, and `rank_pattern` and `alpha_pattern` say so: stock PEFT loads it with
    the same update, but without the mask, which is what `phoenix.json` is there to tell. HiRA's update is whole in
    stock PEFT, too, which knows neither a scale nor ranks by layer for it: B has the scale in it, factors are filled up
    with zeros, and `phoenix.json` has the ranks. A super-adapter's record holds the space of its ranks, too. Where the
    mask has `evolved`, the adapter's base is the pruned model under that mask: `load_adapter` makes it of the former.
    """
    from safetensors.torch import save_file

    layers = elastic_layers(model)
    first = next(iter(layers.values()))
    hira = first.method == "hira"
    kind, key = PEFT_NAMES[first.method]
    ranks = {name: layer.rank for name, layer in layers.items()}
    largest_rank = max(ranks.values())
    tensors = {}
    for name, layer in layers.items():
        a, b = (factor.detach().cpu() for factor in layer.factors())
        if hira:
            missing = largest_rank - layer.rank
            a, b = functional.pad(a, (0, 0, 0, missing)), functional.pad(b * layer.scale, (0, missing))
        tensors[f"base_model.model.{name}.{key.format('A')}"] = a.contiguous()
        tensors[f"base_model.model.{name}.{key.format('B')}"] = b.contiguous()
    config: dict[str, Any] = {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "r": largest_rank,
        "rank_pattern": {} if hira else {name: rank for name, rank in ranks.items() if rank != largest_rank},
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in layers}),
        "inference_mode": True,
        "base_model_name_or_path": None,
    }
    if not hira:
        alpha = next(layer.alpha for layer in layers.values() if layer.rank == largest_rank)
        own = config["rank_pattern"].keys() | {name for name, layer in layers.items() if layer.alpha != alpha}
        pattern = {name: layer.alpha for name, layer in layers.items() if name in own}
        config = model.peft_config[ADAPTER].to_dict() | config | {"lora_alpha": alpha, "alpha_pattern": pattern}
    record: dict[str, Any] = {
        "masked": masks is not None,
        "masks_sha256": masks_sha256(masks) if masks is not None else None,
        "method": first.method,
        "scale_rule": first.scale_rule,
    } | ({"evolved": True} if evolved else {})
    if space:
        record["space"] = {n: list(r) for n, r in space.items()} if isinstance(space, Mapping) else list(space)
    if hira:
        record["ranks"] = ranks
    elif masks is not None:
        record["note"] = "Trained through masks: stock PEFT applies it without them and fills the zeros. Use merged/."
    with atomic_path(directory) as temporary:
        temporary.mkdir()
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True, default=str) + "\n")
        (temporary / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def require_record(directory: Path) -> None:
    """Refuse a directory that fine-tuning hasn't written."""
    directory = Path(directory)
    if not (directory / RECORD).is_file():
        inside = [
            name for name in ("adapter/chosen", "adapter/super", "chosen", "super") if (directory / name).is_dir()
        ]
        instead = " or ".join(str(directory / name) for name in inside) or "one that phx tune or phx search wrote"
        raise PhoenixError(f"adapter: {directory} is no adapter: No such file as {RECORD} is there; give {instead}")


def _read_record(directory: Path) -> dict[str, Any]:
    """What `save_adapter` noted; a record that doesn't say whether there is a mask must not pass for one without."""
    require_record(directory)
    path = Path(directory) / RECORD
    record = read_json(path)
    if not isinstance(record, dict) or type(record.get("masked")) is not bool:
        raise PhoenixError(f"adapter: {path} does not say whether the adapter is masked; give one that phx tune wrote")
    if record["masked"] and not isinstance(record.get("masks_sha256"), str):
        raise PhoenixError(f"adapter: {path} has no hash of the masks; give an adapter that phx tune wrote")
    space = record.get("space", [])
    for ranks in space.values() if isinstance(space, dict) else [space]:
        if not isinstance(ranks, list) or not all(type(rank) is int and rank > 0 for rank in ranks):
            raise PhoenixError(f"adapter: {path} has no valid space of ranks; give an adapter that phx tune wrote")
    ranks = record.get("ranks", {})
    if not isinstance(ranks, dict) or not all(type(rank) is int and rank > 0 for rank in ranks.values()):
        raise PhoenixError(f"adapter: {path} has no valid ranks; give an adapter that phx tune wrote")
    record = {"method": "lora", "scale_rule": "fixed", "ranks": ranks} | record
    if record["method"] not in get_args(Method) or record["scale_rule"] not in get_args(ScaleRule):
        raise PhoenixError(f"adapter: {path} has no known method and scale_rule; give an adapter that phx tune wrote")
    return record


def is_masked(directory: Path) -> bool:
    """Whether an adapter was trained through masks."""
    return bool(_read_record(directory)["masked"])


def has_evolved(directory: Path) -> bool:
    """Whether an adapter's masks are others than those of the model that it was trained on."""
    return bool(_read_record(directory).get("evolved"))


def adapter_space(directory: Path) -> Space:
    """The ranks that a super-adapter was trained with, the largest first: of all layers, or by layer."""
    space = _read_record(directory).get("space")
    if not space or (isinstance(space, dict) and not all(space.values())):
        raise PhoenixError(f"adapter: {directory} is no super-adapter; give the one that fine-tuning wrote")
    return {name: tuple(ranks) for name, ranks in space.items()} if isinstance(space, dict) else tuple(space)


def load_adapter(model: Any, directory: Path, masks: Masks | None) -> PeftModel:
    """Put a saved adapter on a model, masked as it was trained.

    Where the mask evolved, what it dropped of the model's weights becomes zero.

    Raises:
        PhoenixError: files are missing or damaged, the adapter was trained through other masks, the model isn't zero
            off them, or it has tensors that fit nothing.
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
        if record.get("evolved"):
            apply_masks(masks, prunable_linears(model))
        else:
            require_pruned(masks, prunable_linears(model), getattr(model, "name_or_path", "") or "the model")
    kind, _ = PEFT_NAMES[record["method"]]
    try:
        if config["peft_type"] != kind:
            raise ValueError(f"adapter_config.json says {config['peft_type']} and {RECORD} {record['method']}")
        rank = int(config["r"])
        adapted = add_adapter(
            model,
            rank=rank,
            scale=float(config["lora_alpha"]) / rank if kind == "LORA" else 1.0,
            masks=masks if record["masked"] else None,
            seed=0,
            targets=tuple(config["target_modules"]),
            rank_pattern=record["ranks"] or config["rank_pattern"],
            alpha_pattern=config.get("alpha_pattern"),
            method=record["method"],
            scale_rule=record["scale_rule"],
        )
        tensors = _as_lora(load_file(directory / "adapter_model.safetensors"), record["ranks"])
        outcome: Any = set_peft_model_state_dict(adapted, tensors, adapter_name=ADAPTER)
    except (*LIBRARY_ERRORS, SafetensorError, re.error) as error:
        raise PhoenixError(f"adapter: {directory} can't be loaded ({first_line(error)})") from error
    stray = [*outcome.unexpected_keys, *(key for key in outcome.missing_keys if "lora_" in key)]
    if stray:
        raise PhoenixError(f"adapter: {directory} does not fit this model ({stray[0]})")
    return adapted.to(next(model.parameters()).device).eval()


def _as_lora(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """HiRA's factors (those of layers with ranks) by the names that an elastic layer has for them, cut to the ranks."""
    for name, rank in ranks.items():
        start = f"base_model.model.{name}"
        tensors[f"{start}.lora_A.weight"] = tensors.pop(f"{start}.hira_A")[:rank].contiguous()
        tensors[f"{start}.lora_B.weight"] = tensors.pop(f"{start}.hira_B")[:, :rank].contiguous()
    return tensors
