"""Prune one linear: score it, choose what stays, and adjust the kept weights where the settings say so."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.importance import Importance, Seen, find_importance, run_importance
from phoenix_sparse.pruning.observing import Observer
from phoenix_sparse.pruning.patterns import Pattern
from phoenix_sparse.pruning.reconstruction.alps import alps
from phoenix_sparse.pruning.reconstruction.dsnot import dsnot
from phoenix_sparse.pruning.reconstruction.sparsegpt import sparsegpt
from phoenix_sparse.pruning.selection import Group, keep
from phoenix_sparse.pruning.settings import CHOOSING, SparsifySettings, Update


@dataclass(frozen=True)
class Method:
    """The settings of one pruning, looked up and parsed."""

    importance: Importance
    update: Update
    pattern: Pattern
    group: Group
    seed: int
    exact: bool = False  # whether rows may differ by a weight, for a layer to meet its sparsity

    @classmethod
    def of(cls, settings: SparsifySettings, seed: int) -> "Method":
        importance = find_importance(settings.importance)
        # Uniform, rows lose alike, as the published Wanda has it. A sparsity that was shared out is met.
        exact = settings.allocation != "uniform"
        return cls(importance, settings.update, settings.parsed_pattern, settings.comparison_group, seed, exact)

    @property
    def reads_inputs(self) -> bool:
        return self.importance.inputs or self.update != "none"

    @property
    def observes(self) -> dict[str, bool]:
        """What `observing` has to gather beside the norms."""
        return {"gram": self.update in CHOOSING, "moments": self.update == "dsnot"}

    def score(self, name: str, weight: Tensor, observer: Observer | None, gradient: Tensor | None) -> Tensor:
        """Importance scores (out, in).

        Raises:
            PhoenixError: a score is NaN, or the function gave another shape, or changed the weight.
        """
        seen = Seen(name, self.seed, observer.norms.norm if observer else None, gradient)
        version = weight._version
        scores = run_importance(self.importance, weight.detach(), seen)
        if weight._version != version:
            raise PhoenixError(
                f"importance {self.importance.name}: it changes the weight of {name} in place; work on a copy"
            )
        if not isinstance(scores, Tensor):
            raise PhoenixError(
                f"importance {self.importance.name}: it gave a {type(scores).__name__} for {name}; "
                "it must give a tensor with one number for each weight"
            )
        if scores.shape != weight.shape or torch.isnan(scores).any():
            raise PhoenixError(
                f"importance {self.importance.name}: {tuple(scores.shape)} scores for {name}, {tuple(weight.shape)}, "
                f"{int(torch.isnan(scores).sum())} of them NaN; it must give one number for each weight"
            )
        # Scores outlive the weight as it is now: they must not be another view of it.
        return scores.clone() if scores.data_ptr() == weight.data_ptr() else scores


@torch.no_grad()
def prune_linear(
    name: str, linear: nn.Linear, sparsity: float, method: Method, observer: Observer | None, gradient: Tensor | None
) -> Tensor:
    """Prune a linear in place.

    Args:
        name: its full name.
        linear: weight (out, in).
        sparsity: of this layer; N:M patterns have their own.
        method: how.
        observer: of its inputs, where `method.reads_inputs`.
        gradient: (out, in), where the importance needs it.

    Returns:
        The boolean mask (out, in), on the weight's device.
    """
    weight = linear.weight
    method.pattern.check(name, (weight.shape[0], weight.shape[1]))
    if method.update in CHOOSING:
        assert observer is not None
        assert observer.gram is not None
        adjust = sparsegpt if method.update == "sparsegpt" else alps
        adjusted, mask = adjust(weight, observer.gram.matrix, sparsity, method.pattern, name=name)
        weight.copy_(adjusted)
        return mask
    scores = method.score(name, weight, observer, gradient)
    mask = keep(scores, sparsity, method.group, method.pattern, exact=method.exact)
    if method.update == "dsnot":
        assert observer is not None
        assert observer.moments is not None
        mask = dsnot(weight, mask, observer.moments, pattern=method.pattern, name=name)
    weight.masked_fill_(~mask, 0)
    return mask
