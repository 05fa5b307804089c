"""Packed models through `AutoModelForCausalLM.from_pretrained`: transformers' own door for formats of weights.

Imported by `registration` when transformers is; registers itself.
"""

from os.path import normpath
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.head import put_head
from phoenix_sparse.runtime.packed import check
from phoenix_sparse.runtime.packing import METHOD, check_entry, check_heads
from phoenix_sparse.runtime.sparse_linear import SparseLinear


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed model: its version, and shape, nnz and values of each packed linear."""

    def __init__(self, version: Any = None, layers: Any = None, **_: Any) -> None:
        self.quant_method: Any = METHOD
        self.version = version
        self.layers = layers

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
            _check_places(checkpoint_files, model.name_or_path)
            check_heads(layers, map(Path, checkpoint_files), "model")
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


def _check_places(files: list[str], name: str) -> None:
    """Refuse files that an index names outside of a model's directory. The hub's names for files lead nowhere else."""
    if not Path(name).is_dir():
        return
    directory = Path(name).absolute()
    for file in files:
        if not Path(normpath(Path(file).absolute())).is_relative_to(normpath(directory)):
            raise PhoenixError(f"{name}: its index names {file}, outside of this directory; look where it came from")


def _layers(config: Any) -> dict[str, dict[str, Any]]:
    layers: dict[str, dict[str, Any]] = config.layers
    return layers
