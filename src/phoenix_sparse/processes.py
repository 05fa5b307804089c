"""Several processes of one launch (`accelerate launch`, torchrun): who leads, what it says, and how the others wait.

Waiting goes through a group of its own over gloo, without a limit that matters: pruning may take hours, and the ten
minutes after which NCCL gives up are meant for steps of a training.
"""

import functools
import os
from datetime import timedelta
from typing import Any

from phoenix_sparse.errors import PhoenixError

FOREVER = timedelta(days=365)


def count() -> int:
    """Processes of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes and talks."""
    return int(os.environ.get("RANK", "0")) == 0


def start(device: str) -> None:
    """Join the other processes, if there are any, and take this one's GPU.

    Args:
        device: of the recipe: auto, cpu or cuda.

    Raises:
        PhoenixError: accelerate makes something else of the launch, or computes in another dtype than the recipe's.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision != "no":  # also where somebody's `accelerate config` says so
        raise PhoenixError(
            f"launch: mixed precision ({precision}) would train in another dtype than the recipe's; launch with "
            "--mixed_precision no, and set dtype=bfloat16 for a model in that"
        )
    if count() == 1:
        return
    # `accelerate launch --use_fsdp` sets it: all but the main process would read models without their weights, which
    # every process computes with, and not only where FSDP hands them out.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    import torch
    from accelerate import PartialState

    found = PartialState(cpu=device == "cpu" or not torch.cuda.is_available()).num_processes
    if found != count():
        raise PhoenixError(
            f"device: {count()} processes were launched and {found} compute together; launch with `accelerate launch "
            "--multi_gpu`, or with torchrun where there is no GPU"
        )


def say(value: Any = None) -> Any:
    """Give all processes what the main one says: plain values, small. They wait for it as long as it takes."""
    if count() == 1:
        return value
    from torch import distributed

    told = [value]
    distributed.broadcast_object_list(told, src=0, group=_waiting())
    return told[0]


def gather(value: Any) -> list[Any]:
    """Give the main process what each one says, in their order; the others get an empty list. Plain values, small."""
    if count() == 1:
        return [value]
    from torch import distributed

    heard = [None] * count() if is_main() else None
    distributed.gather_object(value, heard, dst=0, group=_waiting())
    return heard or []


def number() -> int:
    """Of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


@functools.cache
def _waiting() -> Any:
    from torch import distributed

    return distributed.new_group(backend="gloo", timeout=FOREVER)
