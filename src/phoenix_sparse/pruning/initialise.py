"""Step 1 as a whole: measure, share out, prune."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_json, write_json
from phoenix_sparse.models import check_finite, linears, prunable_linears
from phoenix_sparse.progress import Progress
from phoenix_sparse.pruning.allocating import Shares, allocate, sparsities
from phoenix_sparse.pruning.blocks import Blocks
from phoenix_sparse.pruning.fitting import require_fit
from phoenix_sparse.pruning.gradients import Row, measure_gradients
from phoenix_sparse.pruning.linear import Method
from phoenix_sparse.pruning.selection import keep_globally
from phoenix_sparse.pruning.sequential import Gradients, prune_blocks, score_blocks
from phoenix_sparse.pruning.settings import SparsifySettings
from phoenix_sparse.pruning.streaming import FinishedBlocks, StreamedBlocks
from phoenix_sparse.pruning.structured import structured_masks


@dataclass
class Calibration:
    """What is measured on. All may be missing where the settings don't need them.

    Attributes:
        tokens: (sequences, tokens), int64.
        labels: the same, -100 where a token doesn't count for an evolutionary fitness; all count without it.
        rows: tokenized examples with labels, for gradients of the task's loss.
    """

    tokens: Tensor | None = None
    labels: Tensor | None = None
    rows: Sequence[Row] = ()


def initialise(
    blocks: Blocks,
    settings: SparsifySettings,
    calibration: Calibration,
    *,
    seed: int,
    work: Path | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Tensor], Shares]:
    """Prune a model in place.

    Args:
        blocks: of a dense model in memory or on disk, in eval mode.
        settings: of the recipe.
        calibration: what the settings need to measure on.
        seed: for what is drawn.
        work: a directory for finished blocks and gradients; a stopped pruning of the same model goes on from what lies
            there. Blocks on disk need one: it is where the pruned ones go (`FinishedBlocks(work / "blocks")`).
        progress: called with (what, done, all).

    Returns:
        Boolean masks on the CPU by linear, and the allocation.

    Raises:
        PhoenixError: what the settings measure on is missing or isn't for this model, the settings don't fit its
            shapes (`require_fit`), the model is in training mode or has a weight that is NaN or infinite, `work` is of
            another pruning, or a step refuses what it finds.
    """
    method = Method.of(settings, seed)
    _check(blocks, settings, calibration.tokens, work)
    if work is not None:
        _claim(work, blocks, settings, calibration, seed)
    finished = FinishedBlocks(work / "blocks") if work else None
    gradients: Gradients | None = None
    if settings.reads_gradients:
        directory = work / "gradients" if work else None
        gradients = measure_gradients(blocks, calibration.rows, directory=directory, progress=progress)
    tokens = calibration.tokens
    if method.group == "global" or method.pattern.kind == "structured":
        scores: dict[str, Tensor] = {}
        score_blocks(
            blocks,
            method,
            tokens=tokens,
            gradients=gradients,
            visit=lambda name, _weight, score: scores.update({name: score.cpu()}),
            progress=progress,
        )
        if method.group == "global":
            masks = keep_globally(scores, settings.sparsity)
        else:
            masks = structured_masks(blocks.model, scores, settings.sparsity)
        _apply(blocks, masks, finished)
        return masks, Shares(sparsities(masks))
    kept = work / "allocation.json" if work else None
    if kept is not None and kept.is_file():
        shares = Shares(**read_json(kept))
    else:
        shares = allocate(
            blocks,
            settings,
            method,
            tokens=tokens,
            labels=calibration.labels,
            gradients=gradients,
            progress=progress,
        )
        if kept is not None:
            write_json(kept, asdict(shares))
    masks = prune_blocks(
        blocks,
        method,
        shares.sparsity,
        tokens=tokens,
        gradients=gradients,
        finished=finished,
        progress=progress,
    )
    return masks, shares


def prune(
    model: Any,
    settings: SparsifySettings,
    *,
    tokens: Tensor | None = None,
    seed: int = 0,
    rows: Sequence[Row] = (),
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Prune a model in memory, in place, and give its masks.

    Args:
        model: a causal language model, in eval mode.
        settings: sparsity, importance, pattern, allocation and so on.
        tokens: (sequences, tokens), the calibration set (`calibration_tokens`), where `settings.reads_tokens`.
        seed: for what is drawn.
        rows: tokenized examples (`tokenize`), where `settings.reads_gradients`.
        progress: called with (what, done, all) after each block.

    Returns:
        Boolean masks on the CPU by layer name; the model's weights are already zero off them.
    """
    return initialise(Blocks(model), settings, Calibration(tokens, rows=rows), seed=seed, progress=progress)[0]


def _check(blocks: Blocks, settings: SparsifySettings, tokens: Tensor | None, work: Path | None) -> None:
    """Refuse what can't end well before any of the work is done."""
    if blocks.model.training:
        raise PhoenixError("model: it is in training mode, where dropout may be at work; call model.eval() first")
    if isinstance(blocks, StreamedBlocks) and work is None:
        raise PhoenixError("work: the pruned blocks of a model on disk need a directory to go to; give one")
    require_fit(blocks.model, settings)
    if not isinstance(blocks, StreamedBlocks):  # which look at what they read
        check_finite(blocks.model, "model")
    if not settings.reads_tokens:
        return
    if tokens is None or tokens.dim() != 2 or tokens.numel() == 0 or tokens.is_floating_point():
        shape = "none" if tokens is None else f"{tuple(tokens.shape)} of {tokens.dtype}"
        raise PhoenixError(
            f"calibration: these settings measure on tokens and there are {shape}; give whole numbers (sequences, "
            "tokens), such as calibration_tokens makes"
        )
    rows = blocks.model.get_input_embeddings().weight.shape[0]
    if int(tokens.min()) < 0 or int(tokens.max()) >= rows:
        raise PhoenixError(
            f"calibration: tokens from {int(tokens.min())} to {int(tokens.max())}, and the model has embeddings for "
            f"{rows}; are they of this model's tokenizer?"
        )


def _claim(work: Path, blocks: Blocks, settings: SparsifySettings, calibration: Calibration, seed: int) -> None:
    """Note in `work` what it is for; refuse what another pruning left there. (A model is known by its shapes alone.)"""
    digest = hashlib.sha256()
    for name, layer in prunable_linears(blocks.model).items():
        digest.update(f"{name} {tuple(layer.weight.shape)} {layer.weight.dtype}\n".encode())
    for tensor in (calibration.tokens, calibration.labels):
        digest.update(repr(None if tensor is None else tensor.tolist()).encode())
    for row in calibration.rows:
        digest.update(repr(([*row["input_ids"]], [*row["labels"]])).encode())
    facts = {"settings": settings.model_dump(mode="json"), "seed": seed, "inputs": digest.hexdigest()}
    kept = work / "inputs.json"
    if kept.is_file() and read_json(kept) != facts:
        raise PhoenixError(f"work: {work} holds what a pruning with other inputs left; remove it, or give another")
    write_json(kept, facts)


@torch.no_grad()
def _apply(blocks: Blocks, masks: Mapping[str, Tensor], finished: FinishedBlocks | None) -> None:
    for name in blocks.names:
        with blocks.opened(name) as block:
            layers = linears(block, name)
            for layer, module in layers.items():
                module.weight.masked_fill_(~masks[layer].to(module.weight.device), 0)
            if finished is not None:
                finished.save(name, block, {layer: masks[layer] for layer in layers})
