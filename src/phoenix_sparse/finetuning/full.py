"""Masked full fine-tuning: the kept weights of the adapted linears train themselves, all else is frozen.

The weights that train are float32 whatever the model's dtype (bfloat16 would round small steps away): a master copy,
from which every forward pass computes with its rounding to the model's dtype. That rounding is what is saved, so the
result is the model that was trained, to the last bit.

The gradient is masked in the backward pass. Adam's moments start at zero and stay zero where the gradient is, and
weight decay multiplies a zero: the weights off the mask are zero after every step without being put there again.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from phoenix_sparse.errors import PhoenixError, first_line
from phoenix_sparse.files import atomic_path, read_json, write_json
from phoenix_sparse.finetuning.adapter import RECORD, target_linears
from phoenix_sparse.masks import Masks, check_fit, masks_sha256
from phoenix_sparse.models import prunable_linears

WEIGHTS = "weights.safetensors"


class TrainedLinear(nn.Linear):
    """A linear whose kept weights train: `weight` (out, in) in float32, computed with in the model's dtype."""

    mask: Tensor

    def __init__(self, linear: nn.Linear, mask: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.compute_dtype = linear.weight.dtype
        self.register_buffer("mask", mask.to(linear.weight.device), persistent=False)
        # Of a mask that evolves (`evolve.MovingMask`): what it is, and who sees the weight's gradient.
        self.moving: Any = None
        self.collect: Callable[[Tensor], None] | None = None
        weight = linear.weight.detach().to(torch.float32)
        self.weight = nn.Parameter(weight.masked_fill(~self.mask, 0))

    def forward(self, x: Tensor) -> Tensor:
        """y = x · round(W)ᵀ + bias, (..., out), in the model's dtype."""
        result: Tensor = _TrainedWeight.apply(x.to(self.compute_dtype), self.weight, self.mask, self.bias, self.collect)
        return result

    @property
    def rounded(self) -> Tensor:
        """The weight that is computed with and saved, (out, in), in the model's dtype."""
        return self.weight.detach().to(self.compute_dtype)


class _TrainedWeight(torch.autograd.Function):
    """Saves x alone: the rounded weight is made again for the backward pass, and is never kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        mask: Tensor,
        bias: Tensor | None,
        collect: Callable[[Tensor], None] | None,
    ) -> Tensor:
        ctx.save_for_backward(x)
        # They are the model's own and stay where they are: as attributes they are neither copied nor offloaded.
        ctx.weight, ctx.mask, ctx.collect = weight, mask, collect
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (grad,) = ctx.saved_tensors, grads
        grad_x = grad_weight = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = grad @ ctx.weight.to(x.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
                if ctx.collect is not None:
                    ctx.collect(grad_weight)
                grad_weight = grad_weight.to(torch.float32).mul_(ctx.mask)
        return grad_x, grad_weight, None, None, None


def train_weights(model: Any, masks: Masks, targets: tuple[str, ...] | None = None) -> Any:
    """Make the kept weights of a model's linears train, in place, and freeze all else.

    Args:
        model: a causal language model.
        masks: of every prunable linear.
        targets: last names of the linears to train; all unless given.

    Raises:
        PhoenixError: masks don't fit the model, or a target names no linear.
    """
    check_fit(masks, prunable_linears(model))
    model.requires_grad_(False)
    for name, linear in target_linears(model, targets).items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, TrainedLinear(linear, masks[name]))
    return model


def trained_linears(model: nn.Module) -> dict[str, TrainedLinear]:
    """The linears that train, by their full names."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, TrainedLinear)}


def save_weights(weights: dict[str, Tensor], directory: Path, masks: Masks) -> None:
    """Write the trained weights with the hash of the masks that they were trained under.

    Args:
        weights: (out, in) by the linears' full names, in the model's dtype.
        directory: gets weights.safetensors and phoenix.json.
        masks: of the training.
    """
    from safetensors.torch import save_file

    with atomic_path(directory) as temporary:
        temporary.mkdir()
        tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / RECORD, {"masked": True, "masks_sha256": masks_sha256(masks), "method": "full"})


def is_full(directory: Path) -> bool:
    """Whether a directory of fine-tuning holds trained weights in place of an adapter."""
    path = Path(directory) / RECORD
    record = read_json(path) if path.is_file() else None
    return isinstance(record, dict) and record.get("method") == "full"


def kept_weights(directory: Path, masks: Masks | None) -> int:
    """How many weights of the trained linears the masks keep."""
    from safetensors import safe_open

    with safe_open(Path(directory) / WEIGHTS, framework="pt") as file:
        return sum(int((masks or {})[name].sum()) for name in file.keys())  # noqa: SIM118 (it is no mapping)


def copy_weights(directory: Path, target: Path) -> None:
    """Put trained weights under another name: links to their files where the disk can, copies elsewhere."""
    with atomic_path(target) as temporary:
        temporary.mkdir()
        for name in (WEIGHTS, RECORD):
            try:
                os.link(Path(directory) / name, temporary / name)
            except OSError:
                shutil.copyfile(Path(directory) / name, temporary / name)


@torch.no_grad()
def load_weights(model: Any, directory: Path, masks: Masks | None) -> Any:
    """Put trained weights into the model that they were trained from, in place.

    Raises:
        PhoenixError: no masks or other masks than theirs are given, the file is damaged, a weight fits no linear or
            has another shape or dtype, or isn't zero off its mask.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    directory = Path(directory)
    if masks is None:
        raise PhoenixError(f"adapter: {directory} was trained through masks; give its masks.safetensors")
    record = read_json(directory / RECORD)
    if record.get("masks_sha256") != masks_sha256(masks):
        raise PhoenixError(f"adapter: {directory} was trained through other masks than these; give the ones of its run")
    layers = prunable_linears(model)
    check_fit(masks, layers)
    try:
        weights = load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise PhoenixError(f"adapter: {directory} can't be loaded ({first_line(error)})") from error
    for name, weight in weights.items():
        there = layers[name].weight if name in layers else None
        if there is None or there.shape != weight.shape or there.dtype != weight.dtype:
            raise PhoenixError(f"adapter: {directory} does not fit this model ({name})")
        if weight[~masks[name]].any():
            raise PhoenixError(f"adapter: {directory}: {name} has non-zeros off its mask; give what phx tune wrote")
        there.copy_(weight)
    return model.eval()
