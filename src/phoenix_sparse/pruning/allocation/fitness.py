"""How far a model pruned by an allocation is from the dense one, on the task's own tokens."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.allocation.budget import unit
from phoenix_sparse.pruning.patterns import UNSTRUCTURED, Pattern
from phoenix_sparse.pruning.selection import Group, keep

Measure = Literal["kl", "loss"]

IGNORED = -100
"""The label of a token that is not part of the measure, as in transformers."""
ROWS = 1024
"""Positions whose log-probabilities are held in float32 at a time."""


class _Batch(NamedTuple):
    """Sequences cut behind the last position that counts, and what belongs to their positions."""

    tokens: Tensor  # (sequences, width), int64
    counted: Tensor  # (sequences, width), boolean: the next token has a label
    labels: Tensor  # (positions,), int64
    dense: Tensor | None  # (positions, vocabulary), log-probabilities


class DivergenceFitness:
    """The fitness of allocations for `evolve`, measured on a model in memory. Lower is better.

    The model is pruned in place, without weight updates: off the masks that selection makes of the scores at a layer's
    sparsity its weights are zero. Nothing else may change these layers in between. `restore` gives the dense weights
    back to the last bit; so does leaving a `with`.

    Memory beside the model: a copy of the pruned layers' weights; the scores, as they were given; and for `kl` labelled
    positions x vocabulary x 2 bytes of dense log-probabilities (10,000 positions of a vocabulary of 128,256: 2.6 GB),
    rounded to float16 and normalised again when used. While it computes, the logits of one batch, and three float32
    tensors of 1024 positions x vocabulary.

    Attributes:
        sizes: weights of each layer.
        units: weights of each layer that selection drops at a time.
        positions: labelled positions that each stage looks at.
    """

    def __init__(
        self,
        model: Any,
        scores: Mapping[str, Tensor],
        inputs: Tensor,
        *,
        labels: Tensor | None = None,
        stages: Sequence[int],
        group: Group,
        pattern: Pattern = UNSTRUCTURED,
        measure: Measure = "kl",
        batch_size: int = 8,
        store_dtype: torch.dtype = torch.float16,
        store_on: torch.device | str | None = None,
    ) -> None:
        """Copy the dense weights and, for `kl`, run the dense model once.

        Args:
            model: a causal language model with dense weights; it is put into eval mode.
            scores: (out, in) by layer, on any device; higher is kept.
            inputs: (sequences, tokens), int64, padded on the right if at all.
            labels: as in transformers: the inputs with −100 where a token doesn't count; the first token of a sequence
                never does. All tokens count without them.
            stages: how many sequences, from the first on, each stage looks at; rising.
            group: comparison group of the scores; `row`, or else the whole layer.
            pattern: unstructured or block.
            measure: `kl`, the mean over labelled positions of KL(dense ‖ pruned) in nats, or `loss`, the task's mean
                cross-entropy.
            batch_size: sequences of one forward pass.
            store_dtype: of the kept log-probabilities.
            store_on: where they are kept; on the model's device without it.

        Raises:
            PhoenixError: a layer is missing or of another shape than its scores, the pattern can't be allocated, or
                tokens, labels and stages don't fit each other.
        """
        self._model, self._group, self._pattern = model.eval(), group, pattern
        self._device = next(model.parameters()).device
        self._scores = dict(scores)
        self._layers = {name: _layer(model, name, score) for name, score in scores.items()}
        shapes = {name: layer.weight.shape for name, layer in self._layers.items()}
        for name, (out, inner) in shapes.items():
            pattern.check(name, (out, inner))
        self.sizes = {name: out * inner for name, (out, inner) in shapes.items()}
        self.units = dict.fromkeys(shapes, unit(pattern))
        self._dense = {name: layer.weight.detach().clone() for name, layer in self._layers.items()}
        self._sparsity: dict[str, float] = {}  # of the layers that are not dense now
        labels = inputs if labels is None else labels
        _check_tokens(inputs, labels, stages, measure, batch_size)
        self._batches: list[_Batch] = []
        self._ends: list[int] = []  # batches of each stage
        self.positions: list[int] = []
        begin = 0
        for end in stages:
            for first in range(begin, end, batch_size):
                chosen = slice(first, min(first + batch_size, end))
                batch = _cut(inputs[chosen].cpu(), labels[chosen].cpu())
                if batch is not None and measure == "kl":
                    batch = batch._replace(dense=self._log_probabilities(batch, store_dtype, store_on))
                self._batches += [] if batch is None else [batch]
            begin = end
            self._ends.append(len(self._batches))
            self.positions.append(sum(len(batch.labels) for batch in self._batches))
        if not self.positions[0]:
            raise PhoenixError("sparsify.allocation: the first stage's sequences have no labelled token; use more")

    @torch.no_grad()
    def __call__(self, allocation: Mapping[str, float], stage: int) -> float:
        """Prune by an allocation, as far as it differs from the last one, and measure.

        Args:
            allocation: sparsity by layer, of exactly the layers that have scores.
            stage: which of the stages, from 0.

        Returns:
            Mean over the stage's labelled positions; NaN where the pruned model's logits are.
        """
        self._prune(allocation)
        total = sum(self._measure(batch) for batch in self._batches[: self._ends[stage]])
        return total / self.positions[stage]

    def restore(self) -> None:
        """Give all layers their dense weights back."""
        with torch.no_grad():
            for name in list(self._sparsity):
                self._layers[name].weight.copy_(self._dense[name])
                del self._sparsity[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def _prune(self, allocation: Mapping[str, float]) -> None:
        if different := sorted(allocation.keys() ^ self._layers.keys()):
            raise PhoenixError(
                f"sparsify.allocation: the allocation and the scores name different layers, {different[0]} for one"
            )
        for name, sparsity in allocation.items():
            if self._sparsity.get(name) == sparsity:
                continue
            weight, dense = self._layers[name].weight, self._dense[name]
            mask = keep(self._scores[name].to(weight.device), sparsity, self._group, self._pattern, exact=True)
            # An interrupted copy is neither dense nor pruned: it is restored, or made again.
            self._sparsity[name] = math.nan
            weight.copy_(dense.masked_fill(~mask, 0))
            self._sparsity[name] = sparsity

    def _logits(self, batch: _Batch) -> Tensor:
        """(positions, vocabulary), in the model's dtype."""
        logits = self._model(input_ids=batch.tokens.to(self._device), use_cache=False).logits
        return logits[batch.counted.to(logits.device)]

    @torch.no_grad()
    def _log_probabilities(self, batch: _Batch, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        # Not below the dtype's range: 0 · ∞ would not be 0.
        lowest = torch.finfo(dtype).min
        parts = self._logits(batch).split(ROWS)
        return torch.cat(
            [part.float().log_softmax(-1).clamp_min(lowest).to(dtype).to(device or part.device) for part in parts]
        )

    def _measure(self, batch: _Batch) -> float:
        """The sum over a batch's positions, added up in float64."""
        logits, total = self._logits(batch), 0.0
        for first in range(0, len(logits), ROWS):
            pruned = logits[first : first + ROWS].float().log_softmax(-1)
            if batch.dense is None:
                labels = batch.labels[first : first + ROWS].to(pruned.device)
                sums = -pruned.gather(1, labels[:, None])
            else:
                dense = batch.dense[first : first + ROWS].to(pruned.device).float().log_softmax(-1)
                sums = nn.functional.kl_div(pruned, dense, reduction="none", log_target=True).sum(-1)
            total += float(sums.sum(dtype=torch.float64))
        return total


def _cut(tokens: Tensor, labels: Tensor) -> _Batch | None:
    """Drop what lies behind the last position that counts: a causal model can't see it from there."""
    counted = torch.zeros_like(labels, dtype=torch.bool)
    counted[:, :-1] = labels[:, 1:] != IGNORED
    if not counted.any():
        return None
    width = int(counted.any(0).nonzero().max()) + 1
    return _Batch(tokens[:, :width], counted[:, :width], labels[:, 1:][counted[:, :-1]], None)


def _layer(model: nn.Module, name: str, score: Tensor) -> nn.Linear:
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise PhoenixError(
            f"sparsify.allocation: there are scores for {name} and the model has no such layer"
        ) from error
    if not isinstance(layer, nn.Linear) or layer.weight.shape != score.shape:
        raise PhoenixError(
            f"sparsify.allocation: {name} has scores of shape {tuple(score.shape)}, which are not those of a linear "
            "layer's weight there"
        )
    return layer


def _check_tokens(inputs: Tensor, labels: Tensor, stages: Sequence[int], measure: str, batch_size: int) -> None:
    where = "sparsify.allocation"
    if inputs.dim() != 2 or inputs.shape != labels.shape:
        raise PhoenixError(
            f"{where}: tokens {tuple(inputs.shape)} and labels {tuple(labels.shape)} must be of one shape, "
            "(sequences, tokens)"
        )
    if not stages or list(stages) != sorted(stages) or not 1 <= stages[0] <= stages[-1] <= len(inputs):
        raise PhoenixError(
            f"{where}: stages {list(stages)} must rise from 1 at least to {len(inputs)} sequences at most"
        )
    if measure not in ("kl", "loss") or batch_size < 1:
        raise PhoenixError(f"{where}: the fitness is kl or loss, in batches of 1 or more; not {measure}, {batch_size}")
