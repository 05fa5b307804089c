"""Which models can be decoded with a cache of fixed size, and which steps a GPU can record."""

import inspect
from typing import Any

import torch

from phoenix_sparse.runtime.sparse_linear import SparseLinear

STEPPING = "phoenix_slots"
"""The attention that a configuration names while a step runs (`slots.attending`), perhaps in another thread."""


def context_of(model: Any) -> int | None:
    """Positions that a model has; None where its configuration names no limit."""
    found: int | None = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found


def refusal(model: Any) -> str | None:
    """Why a model can't be decoded here, or None: it must attend to full or sliding windows, with positions given."""
    config = model.config.get_text_config(decoder=True)
    other = set(layer_kinds(config)) - {"full_attention", "sliding_attention"}
    if other:
        return f"{type(model).__name__} has layers of {min(other)}, not only full and sliding attention"
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "num_kv_shared_layers", None):
        return f"{type(model).__name__} does not keep keys and values of each of its layers, once"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{type(model).__name__} takes no position_ids"
    if config._attn_implementation not in ("sdpa", "eager", STEPPING):
        return f"attention is {config._attn_implementation}, not sdpa or eager"
    return None


def layer_kinds(config: Any) -> list[str]:
    """Each layer's kind of attention."""
    kinds: list[str] | None = getattr(config, "layer_types", None)
    if kinds is None:
        chunked = getattr(config, "attention_chunk_size", None) is not None
        window = getattr(config, "sliding_window", None) is not None
        kind = "sliding_attention" if window else "chunked_attention" if chunked else "full_attention"
        kinds = [kind] * config.num_hidden_layers
    return kinds


def why_one_by_one(model: Any, device: torch.device) -> str | None:
    """Why the step can't be recorded, where that is known before; None if it may be."""
    if device.type != "cuda":
        return "not on a GPU"
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        return "packed linears are multiplied by torch, see PHOENIX_CUDA"
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if kinds & {"dynamic", "longrope"}:
        return "its rotary embedding looks at positions on the host"
    return None
