"""FSDP2 through accelerate: what a training asks of it, and its checkpoints without the weights that don't train."""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from transformers.trainer import SCHEDULER_NAME

from phoenix_sparse.errors import PhoenixError


def require_shareable(plugin: Any, evolves: bool) -> None:
    """Refuse what accelerate's configuration asks of FSDP and a training can't go along with.

    Args:
        plugin: accelerate's, of the launch.
        evolves: whether the mask does.

    Raises:
        PhoenixError: the first version of FSDP, whose flat parameters have one dtype and train all or not at all; its
            own activation checkpointing, which renames the layers; or a mask that evolves.
    """
    if plugin.fsdp_version != 2:
        raise PhoenixError(
            "launch: FSDP 1 can't share out an adapter and frozen weights of another dtype; add --fsdp_version 2"
        )
    if plugin.activation_checkpointing:
        raise PhoenixError(
            "launch: FSDP's activation checkpointing renames the layers; leave --fsdp_activation_checkpointing out and "
            "set finetune.gradient_checkpointing=true"
        )
    if evolves:
        raise PhoenixError("finetune.evolve: FSDP shares weights out, and a mask needs them whole; use DDP")


def save_states(trainer: Any, directory: Path) -> None:
    """Write the optimizer's and the schedule's states; the Trainer's own way writes the frozen weights beside them.

    All processes have to call it together.
    """
    plugin = trainer.accelerator.state.fsdp_plugin
    save_fsdp_optimizer(plugin, trainer.accelerator, trainer.optimizer, trainer.model, str(directory))
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), directory / SCHEDULER_NAME)
