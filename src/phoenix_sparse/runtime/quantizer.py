"""Packed models through `AutoModelForCausalLM.from_pretrained`: transformers' own door for formats of weights.

Imported by `registration` when transformers is; registers itself.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from phoenix_sparse.checkpoint import reading
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.head import put_head
from phoenix_sparse.runtime.packed import check
from phoenix_sparse.runtime.packing import METHOD, VERSION, check_entry, needed
from phoenix_sparse.runtime.sparse_linear import SparseLinear


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed model: its version, and shape, nnz and values of each packed linear."""

    def __init__(self, version: int = VERSION, layers: dict[str, dict[str, Any]] | None = None, **_: Any) -> None:
        self.quant_method: Any = METHOD
        self.version = version
        self.layers = layers or {}

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "version": self.version, "layers": self.layers}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts a SparseLinear in the place of every packed linear, and checks what was read into it."""

    requires_calibration = True  # packing is a step of its own, `phx pack`

    def validate_environment(self, *_: Any, **__: Any) -> None:
        check_entry(self.quantization_config.to_dict(), "model")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        layers = _layers(self.quantization_config)
        if dtype == torch.float16 and any(facts["values"] == "int8" for facts in layers.values()):
            raise PhoenixError("dtype: float16 can't hold the scales of int8 values; use bfloat16 or float32")
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> Any:
        layers = _layers(self.quantization_config)
        if checkpoint_files is not None:
            _check_names(layers, checkpoint_files)
        for name, facts in layers.items():
            parent, leaf = name.rpartition(".")[::2]
            try:
                linear = model.get_submodule(name)
            except AttributeError:
                linear = None
            shape = tuple(facts["shape"])
            if not isinstance(linear, nn.Linear) or tuple(linear.weight.shape) != shape:
                raise PhoenixError(f"model: config.json packs {name} as {shape}, which is no linear of this model")
            values = getattr(torch, facts["values"])
            with torch.device(linear.weight.device):
                sparse = SparseLinear(shape, facts["nnz"], values, linear.weight.dtype, linear.bias)
            setattr(model.get_submodule(parent), leaf, sparse)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, SparseLinear):
                if tuple(module.shape.tolist()) != (module.out_features, module.in_features):
                    raise PhoenixError(f"model: the stored shape of {name} is not that of config.json; pack it again")
                check(module.packed, name)
                module.place()
        put_head(model)
        return model

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self, **_: Any) -> bool:
        return True


def _check_names(layers: dict[str, dict[str, Any]], files: list[str]) -> None:
    """Refuse files without all parts of packed layers: transformers would make up what isn't there."""
    found: set[str] = set()
    for file in files:
        with reading(Path(file)) as reader:
            found.update(reader.keys())
    for layer, facts in layers.items():
        missing = sorted(part for part in needed(facts) if f"{layer}.{part}" not in found)
        if missing:
            raise PhoenixError(f"model: its files have no {layer}.{missing[0]}; pack the model again")


def _layers(config: Any) -> dict[str, dict[str, Any]]:
    layers: dict[str, dict[str, Any]] = config.layers
    return layers
