"""The parameters that train: gathered, written and put back, whole or in parts on several processes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phoenix_sparse.errors import PhoenixError, first_line
from phoenix_sparse.files import atomic_path
from phoenix_sparse.finetuning.evolve import moving_masks
from phoenix_sparse.finetuning.masked_linear import pack_mask, unpack_mask

MASK = "mask"


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is, or put together from the parts that processes hold; they have to call it together then."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train by name, on the CPU and whole, where processes hold a part of each; and moving masks.

    All processes have to call it together.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name] = whole(parameter).detach().cpu().contiguous()
    return found | {f"{name}.{MASK}": pack_mask(one.mask).cpu() for name, one in moving_masks(model).items()}


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


@torch.no_grad()
def read_tensors(model: nn.Module, path: Path) -> None:
    """Put parameters back that `trained_tensors` gave.

    Raises:
        PhoenixError: the file is damaged, or is another training's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise PhoenixError(f"{path} can't be read ({first_line(error)}); begin the training anew") from error
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    masks = {f"{name}.{MASK}": one for name, one in moving_masks(model).items()}
    shapes = {name: one.shape for name, one in parameters.items()}
    shapes |= {name: pack_mask(one.mask).shape for name, one in masks.items()}
    if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
        raise PhoenixError(f"{path} holds the weights of another training; begin the training anew")
    for name, parameter in parameters.items():
        value = tensors[name].to(parameter.device)
        if hasattr(parameter, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            sharded: Any = parameter
            value = distribute_tensor(value, sharded.device_mesh, sharded.placements)
        parameter.copy_(value)
    for name, one in masks.items():
        one.put(unpack_mask(tensors[name].to(one.mask.device), one.mask.shape[1]))


@torch.no_grad()
def make_whole(model: nn.Module) -> None:
    """Put whole parameters, on the CPU, in the place of those that train and are shared out over processes.

    The model computes nothing afterwards. All processes have to call it together.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad and hasattr(parameter, "full_tensor"):
                module.register_parameter(name, nn.Parameter(whole(parameter).cpu()))
