"""Step 1 on files: a dense model in, masks and a sparse model out."""

from pathlib import Path
from typing import Any

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import write_json
from phoenix_sparse.masks import compute_sparsity_stats, plot_sparsity_histogram, save_mask
from phoenix_sparse.models import find_device, fit_tokenizer, load_tokenizer, save_model
from phoenix_sparse.pruning.settings import SparsifySettings
from phoenix_sparse.steps.machine import Machine, longest
from phoenix_sparse.tasks import Task


def sparsify(
    source: Path, task: Task | None, settings: SparsifySettings, out: Path, machine: Machine, *, work: Path
) -> list[str]:
    """Step 1: prune the dense model. Writes masks.safetensors, allocation.json, plots/ and sparse/.

    Blocks are streamed from the model's files where these allow it, and finished ones are kept in `work`.
    """
    from phoenix_sparse.pruning.initialise import initialise
    from phoenix_sparse.pruning.streaming import FinishedBlocks, StreamedBlocks, write_model

    blocks, tokenizer = open_blocks(source, settings, machine)
    calibration = calibrate(source, task, settings, tokenizer, machine)
    masks, shares = initialise(blocks, settings, calibration, seed=machine.seed, work=work, progress=machine.progress)
    facts = {
        "importance": settings.scored_by,
        "update": settings.update,
        "pattern": settings.pattern,
        "group": settings.comparison_group,
        "target_sparsity": settings.sparsity,
        "seed": machine.seed,
    } | calibration_facts(calibration)
    save_mask(masks, out / "masks.safetensors", facts)
    method = settings.allocation if isinstance(settings.allocation, str) else "explicit"
    stats = compute_sparsity_stats(masks)
    write_json(
        out / "allocation.json", {"method": method, "allocation": shares.sparsity} | facts | stats | shares.found
    )
    plot_sparsity_histogram(masks, out / "plots" / "sparsity.png")
    if isinstance(blocks, StreamedBlocks):
        write_model(blocks, FinishedBlocks(work / "blocks"), tokenizer, out / "sparse")
    else:
        save_model(blocks.model, tokenizer, out / "sparse")
    return ["masks.safetensors", "allocation.json", "plots", "sparse"]


def open_blocks(source: Path, settings: SparsifySettings, machine: Machine) -> tuple[Any, Any]:
    """The blocks of a model, streamed from its files where they and the method allow it, and its tokenizer.

    Raises:
        PhoenixError: a weight is NaN or infinite, or the settings don't fit the model's shapes: told now, not when
            pruning has come to the block.
    """
    from phoenix_sparse.pruning.blocks import Blocks
    from phoenix_sparse.pruning.fitting import require_fit
    from phoenix_sparse.pruning.streaming import open_streamed

    streamed = None
    if settings.allocation != "evolutionary":  # which runs the whole model again and again
        streamed = open_streamed(source, machine.dtype, find_device(machine.device))
    blocks = streamed or Blocks(machine.load(source))
    require_fit(blocks.model, settings)
    if streamed is not None:
        for name in filter(streamed.in_block, streamed.checkpoint.shapes):
            streamed.checkpoint.tensors({name: name})  # reads and checks it, one at a time
    tokenizer = load_tokenizer(source)
    fit_tokenizer(blocks.model, tokenizer, source)
    return blocks, tokenizer


def calibrate(source: Path, task: Task | None, settings: SparsifySettings, tokenizer: Any, machine: Machine) -> Any:
    """What the settings measure on, from the task's training examples or a text."""
    from phoenix_sparse.finetuning.examples import tokenize
    from phoenix_sparse.pruning.calibration import (
        calibration_tokens,
        choose_examples,
        labelled_calibration_tokens,
    )
    from phoenix_sparse.pruning.initialise import Calibration

    room, wanted = longest(source), settings.calibration
    tokens, labels, rows = None, None, list[dict[str, list[int]]]()
    if settings.allocation == "evolutionary" and task is not None and wanted.source == "task":
        # Candidates are judged by the task's completions.
        pairs = [(example.prompt, example.completion) for example in task.train]
        tokens, labels = labelled_calibration_tokens(wanted, pairs, tokenizer, max_length=room, seed=machine.seed)
    elif settings.reads_tokens:
        examples = [example.prompt + example.completion for example in task.train] if task else []
        tokens = calibration_tokens(wanted, examples, tokenizer, max_length=room, seed=machine.seed)
    if settings.reads_gradients:
        if task is None:
            raise PhoenixError(f"sparsify: {settings.importance} needs the gradients of a task's loss; give a task")
        chosen = choose_examples(task.train, settings.calibration.samples, machine.seed)
        rows = tokenize(chosen, tokenizer, min(settings.calibration.length, room))
    return Calibration(tokens, labels, rows)


def calibration_facts(calibration: Any) -> dict[str, int | None]:
    """How much was measured on, as files keep it."""
    tokens = calibration.tokens
    return {
        "calibration_sequences": None if tokens is None else tokens.shape[0],
        "calibration_length": None if tokens is None else tokens.shape[1],
        "calibration_examples": len(calibration.rows) or None,
    }
