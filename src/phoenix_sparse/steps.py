"""The steps on files: each reads model directories and masks, writes its own files, and knows nothing of a run."""

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


def sparsify(source: Path, task: Task | None, settings: SparsifySettings, out: Path, machine: Machine) -> list[str]:
    """Step 1: prune the dense model. Writes masks.safetensors, allocation.json, plots/ and sparse/."""
    from phoenix_sparse.pruning.calibration import calibration_tokens
    from phoenix_sparse.pruning.sequential import prune

    model, tokenizer = machine.open(source)
    tokens = None
    if settings.importance == "wanda":
        examples = [example.prompt + example.completion for example in task.train] if task else []
        longest = getattr(model.config, "max_position_embeddings", settings.calibration.length)
        tokens = calibration_tokens(settings.calibration, examples, tokenizer, max_length=longest, seed=machine.seed)
    masks = prune(model, settings, tokens=tokens, seed=machine.seed, progress=machine.progress)
    stats = compute_sparsity_stats(masks)
    facts = {
        "importance": settings.importance,
        "group": settings.comparison_group,
        "target_sparsity": settings.sparsity,
        "seed": machine.seed,
        "calibration_sequences": None if tokens is None else tokens.shape[0],
        "calibration_length": None if tokens is None else tokens.shape[1],
    }
    save_mask(masks, out / "masks.safetensors", facts)
    write_json(out / "allocation.json", {"method": settings.importance} | facts | stats)
    plot_sparsity_histogram(masks, out / "plots" / "sparsity.png")
    save_model(model, tokenizer, out / "sparse")
    return ["masks.safetensors", "allocation.json", "plots", "sparse"]


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
    from phoenix_sparse.finetuning.adapter import add_adapter, save_adapter
    from phoenix_sparse.finetuning.examples import tokenize
    from phoenix_sparse.finetuning.trainer import train

    model, tokenizer = machine.open(source)
    adapted = add_adapter(
        model,
        rank=settings.ranks[0],
        scale=settings.scale,
        masks=masks,
        seed=machine.seed,
        targets=settings.targets,
        dropout=settings.dropout,
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
    save_adapter(adapted, out / adapter, masks, settings.ranks)
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


def require_targets(source: Path, targets: tuple[str, ...] | None) -> None:
    """Refuse adapter targets that the model doesn't have, from its configuration alone."""
    from phoenix_sparse.finetuning.adapter import target_names

    target_names(empty_model(load_config(source)), targets)


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
    """Score a model on a task's test split and on a text, where they are given. Writes eval.json, perplexity.json."""
    from phoenix_sparse.evaluation import harness

    model, tokenizer = machine.open(source)
    written = []
    if task is not None:
        results = harness.evaluate(
            model, tokenizer, task, split="test", batch_size=settings.batch_size, seed=machine.seed
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
