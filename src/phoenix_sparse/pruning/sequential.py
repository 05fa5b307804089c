"""Prune a model block by block, with the pruned blocks' activations passed on.

The order of work is the Wanda repository's: for each decoder block, observe its linears' inputs over all calibration
sequences, prune it, run it once more, and hand its new outputs to the next block.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from phoenix_sparse.models import linears
from phoenix_sparse.progress import Progress
from phoenix_sparse.pruning.blocks import Blocks
from phoenix_sparse.pruning.linear import Method, prune_linear
from phoenix_sparse.pruning.observing import observing
from phoenix_sparse.pruning.streaming import FinishedBlocks

Gradients = Mapping[str, Tensor]


@torch.no_grad()
def prune_blocks(
    blocks: Blocks,
    method: Method,
    allocation: Mapping[str, float],
    *,
    tokens: Tensor | None,
    gradients: Gradients | None = None,
    finished: FinishedBlocks | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Prune every block in place, first to last.

    Args:
        blocks: of a model in memory or on disk.
        method: how each linear is pruned.
        allocation: sparsity by linear.
        tokens: (sequences, tokens), the calibration set, where `method.reads_inputs`.
        gradients: by linear, where the importance needs them.
        finished: takes each pruned block, and gives those that an earlier attempt pruned.
        progress: called with (what, done, all) after each block that is pruned here, and at the start where an
            earlier attempt pruned some: these count once, though what they give is passed on again.

    Returns:
        Boolean masks on the CPU by linear; the weights are already zero off them.
    """
    hidden: list[Tensor] = []
    if method.reads_inputs:
        assert tokens is not None, f"{method.importance.name} with update {method.update} needs calibration tokens"
        hidden = [blocks.embed(row[None]) for row in tokens]
    masks: dict[str, Tensor] = {}
    before = {name for name in blocks.names if finished is not None and finished.has(name)}
    done = len(before)
    if progress is not None and done:
        progress("pruning block", done, len(blocks.names))
    for index, name in enumerate(blocks.names):
        with blocks.opened(name) as block:
            if finished is not None and name in before:
                block.load_state_dict(finished.state(name))
                kept = finished.masks(name)
                chosen = {layer: kept[layer] for layer in linears(block, name)}  # in the model's order again
            else:
                layers = linears(block, name)
                with observing(layers, **method.observes) as observers:
                    for state in hidden:
                        blocks.run(index, block, state)  # the outputs of the dense block are of no use
                chosen = {}
                for layer, module in layers.items():
                    observer = observers[layer] if hidden else None
                    gradient = gradients[layer].to(module.weight.device) if gradients else None
                    mask = prune_linear(layer, module, allocation[layer], method, observer, gradient)
                    chosen[layer] = mask.cpu()
                if finished is not None:
                    finished.save(name, block, chosen)
            if index + 1 < len(blocks.names):  # nobody reads the last block's outputs
                _pass_on(blocks, index, block, hidden)
        masks |= chosen
        if name not in before:
            done += 1
            if progress is not None:
                progress("pruning block", done, len(blocks.names))
    return masks


@torch.no_grad()
def score_blocks(
    blocks: Blocks,
    method: Method,
    *,
    tokens: Tensor | None,
    gradients: Gradients | None = None,
    progress: Progress | None = None,
    visit: Any,
) -> None:
    """Score every linear of the dense model: `visit(name, weight, scores)` is called for each, first to last."""
    hidden = [blocks.embed(row[None]) for row in tokens] if tokens is not None and method.importance.inputs else []
    for index, name in enumerate(blocks.names):
        with blocks.opened(name) as block:
            layers = linears(block, name)
            with observing(layers) as observers:
                _pass_on(blocks, index, block, hidden)
            for layer, module in layers.items():
                observer = observers[layer] if hidden else None
                gradient = gradients[layer].to(module.weight.device) if gradients else None
                visit(layer, module.weight, method.score(layer, module.weight, observer, gradient))
        if progress is not None:
            progress("scoring block", index + 1, len(blocks.names))


def _pass_on(blocks: Blocks, index: int, block: nn.Module, hidden: list[Tensor]) -> None:
    """Replace the block's inputs by its outputs, one by one, so that both are never there for all sequences."""
    for place, state in enumerate(hidden):
        hidden[place] = blocks.run(index, block, state)
