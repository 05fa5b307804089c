"""Cerebras jobs of a run: what a run directory holds goes out as an export and comes back as a certified model."""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phoenix_sparse import merging, pipeline
from phoenix_sparse.cerebras.bringing_back import bring_back, trained_logits
from phoenix_sparse.cerebras.environment import Environment
from phoenix_sparse.cerebras.export import Examples, export
from phoenix_sparse.cerebras.layout import RECORD
from phoenix_sparse.cerebras.trace import trace
from phoenix_sparse.cerebras.training import TrainingSettings
from phoenix_sparse.checkpoint import reading, weight_files
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import write_json
from phoenix_sparse.finetuning.examples import tokenize
from phoenix_sparse.masks import require_preserved
from phoenix_sparse.models import (
    empty_model,
    fit_tokenizer,
    load_config,
    load_model,
    load_tokenizer,
    prunable_linears,
    save_model,
)
from phoenix_sparse.recipe import Recipe, check, load_recipe, override
from phoenix_sparse.runs import RECIPE
from phoenix_sparse.steps import read_masks
from phoenix_sparse.steps.machine import longest
from phoenix_sparse.tasks import Task

NEEDED = (RECIPE, "masks.safetensors", "sparse")


def export_run(run: Path, out: Path, mode: str, changes: Iterable[str], environment: Environment) -> dict[str, Any]:
    """Export a run's pruned model and its task.

    Args:
        run: a run directory whose first step is done.
        out: the directory to write.
        mode: static or sparse_lora.
        changes: `key=value` for `TrainingSettings`, whose values are the recipe's otherwise.
        environment: with ModelZoo.

    Returns:
        The export's record.
    """
    recipe, task = _opened(run)
    source = run / "sparse"
    tokenizer = load_tokenizer(source)
    fit_tokenizer(empty_model(load_config(source)), tokenizer, source)
    room = min(recipe.finetune.max_length, longest(source))
    train, held_out = (tokenize(rows, tokenizer, room) for rows in (task.train, task.validation))
    settings = training_settings(recipe, mode, len(train), changes)
    if settings.mode == "sparse_lora" and recipe.finetune.targets is not None:
        raise PhoenixError("export: finetune.targets adapts some linears, and on a wafer every pruned one is adapted")
    examples = Examples(train, held_out, tokenizer.pad_token_id, room)
    return export(
        source, _weight_map(source), read_masks(run / "masks.safetensors"), examples, settings, out, environment
    )


def trace_run(directory: Path, mode: str, environment: Environment) -> dict[str, Any]:
    """Trace an export, or a run by exporting it to a place of its own first."""
    if (directory / RECORD).is_file():
        return trace(directory, environment)
    with tempfile.TemporaryDirectory(prefix="phoenix-trace-") as place:
        export_run(directory, Path(place) / "export", mode, (), environment)
        return trace(Path(place) / "export", environment)


def import_run(
    exported: Path, run: Path, out: Path, checkpoint: Path | None, environment: Environment
) -> dict[str, Any]:
    """Take a trained checkpoint back. Writes merged/ and certificate.json, as the third step does.

    The certificate compares the merged model's logits with those of ModelZoo's own model, its adapter unmerged.

    Args:
        exported: the directory that `export_run` wrote, with the job's model_dir.
        run: the run that it was made from.
        out: the directory to write to.
        checkpoint: an .mdl file; the latest of the job unless given.
        environment: with ModelZoo.

    Returns:
        The certificate.

    Raises:
        PhoenixError: another run's export, or a checkpoint that can't be merged.
        CheckFailed: a non-zero off the mask.
    """
    recipe, task = _opened(run)
    source, masks = run / "sparse", read_masks(run / "masks.safetensors")
    tokenizer = load_tokenizer(source)
    fit_tokenizer(empty_model(load_config(source)), tokenizer, source)
    with _made(out), tempfile.TemporaryDirectory(dir=out, prefix=".import-") as work:
        converted = Path(work) / "converted"
        taken = bring_back(exported, checkpoint, source, masks, converted, environment)
        # In the dtype of the original configuration; the wafer's weights are float32.
        save_model(load_model(converted, "auto", "cpu"), tokenizer, out / "merged")
    merged = load_model(out / "merged", "auto", "cpu")
    require_preserved(masks, prunable_linears(merged), str(out / "merged"))
    texts = (task.validation or task.train)[: recipe.evaluate.certificate_examples]
    rows = [tokenizer(text.prompt + text.completion).input_ids[: longest(source)] for text in texts]
    certificate = merging.certify(
        merged,
        masks,
        before=trained_logits(exported, taken, rows, environment),
        after=merging.sample_logits(merged, rows, tokenizer.pad_token_id),
        mode="sparse_to_sparse",
        adapter=taken,
        merged=out / "merged",
    )
    write_json(out / "certificate.json", certificate)
    return certificate


def _opened(run: Path) -> tuple[Recipe, Task]:
    """A run's recipe and task."""
    for name in NEEDED:
        if not (run / name).exists():
            raise PhoenixError(f"cerebras: {run} has no {name}; give a run directory whose pruning is done")
    recipe = load_recipe(run / RECIPE)
    # The run may have been on a GPU; what is done here needs none.
    return recipe, pipeline.prepare(recipe.model_copy(update={"device": "cpu"}))[1]


def training_settings(recipe: Recipe, mode: str, examples: int, changes: Iterable[str] = ()) -> TrainingSettings:
    """The recipe's fine-tuning, for the Trainer. The learning rate rises over the recipe's share of the steps.

    Args:
        recipe: of the run.
        mode: static or sparse_lora.
        examples: to train on.
        changes: `key=value`; where they change the steps, the warmup changes with them unless it is given, too.

    Raises:
        PhoenixError: a change doesn't fit.
    """
    values = override(_settings(recipe, mode, examples), changes)
    settings = check(TrainingSettings, values, "export")
    if "warmup" in settings.model_fields_set:
        return settings
    return check(TrainingSettings, values | {"warmup": int(recipe.finetune.warmup * settings.steps)}, "export")


def _settings(recipe: Recipe, mode: str, examples: int) -> dict[str, Any]:
    """The recipe's fine-tuning, for the Trainer, but for the warmup, which is a share of the steps."""
    given = recipe.finetune
    steps = max(1, given.count_steps(examples))
    ranks = given.largest_ranks
    rank = max(max(one) for one in ranks.values()) if isinstance(ranks, dict) else ranks[0]
    return {
        "mode": mode,
        "steps": steps,
        "batch_size": given.batch_size,
        "learning_rate": given.learning_rate,
        "weight_decay": given.weight_decay,
        "max_grad_norm": given.max_grad_norm,
        "checkpoint_every": given.checkpoint_every,
        "rank": rank,
        "scale": given.scale,
        "seed": recipe.seed,
    }


def _weight_map(source: Path) -> dict[str, str]:
    """The file of each tensor, by the tensor's name."""
    found: dict[str, str] = {}
    for file in weight_files(source):
        with reading(file) as reader:
            found |= dict.fromkeys(reader.keys(), file.name)
    return found


@contextmanager
def _made(directory: Path) -> Iterator[None]:
    """A directory that is there for the block, and gone again where that fails and leaves it empty."""
    new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if new and not any(directory.iterdir()):
            directory.rmdir()
        raise
