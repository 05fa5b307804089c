"""Validation while training: the loss on held-out completions, the best weights so far, and when to stop."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from phoenix_sparse.finetuning.batching import Batch, Collate, Row
from phoenix_sparse.finetuning.examples import IGNORED
from phoenix_sparse.finetuning.memory import AtOnce, is_full

Curve = list[dict[str, Any]]


@torch.no_grad()
def completion_loss(model: Any, batch: Batch) -> Tensor:
    """Sum of the negative log-likelihoods of a batch's scored tokens, and how many there are: (2,), float64."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits, labels = model(**inputs, use_cache=False).logits[:, :-1], batch["labels"][:, 1:]
    scored = labels != IGNORED
    # Only the scored tokens' logits become float32: they are few among a prompt's.
    loss = functional.cross_entropy(logits[scored].float(), labels[scored], reduction="sum")
    return torch.stack([loss.double(), scored.sum().double()])


def validation_loss(
    model: Any,
    rows: Sequence[Row],
    collate: Collate,
    at_once: AtOnce,
    *,
    step: int,
    share: tuple[int, int] = (0, 1),
    together: Callable[[Tensor], Tensor] = lambda total: total,
) -> float:
    """Mean loss of a scored token over all examples, in evaluation mode.

    Args:
        model: as it computes now.
        rows: tokenized examples.
        collate: makes batches of them.
        at_once: how many of them at once; halved where the memory doesn't hold as many.
        step: optimizer steps done, for the record of that.
        share: this process's number and how many there are; each takes every so-manieth batch, and all take as many.
        together: sums over the processes.
    """
    device, (process, processes) = next(model.parameters()).device, share
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    # Like lengths together waste the least padding; the sum doesn't depend on the order but for rounding.
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    try:
        while True:
            size = at_once.examples
            batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
            total = torch.zeros(2, dtype=torch.float64, device=device)
            try:
                for start in range(0, len(batches), processes):
                    mine = start + process
                    batch = {key: value.to(device) for key, value in collate(batches[mine % len(batches)]).items()}
                    total += completion_loss(model, batch) * (mine < len(batches))
                break
            except RuntimeError as error:
                if not is_full(error):
                    raise
            at_once.halve(step, len(ordered[-1]["input_ids"]), processes)
    finally:
        for module, training in modes:
            module.training = training
    loss, tokens = together(total).tolist()
    return float(loss / tokens)


class Best:
    """The validation curve, and the weights that were best by it, in a file of their own.

    A file is named by its step and stays as long as a checkpoint's curve has that step for its best: whichever
    checkpoint a training goes on from, the weights that were best then are there.
    """

    def __init__(self, work: Path, patience: int | None, curve: Curve | None = None) -> None:
        self.work, self.patience, self.curve = work, patience, list(curve or [])

    @property
    def step(self) -> int | None:
        """Of the lowest loss; of equal ones the first."""
        return best_step(self.curve)

    @property
    def path(self) -> Path:
        return self.work / f"best-{self.step}.safetensors"

    @property
    def exhausted(self) -> bool:
        """Whether so many validations as patience allows have come after the best one."""
        since = [entry for entry in self.curve if self.step is not None and entry["step"] > self.step]
        return self.patience is not None and len(since) >= self.patience

    def note(self, step: int, loss: float) -> bool:
        """Add a measurement; say whether it is the best."""
        self.curve.append({"step": step, "loss": loss})
        return self.step == step

    def forget_others(self, curves: Iterable[Curve]) -> None:
        """Remove files that are the best of none of these curves, nor of this one."""
        kept = {f"best-{best_step(curve)}.safetensors" for curve in (*curves, self.curve)}
        for path in self.work.glob("best-*.safetensors"):
            if path.name not in kept:
                path.unlink()


def best_step(curve: Curve) -> int | None:
    return int(min(curve, key=lambda entry: (entry["loss"], entry["step"]))["step"]) if curve else None
