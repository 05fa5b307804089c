"""Prune a model: block by block where activations count, with the pruned blocks' activations passed on.

The order of work is the Wanda repository's: for each decoder block, measure its linears' inputs over all calibration
sequences, prune it, run it once more, and hand its new outputs to the next block.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from phoenix_sparse.masks import apply_masks
from phoenix_sparse.models import decoder_blocks, linears, prunable_linears
from phoenix_sparse.progress import Progress
from phoenix_sparse.pruning.importance import ColumnNorms, magnitude_importance, random_importance, wanda_importance
from phoenix_sparse.pruning.selection import keep_globally, keep_per_layer, keep_per_row
from phoenix_sparse.pruning.settings import SparsifySettings


@torch.no_grad()
def prune(
    model: Any, settings: SparsifySettings, *, tokens: Tensor | None, seed: int, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Prune a model in place and give its masks.

    Args:
        model: a causal language model, in eval mode.
        settings: sparsity, importance and comparison group.
        tokens: (sequences, tokens), the calibration set; only Wanda needs it.
        seed: for the random importance.
        progress: called with (what, done, all) after each block.

    Returns:
        Boolean masks on the CPU by layer name; the model's weights are already zero off them.
    """
    if settings.importance != "wanda":
        layers = prunable_linears(model)
        scored = ((name, _score_weight(layer.weight, settings, seed, name)) for name, layer in layers.items())
        if settings.comparison_group == "global":
            masks = _select(dict(scored), settings)
        else:  # one layer's scores at a time
            masks = {name: _select({name: score}, settings)[name].cpu() for name, score in scored}
        apply_masks(masks, layers)
        return _on_cpu(masks)
    assert tokens is not None, "Wanda needs calibration tokens"
    if settings.comparison_group == "global":
        # One threshold for all needs all scores first, so every block sees the dense model's activations.
        scores: dict[str, Tensor] = {}
        for _, layers, norms in _walk(model, tokens, progress, prune_block=None):
            scores |= {name: wanda_importance(layers[name].weight, norms[name].mean) for name in layers}
        masks = keep_globally(scores, settings.sparsity)
        apply_masks(masks, prunable_linears(model))
        return _on_cpu(masks)

    masks = {}

    def prune_block(layers: dict[str, nn.Linear], norms: dict[str, ColumnNorms]) -> None:
        chosen = _select({name: wanda_importance(layers[name].weight, norms[name].mean) for name in layers}, settings)
        apply_masks(chosen, layers)
        masks.update(_on_cpu(chosen))

    for _ in _walk(model, tokens, progress, prune_block):
        pass
    return masks


def _score_weight(weight: Tensor, settings: SparsifySettings, seed: int, name: str) -> Tensor:
    if settings.importance == "random":
        return random_importance(weight, seed, name)
    return magnitude_importance(weight)


def _select(scores: dict[str, Tensor], settings: SparsifySettings) -> dict[str, Tensor]:
    if settings.comparison_group == "global":
        return keep_globally(scores, settings.sparsity)
    keep = keep_per_row if settings.comparison_group == "row" else keep_per_layer
    return {name: keep(layer, settings.sparsity) for name, layer in scores.items()}


def _on_cpu(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: mask.cpu() for name, mask in masks.items()}


PruneBlock = Callable[[dict[str, nn.Linear], dict[str, ColumnNorms]], None]


def _walk(
    model: Any, tokens: Tensor, progress: Progress | None, prune_block: PruneBlock | None
) -> Iterator[tuple[str, dict[str, nn.Linear], dict[str, ColumnNorms]]]:
    """Visit the blocks in order with their input norms; `prune_block` acts before the outputs are passed on."""
    blocks = decoder_blocks(model)
    hidden, calls = _block_inputs(model, list(blocks.values()), tokens)
    for index, (name, block) in enumerate(blocks.items()):
        layers = linears(block, name)
        norms = {layer: ColumnNorms(module.in_features, module.weight.device) for layer, module in layers.items()}
        with _measuring(layers, norms):
            outputs = [_run(block, state, calls[index]) for state in hidden]
        if prune_block is not None:
            prune_block(layers, norms)
            outputs = [_run(block, state, calls[index]) for state in hidden]
        hidden = outputs
        yield name, layers, norms
        if progress is not None:
            progress("pruning block", index + 1, len(blocks))


class _Stop(Exception):
    """Ends a forward pass once the first block's input is known."""


def _block_inputs(model: Any, blocks: list[nn.Module], tokens: Tensor) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Catch the first block's inputs for every sequence, and the keyword arguments that each block is called with.

    Blocks can differ in theirs (sliding and full attention masks), and all sequences have the same length, so one
    full pass over the first sequence tells them for all.
    """
    device = next(model.parameters()).device
    calls: list[dict[str, Any]] = []
    hidden: list[Tensor] = []

    def note_call(_block: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append({key: value for key, value in kwargs.items() if key not in ("hidden_states", "past_key_values")})

    def catch_input(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    hooks = [block.register_forward_pre_hook(note_call, with_kwargs=True) for block in blocks]
    model(tokens[:1].to(device), use_cache=False)
    for hook in hooks:
        hook.remove()
    hook = blocks[0].register_forward_pre_hook(catch_input, with_kwargs=True)
    for row in tokens:
        try:
            model(row[None].to(device), use_cache=False)
        except _Stop:
            continue
    hook.remove()
    return hidden, calls


def _run(block: nn.Module, state: Tensor, kwargs: dict[str, Any]) -> Tensor:
    output = block(state, **kwargs)
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _measuring(layers: dict[str, nn.Linear], norms: dict[str, ColumnNorms]) -> Iterator[None]:
    def measure(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, args: norms[name].add(args[0])

    hooks = [module.register_forward_pre_hook(measure(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
