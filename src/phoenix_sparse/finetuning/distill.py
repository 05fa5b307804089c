"""Distillation: a frozen dense model computes beside the sparse one, which learns its logits and its blocks' outputs.

Both losses are sums over tokens that the trainer divides by the scored tokens of the whole step, as it does with the
cross-entropy: the gradient doesn't depend on how a step is cut into micro-batches, or shared by processes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.finetuning.batching import Batch
from phoenix_sparse.finetuning.examples import IGNORED
from phoenix_sparse.finetuning.sections import DistillSettings


class Teacher:
    """A frozen model and what is learnt of it."""

    def __init__(self, model: Any, settings: DistillSettings) -> None:
        self.model, self.settings = model.requires_grad_(False).eval(), settings

    @property
    def asks(self) -> dict[str, bool]:
        """What a model's forward pass is asked for beside the logits."""
        return {"output_hidden_states": True} if self.settings.hidden else {}

    def losses(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """The losses that have a weight, `logits` and `hidden`, before it: each a sum over a micro-batch's tokens.

        Args:
            outputs: of the student on the batch, asked for `asks`.
            batch: with `labels`, on the device.

        Returns:
            Scalars, float32, to be divided by the step's scored tokens.
        """
        chosen, found = self.settings, {}
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "use_cache")}
        with torch.no_grad():
            taught = self.model(**inputs, **self.asks, use_cache=False)
        if chosen.logits:
            scored = batch["labels"][:, 1:] != IGNORED
            # Only the scored tokens' logits become float32: they are few among a prompt's.
            ours, theirs = (logits[:, :-1][scored].float() for logits in (outputs.logits, taught.logits))
            found["logits"] = divergence(ours, theirs, chosen.temperature)
        if chosen.hidden:
            shares = token_shares(batch)
            # The first of the states is the embeddings', which are frozen and the same.
            pairs = zip(outputs.hidden_states[1:], taught.hidden_states[1:], strict=True)
            found["hidden"] = torch.stack([relative_error(*pair, shares) for pair in pairs]).sum()
        return found

    def weighted(self, losses: Mapping[str, Tensor]) -> Tensor:
        """What is minimised: the sum of the losses, `task` among them, each times its weight."""
        weights = self.settings.model_dump()
        return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()


class Apart:
    """The losses by name, summed as the Trainer sums the whole: over the steps since the last entry of the log."""

    def __init__(self) -> None:
        self._newest: list[dict[str, Tensor]] = []
        self._sums: dict[str, Tensor] = {}
        self._steps: set[int] = set()

    def begin(self) -> None:
        """Begin a micro-batch, and forget one that wasn't kept."""
        self._newest = []

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Take what a pass over a part of the micro-batch adds."""
        self._newest.append({name: loss.detach() for name, loss in losses.items()})

    def keep(self, step: int) -> None:
        """The micro-batch counts, in this step."""
        for losses in self._newest:
            self._steps.add(step)
            for name, loss in losses.items():
                self._sums[name] = self._sums[name] + loss if name in self._sums else loss

    def take(self, mean: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means over the steps, and begin anew.

        Args:
            mean: over the processes, which all call this together.
        """
        found = {name: float(mean(total)) / len(self._steps) for name, total in self._sums.items()}
        self._sums, self._steps = {}, set()
        return found


def require_alike(teacher: Any, student: Any, settings: DistillSettings, where: str) -> None:
    """Refuse a teacher with another vocabulary; or with other blocks, where these are to be learnt.

    Args:
        teacher: its configuration.
        student: its configuration.
        settings: of the recipe.
        where: the teacher's directory, for the message.

    Raises:
        PhoenixError: naming what differs.
    """
    fields = ("vocab_size", *(("hidden_size", "num_hidden_layers") if settings.hidden else ()))
    for field in fields:
        there, here = getattr(teacher, field, None), getattr(student, field, None)
        if there != here:
            raise PhoenixError(
                f"finetune.distill.teacher: {where} has {field} {there} and the model {here}; "
                "give the dense model that it was pruned from, or one tuned from that"
            )


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Sum over tokens of T²·KL(softmax(t/T) ‖ softmax(s/T)) (Hinton et al., arXiv 1503.02531, section 2.1).

    Args:
        student: logits s, (tokens, vocabulary), float32.
        teacher: logits t, likewise.
        temperature: T. T² keeps the gradient's size the same when T changes.
    """
    ours, theirs = (functional.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    return functional.kl_div(ours, theirs, reduction="sum", log_target=True) * temperature**2


def relative_error(student: Tensor, teacher: Tensor, shares: Tensor) -> Tensor:
    """Sum over tokens of share·|s - t|²/|t|², of one block's outputs: a scalar in float32.

    SquareHead (Kurtic et al., arXiv 2310.06927) divides the mean square of the error by that of the teacher, both over
    the batch, and adds the blocks up. Here every token is divided by its own: the result doesn't depend on what else is
    in the batch, and a first token, whose state may be a thousand times the others' size, doesn't hide them.

    Args:
        student: s, (rows, tokens, hidden).
        teacher: t, likewise; frozen.
        shares: (rows, tokens), float32 (`token_shares`).
    """
    result: Tensor = _RelativeError.apply(student, teacher, shares)
    return result


class _RelativeError(torch.autograd.Function):
    """Saves the two states as they are, which both models keep anyway, and nothing of them in float32."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, shares: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher, shares)
        return ((student.float() - teacher.float()).square().sum(-1) * _over_squares(teacher, shares)).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (student, teacher, shares), (grad,) = ctx.saved_tensors, grads
        factor = 2 * grad * _over_squares(teacher, shares)
        return ((student.float() - teacher.float()) * factor[..., None]).to(student.dtype), None, None


def _over_squares(teacher: Tensor, shares: Tensor) -> Tensor:
    return shares / teacher.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)


def token_shares(batch: Batch) -> Tensor:
    """How much each token counts: all of an example's alike, together as much as it has scored tokens.

    Prompts count, too, and an example weighs as much as in the cross-entropy. Padding counts nothing.

    Args:
        batch: `labels` with `attention_mask` (padded) or `position_ids` (packed), (rows, tokens).

    Returns:
        (rows, tokens), float32, with the sum of the batch's scored tokens.
    """
    labels = batch["labels"]
    scored = functional.pad((labels[:, 1:] != IGNORED).float(), (1, 0))
    if "position_ids" in batch:  # every example begins at 0, and so does the padding, which has nothing scored
        example = (batch["position_ids"] == 0).long().cumsum(1) - 1
        seen = torch.ones_like(scored)
    else:
        example = torch.zeros_like(labels)
        seen = batch["attention_mask"].float()
    sums = torch.zeros_like(scored).scatter_add(1, example, scored)
    counts = torch.zeros_like(scored).scatter_add(1, example, seen)
    return seen * (sums / counts.clamp_min(1)).gather(1, example)
