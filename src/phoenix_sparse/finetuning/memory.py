"""When the memory is full: fewer examples at once on the device, with the same step."""

import gc
from typing import Any

import torch

from phoenix_sparse.errors import Exhausted, PhoenixError


class AtOnce:
    """How many examples lie on the device at once; halved whenever they turn out to be too many."""

    def __init__(self, examples: int, halvings: list[dict[str, Any]] | None = None) -> None:
        self.halvings = list(halvings or [])
        self.examples = self.halvings[-1]["micro_batch_size"] if self.halvings else examples

    def halve(self, step: int, tokens: int, processes: int = 1) -> None:
        """Take half as many examples from now on.

        Args:
            step: optimizer steps that were done.
            tokens: of the longest example that was on the device.
            processes: that train together.

        Raises:
            Exhausted: there is one example already.
            PhoenixError: several processes train together, which would wait for
                each other in the middle of a step.
        """
        free_memory()
        if self.examples == 1:
            raise Exhausted(
                f"finetune: the memory is full with one example of {tokens} tokens at a time; set "
                "finetune.gradient_checkpointing=true, or lower finetune.max_length or the ranks"
            )
        if processes > 1:
            raise PhoenixError(
                f"finetune.micro_batch_size: the memory of one of {processes} processes is full with {self.examples} "
                f"examples at once; set it to {max(self.examples // 2, 1)} or less, and begin anew"
            )
        self.examples = -(-self.examples // 2)
        self.halvings.append({"step": step, "micro_batch_size": self.examples})


def is_full(error: BaseException) -> bool:
    """Say whether an error means that the device's memory is full; on a CPU torch has no type of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def free_memory() -> None:
    """Give back what a failed forward or backward pass held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
