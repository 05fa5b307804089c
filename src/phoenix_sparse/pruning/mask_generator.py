"""Masks of a model in memory, or of plain tensors, from scores of its weights. Nothing is pruned: weights stay as are.

What needs inputs or gradients (Wanda, Taylor, ...) takes them measured beforehand, all on the dense model. Pruning
that measures, block by block with the pruned blocks' outputs passed on, is `phoenix_sparse.prune`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.models import prunable_linears
from phoenix_sparse.pruning.importance import Importance, Seen, find_importance, run_importance
from phoenix_sparse.pruning.selection import keep, keep_globally
from phoenix_sparse.pruning.structured import structured_levels

Method = Literal["unstructured", "structured", "random"]
Masks = dict[str, Tensor]

# A weight inside a numbered block, as Llama, OPT (layers), GPT-2 (h) and MPT (blocks) name them.
BLOCK_WEIGHT = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+\.(.+)\.weight$")
DENSE = re.compile(r"embed|norm|ln_|lm_head|relative_attention_bias")


def compute_unstructured_mask(
    model: nn.Module,
    sparsity: float = 0.5,
    importance_metric: str = "magnitude",
    global_pruning: bool = False,
    *,
    seed: int = 0,
    seen: Mapping[str, Seen] | None = None,
) -> Masks:
    """Drop the weights of lowest importance, each alone.

    Args:
        model: a causal language model; its prunable linears are those inside decoder blocks.
        sparsity: share to drop, in [0, 1).
        importance_metric: a registered importance (`importances()` lists them).
        global_pruning: one comparison over all layers, of which each keeps 1% of its weights in any case. Otherwise
            ⌊n · sparsity⌋ of the n weights of each layer go, or of each output row where the importance compares rows.
        seed: for random importances.
        seen: by layer name, what the importance needs beside the weights: `input_norm` for wanda and ria, `gradient`
            for gradient and taylor, both for gblm.

    Returns:
        Boolean (out, in) on the CPU by layer name, True where a weight is kept. Ties go by position; for the same
        scores, the masks of a higher sparsity are inside those of a lower one.

    Raises:
        PhoenixError: a bad sparsity or name, something in `seen` is missing, or a layer that is NaN or infinite
            somewhere, by its name.
    """
    return MaskGenerator(
        model, sparsity, "unstructured", importance_metric, global_pruning=global_pruning, seed=seed, seen=seen
    ).generate_masks()


def compute_structured_mask(
    model: nn.Module,
    sparsity: float = 0.5,
    importance_metric: str = "magnitude",
    *,
    attention: bool = True,
    seed: int = 0,
    seen: Mapping[str, Seen] | None = None,
) -> Masks:
    """Drop the MLP channels and key-value groups of lowest mean importance; `structured.shrink` takes them out.

    `attention=False` prunes MLPs alone. Arguments and errors otherwise as `compute_unstructured_mask` and
    `structured.structured_masks`.
    """
    return MaskGenerator(
        model, sparsity, "structured", importance_metric, attention=attention, seed=seed, seen=seen
    ).generate_masks()


def compute_random_mask(model: nn.Module, sparsity: float = 0.5, seed: int = 0) -> Masks:
    """Drop ⌊n · sparsity⌋ weights of each layer by lot: the baseline.

    A layer's mask depends on the seed, its name and its shape alone. Returns and errors as `compute_unstructured_mask`.
    """
    return MaskGenerator(model, sparsity, "random", seed=seed).generate_masks()


def compute_masks_for_state_dict(
    state_dict: Mapping[str, Any],
    sparsity: float = 0.5,
    method: Literal["unstructured", "random"] = "unstructured",
    importance_metric: str = "magnitude",
    seed: int = 0,
    *,
    global_pruning: bool = False,
    seen: Mapping[str, Seen] | None = None,
) -> Masks:
    """Masks of plain tensors, without a model.

    Pruned is each 2-D floating-point `weight` whose name lies in a numbered block (`...layers.3.mlp.up_proj.weight`,
    also `h.` and `blocks.`). Everything else stays dense and has no mask: embeddings, lm_head, norms, biases, and
    what stands outside the blocks.

    Args:
        state_dict: tensors by name, as `model.state_dict()` or a safetensors file gives them.
        method: `structured` needs to know the heads, so it takes a model.
        sparsity, importance_metric, seed, global_pruning, seen: as in `compute_unstructured_mask`.

    Returns:
        Boolean masks on the CPU by the names of the linears, which are the tensors' without `.weight`: the keys tell
        what is pruned.

    Raises:
        PhoenixError: as `compute_unstructured_mask`; or no name lies in a block.
    """
    _check_sparsity(sparsity)
    _check_method(method)
    if method == "structured":
        raise PhoenixError("method: structured needs the model's configuration; use compute_structured_mask(model, …)")
    if not isinstance(state_dict, Mapping):
        raise PhoenixError(
            f"state_dict: {type(state_dict).__name__} given; give tensors by name (compute_unstructured_mask: a model)"
        )
    weights = {
        name.removesuffix(".weight"): value
        for name, value in state_dict.items()
        if _is_in_a_block(name) and _is_matrix(value)
    }
    if not weights:
        raise PhoenixError(
            "state_dict: no 2-D weight has a name inside a block, such as model.layers.0.mlp.up_proj.weight; "
            "give the tensors of a decoder's checkpoint by their names"
        )
    importance = find_importance("random" if method == "random" else importance_metric)
    return _unstructured(_Scores(weights, importance, seed, seen), [sparsity], global_pruning)[sparsity]


class MaskGenerator:
    """Masks of one model, by one method and importance, at one sparsity or several."""

    def __init__(
        self,
        model: nn.Module,
        sparsity: float = 0.5,
        method: Method = "unstructured",
        importance_metric: str = "magnitude",
        *,
        global_pruning: bool = False,
        attention: bool = True,
        seed: int = 0,
        seen: Mapping[str, Seen] | None = None,
    ) -> None:
        """See `compute_unstructured_mask` for the arguments; `method` is unstructured, structured or random.

        Raises:
            PhoenixError: the sparsity is not in [0, 1), or the method or the importance isn't known.
        """
        _check_sparsity(sparsity)
        _check_method(method)
        self.model = model
        self.sparsity = sparsity
        self.method = method
        self.importance = find_importance("random" if method == "random" else importance_metric)
        self.global_pruning = global_pruning and method == "unstructured"
        self.attention = attention
        self.seed = seed
        self.seen = seen

    def generate_masks(self) -> Masks:
        """The masks at the generator's sparsity: boolean (out, in) on the CPU by layer name, True where kept."""
        return self.generate_levels([self.sparsity])[self.sparsity]

    def generate_levels(self, sparsities: Sequence[float]) -> dict[float, Masks]:
        """The masks at several sparsities, by sparsity. Each layer is scored once, and its scores let go.

        (Global pruning has to hold and sort the scores of all layers: at its peak about 24 bytes a weight.)
        """
        for sparsity in sparsities:
            _check_sparsity(sparsity)
        weights = {name: layer.weight for name, layer in prunable_linears(self.model).items()}
        scores = _Scores(weights, self.importance, self.seed, self.seen)
        if self.method == "structured":
            return structured_levels(self.model, scores, sparsities, attention=self.attention)
        return _unstructured(scores, sparsities, self.global_pruning)


class _Scores(Mapping[str, Tensor]):
    """Scores (out, in) by layer name, computed when they are looked up."""

    def __init__(
        self, weights: Mapping[str, Tensor], importance: Importance, seed: int, seen: Mapping[str, Seen] | None
    ) -> None:
        self.weights, self.importance, self.seed, self.seen = weights, importance, seed, seen or {}
        for name, weight in weights.items():  # all, before any is scored
            self._seen(name)
            if not torch.isfinite(weight).all():
                count = int((~torch.isfinite(weight)).sum())
                raise PhoenixError(f"{name}: {count} weights are NaN or infinite; such a layer can't be pruned")

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, name: str) -> Tensor:
        weight = self.weights[name].detach()
        scores = run_importance(self.importance, weight, self._seen(name))
        if scores.shape != weight.shape or scores.isnan().any():
            raise PhoenixError(
                f"importance: {self.importance.name} gave scores of shape {tuple(scores.shape)} for {name}, "
                f"{tuple(weight.shape)}, {int(scores.isnan().sum())} of them NaN; it must give a number for each weight"
            )
        return scores

    def _seen(self, name: str) -> Seen:
        found = replace(self.seen.get(name, Seen()), name=name, seed=self.seed)
        out, inner = self.weights[name].shape
        needs = {
            "input_norm": (found.input_norm, (inner,), self.importance.inputs),
            "gradient": (found.gradient, (out, inner), self.importance.gradients),
        }
        for what, (value, shape, needed) in needs.items():
            if needed and (value is None or value.shape != shape):
                raise PhoenixError(
                    f"importance: {self.importance.name} needs the {what} {shape} of {name}; measure it and give "
                    f"seen={{{name!r}: Seen({what}=…), …}}, or prune with phoenix_sparse.prune, which measures"
                )
        return found


def _unstructured(scores: _Scores, sparsities: Sequence[float], everywhere: bool) -> dict[float, Masks]:
    if everywhere:
        held = {name: score.cpu() for name, score in scores.items()}
        return {sparsity: keep_globally(held, sparsity) for sparsity in sparsities}
    levels: dict[float, Masks] = {sparsity: {} for sparsity in sparsities}
    for name, score in scores.items():
        for sparsity, masks in levels.items():
            masks[name] = keep(score, sparsity, "row" if scores.importance.per_row else "layer").cpu()
    return levels


def _is_in_a_block(name: str) -> bool:
    found = BLOCK_WEIGHT.search(name)
    return found is not None and not DENSE.search(found[1])


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()


def _check_sparsity(sparsity: float) -> None:
    if not isinstance(sparsity, Real) or not 0 <= sparsity < 1:
        raise PhoenixError(f"sparsity: {sparsity!r} is not in [0, 1); 0.5 drops half of the weights")


def _check_method(method: str) -> None:
    if method not in get_args(Method):
        raise PhoenixError(f"method: {method!r} is not known; use one of {', '.join(get_args(Method))}")
