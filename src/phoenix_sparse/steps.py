"""The steps on files: each reads model directories and masks, writes its own files, and knows nothing of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.evaluation.settings import EvaluateSettings, PerplexitySettings
from phoenix_sparse.files import read_text, write_json
from phoenix_sparse.finetuning.settings import FinetuneSettings, SearchSettings
from phoenix_sparse.masks import Masks, compute_sparsity_stats, load_mask, plot_sparsity_histogram, save_mask
from phoenix_sparse.models import (
    empty_model,
    find_device,
    fit_tokenizer,
    load_config,
    load_model,
    load_tokenizer,
    prunable_linears,
    save_model,
)
from phoenix_sparse.progress import Progress
from phoenix_sparse.pruning.settings import SparsifySettings
from phoenix_sparse.settings import Device, Dtype, Settings
from phoenix_sparse.tasks import Task

# Texts on which a merge is compared with its adapter where no task is given.
SAMPLE_TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Question: What is 17 plus 25?\nAnswer: 17 + 25 = 42.",
    "In the beginning there was a small village by the sea, and everyone in it knew how to count fish.",
]


class Common(Settings):
    """Options that every step has."""

    dtype: Dtype = "auto"
    device: Device = "auto"
    seed: int = Field(0, ge=0, lt=2**32)


@dataclass(frozen=True)
class Machine:
    """How models are loaded and where they compute."""

    dtype: Dtype = "auto"
    device: Device = "auto"
    seed: int = 0
    progress: Progress | None = None

    def load(self, directory: Path) -> Any:
        return load_model(directory, self.dtype, self.device)

    def open(self, directory: Path) -> tuple[Any, Any]:
        """A model with its tokenizer."""
        model, tokenizer = self.load(directory), load_tokenizer(directory)
        fit_tokenizer(model, tokenizer, directory)
        return model, tokenizer


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
        "importance": settings.importance,
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

    longest, wanted = _longest(source), settings.calibration
    tokens, labels, rows = None, None, list[dict[str, list[int]]]()
    if settings.allocation == "evolutionary" and task is not None and wanted.source == "task":
        # Candidates are judged by the task's completions.
        pairs = [(example.prompt, example.completion) for example in task.train]
        tokens, labels = labelled_calibration_tokens(wanted, pairs, tokenizer, max_length=longest, seed=machine.seed)
    elif settings.reads_tokens:
        examples = [example.prompt + example.completion for example in task.train] if task else []
        tokens = calibration_tokens(wanted, examples, tokenizer, max_length=longest, seed=machine.seed)
    if settings.reads_gradients:
        if task is None:
            raise PhoenixError(f"sparsify: {settings.importance} needs the gradients of a task's loss; give a task")
        chosen = choose_examples(task.train, settings.calibration.samples, machine.seed)
        rows = tokenize(chosen, tokenizer, min(settings.calibration.length, longest))
    return Calibration(tokens, labels, rows)


def calibration_facts(calibration: Any) -> dict[str, int | None]:
    """How much was measured on, as files keep it."""
    tokens = calibration.tokens
    return {
        "calibration_sequences": None if tokens is None else tokens.shape[0],
        "calibration_length": None if tokens is None else tokens.shape[1],
        "calibration_examples": len(calibration.rows) or None,
    }


def tune(
    source: Path,
    masks: Masks | None,
    task: Task,
    settings: FinetuneSettings,
    out: Path,
    machine: Machine,
    *,
    adapter: str = "adapter/super",
    work: Path,
) -> list[str]:
    """Step 2: train the super-adapter, through the masks unless they are None. Writes the adapter and tune.json."""
    from phoenix_sparse.finetuning.adapter import add_super_adapter, save_adapter, target_linears
    from phoenix_sparse.finetuning.elastic import spaces
    from phoenix_sparse.finetuning.examples import tokenize
    from phoenix_sparse.finetuning.trainer import train

    model, tokenizer = machine.open(source)
    space = spaces(target_linears(model, settings.targets), settings.ranks)
    adapted = add_super_adapter(
        model,
        space,
        scale=settings.scale,
        masks=masks,
        seed=machine.seed,
        targets=settings.targets,
        dropout=settings.dropout,
        method=settings.method,
        scale_rule=settings.scale_rule,
    )
    rows = tokenize(task.train, tokenizer, min(settings.max_length, _longest(source)))
    record = train(
        adapted,
        rows,
        settings,
        pad=tokenizer.pad_token_id,
        seed=machine.seed,
        work=work,
        progress=machine.progress,
    )
    record["examples_left_out"] = len(task.train) - len(rows)
    save_adapter(adapted, out / adapter, masks, space if isinstance(settings.ranks, Mapping) else settings.ranks)
    write_json(out / "tune.json", record)
    return [adapter, "tune.json"]


def require_validation(task: Task) -> None:
    """Refuse a task by whose examples no sub-adapter could be chosen, before hours of work lead up to that."""
    if not task.validation:
        raise PhoenixError(f"task {task.name}: no examples to validate with; set task.validation above 0")


def require_room(source: Path, task: Task, perplexity: PerplexitySettings | None) -> None:
    """Refuse generated texts and windows that are longer than the model's context."""
    from phoenix_sparse.evaluation.harness import check_room

    context = _longest(source)
    check_room(task.harness_task("validation", 1), context)
    if perplexity is not None and perplexity.context_length > context:
        raise PhoenixError(
            f"evaluate.perplexity.context_length is {perplexity.context_length}; the model's whole context is {context}"
        )


def require_targets(source: Path, settings: FinetuneSettings) -> None:
    """Refuse adapter targets, and ranks for layers, that the model doesn't have, from its configuration alone."""
    from phoenix_sparse.finetuning.adapter import target_linears
    from phoenix_sparse.finetuning.elastic import spaces

    spaces(target_linears(empty_model(load_config(source)), settings.targets), settings.ranks)


def search(
    source: Path,
    masks: Masks | None,
    task: Task,
    adapter: Path,
    settings: SearchSettings,
    evaluate: EvaluateSettings,
    out: Path,
    machine: Machine,
    *,
    work: Path,
) -> list[str]:
    """Step 2, its end: choose a sub-adapter on the validation split. Writes search.json and adapter/chosen."""
    from phoenix_sparse.evaluation import harness
    from phoenix_sparse.finetuning import search as searching
    from phoenix_sparse.finetuning.adapter import (
        adapter_parameters,
        adapter_space,
        elastic_layers,
        load_adapter,
        save_adapter,
        set_ranks,
        written_out,
    )

    require_validation(task)
    base, tokenizer = machine.open(source)
    model = load_adapter(base, adapter, masks)
    layers = elastic_layers(model)
    examples = min(settings.examples, len(task.validation))

    def score(ranks: searching.Ranks) -> searching.Score:
        set_ranks(model, ranks)
        with written_out(model):
            results = harness.evaluate(
                model,
                tokenizer,
                task,
                split="validation",
                batch_size=evaluate.batch_size,
                limit=examples,
                seed=machine.seed,
            )["phoenix"]
        return searching.Score(results["accuracy"], results["stderr"])

    record = searching.search(
        layers,
        adapter_space(adapter),
        settings,
        evaluate=score,
        count_parameters=lambda ranks: adapter_parameters(model, ranks),
        seed=machine.seed,
        journal=work / "candidates.jsonl",
        progress=machine.progress,
    )
    record["validation_examples"] = examples
    set_ranks(model, record["candidates"][record["choice"]]["ranks"])
    save_adapter(model, out / "adapter" / "chosen", masks)
    write_json(out / "search.json", record)
    return ["adapter/chosen", "search.json"]


def merge(
    source: Path,
    masks: Masks,
    adapter: Path,
    out: Path,
    machine: Machine,
    *,
    remask: bool = False,
    texts: list[str],
) -> list[str]:
    """Step 3: merge the adapter and certify the result as it lies on the disk. Writes merged/ and certificate.json.

    Raises:
        CheckFailed: a sparse merge left a non-zero off the mask.
    """
    from phoenix_sparse import merging
    from phoenix_sparse.finetuning.adapter import is_masked, load_adapter
    from phoenix_sparse.masks import require_preserved

    base, tokenizer = machine.open(source)
    masked = is_masked(adapter)
    rows = [tokenizer(text).input_ids[: _longest(source)] for text in texts]
    adapted = load_adapter(base, adapter, masks if masked else None)
    before = merging.sample_logits(adapted, rows, tokenizer.pad_token_id)
    save_model(merging.merge(adapted, remask=masks if remask else None), tokenizer, out / "merged")
    del adapted, base  # two whole models at once would be the largest need of the run
    merged = machine.load(out / "merged")
    if masked or remask:
        require_preserved(masks, prunable_linears(merged), str(out / "merged"))
    certificate = merging.certify(
        merged,
        masks,
        before=before,
        after=merging.sample_logits(merged, rows, tokenizer.pad_token_id),
        mode="sparse_to_sparse" if masked else "sparse_to_dense",
        adapter=adapter,
        merged=out / "merged",
    )
    write_json(out / "certificate.json", certificate)
    return ["merged", "certificate.json"]


def merge_dense(source: Path, adapter: Path, out: Path, machine: Machine) -> None:
    """Merge an adapter without masks into its dense model."""
    from phoenix_sparse import merging
    from phoenix_sparse.finetuning.adapter import load_adapter

    base, tokenizer = machine.open(source)
    save_model(merging.merge(load_adapter(base, adapter, None)), tokenizer, out)


def evaluate(source: Path, task: Task | None, settings: EvaluateSettings, out: Path, machine: Machine) -> list[str]:
    """Score a model on a split of a task and on a text, where they are given. Writes eval.json, perplexity.json."""
    from phoenix_sparse.evaluation import harness

    model, tokenizer = machine.open(source)
    written = []
    if task is not None:
        results = harness.evaluate(
            model, tokenizer, task, split=settings.split, batch_size=settings.batch_size, seed=machine.seed
        )
        write_json(out / "eval.json", results)
        written.append("eval.json")
    if settings.perplexity is not None:
        write_json(out / "perplexity.json", measure_perplexity(model, tokenizer, settings.perplexity))
        written.append("perplexity.json")
    return written


def measure_perplexity(model: Any, tokenizer: Any, settings: PerplexitySettings) -> dict[str, Any]:
    from phoenix_sparse.evaluation.perplexity import perplexity

    return perplexity(
        model,
        tokenizer,
        read_text(settings.text, "evaluate.perplexity.text"),
        context_length=settings.context_length,
        max_tokens=settings.max_tokens,
        label=settings.text.name,
    )


def flops(source: Path, masks: Masks | None, settings: EvaluateSettings, out: Path) -> list[str]:
    """Count FLOPs, dense and at the masks' densities, from the configuration alone. Writes flops.json."""
    from phoenix_sparse.evaluation.flops import count_flops

    densities = {name: int(mask.sum()) / mask.numel() for name, mask in masks.items()} if masks is not None else None
    counts = count_flops(
        load_config(source), densities, prompt_length=settings.prompt_length, context_length=settings.context_length
    )
    write_json(out / "flops.json", counts)
    return ["flops.json"]


def read_masks(path: Path) -> Masks:
    return load_mask(path)[0]


def _longest(source: Path) -> int:
    """Tokens that the model has positions for."""
    return int(getattr(load_config(source), "max_position_embeddings", 2**30))
