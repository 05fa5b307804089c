"""Step 2 on files: a sparse model and its masks in, an adapter or trained weights out, and the choice among them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phoenix_sparse import processes
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.evaluation.settings import EvaluateSettings
from phoenix_sparse.files import write_json
from phoenix_sparse.finetuning.settings import FinetuneSettings, SearchSettings
from phoenix_sparse.masks import Masks
from phoenix_sparse.models import empty_model, load_config
from phoenix_sparse.steps.machine import Machine, longest
from phoenix_sparse.tasks import Task


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
    logs: str = "logs",
) -> list[str]:
    """Step 2: train the super-adapter, through the masks unless they are None; or the kept weights themselves.

    Writes the adapter (or the trained weights, in its place) and tune.json. Several processes call this together; the
    main one writes.

    Raises:
        PhoenixError: what `finetuning.trainer.train` raises, or masks are missing that the method needs.
    """
    from phoenix_sparse.finetuning import full
    from phoenix_sparse.finetuning.adapter import save_adapter
    from phoenix_sparse.finetuning.examples import tokenize
    from phoenix_sparse.finetuning.trainer import train

    require_trackers(settings)
    processes.start(machine.device)
    model, tokenizer = machine.open(source)
    if settings.method == "full":
        if masks is None:
            raise PhoenixError("finetune.method: full trains under masks; give them, or use method=lora")
        trained = full.train_weights(model, masks, settings.targets)
    else:
        trained, space = _super_adapter(model, masks, settings, machine.seed)
    room = min(settings.max_length, longest(source))
    rows = tokenize(task.train, tokenizer, room)
    held_out = tokenize(task.validation, tokenizer, room) if settings.validate_every is not None else []
    record = train(
        trained,
        rows,
        settings,
        pad=tokenizer.pad_token_id,
        seed=machine.seed,
        work=work,
        validation=held_out,
        logs=out / logs,
        progress=machine.progress,
    )
    if processes.is_main():
        record["examples_left_out"] = len(task.train) - len(rows)
        if settings.method == "full":
            assert masks is not None
            weights = {name: layer.rounded for name, layer in full.trained_linears(trained).items()}
            full.save_weights(weights, out / adapter, masks)
        else:
            written = space if isinstance(settings.ranks, Mapping) else settings.ranks
            save_adapter(trained, out / adapter, masks, written)
        write_json(out / "tune.json", record)
    return [adapter, "tune.json"]


def _super_adapter(model: Any, masks: Masks | None, settings: FinetuneSettings, seed: int) -> tuple[Any, Any]:
    """A model with its adapter on, and the ranks that its layers may have."""
    from phoenix_sparse.finetuning.adapter import add_super_adapter, target_linears
    from phoenix_sparse.finetuning.elastic import spaces

    space = spaces(target_linears(model, settings.targets), settings.ranks)
    adapted = add_super_adapter(
        model,
        space,
        scale=settings.scale,
        masks=masks,
        seed=seed,
        targets=settings.targets,
        dropout=settings.dropout,
        method=settings.method,
        scale_rule=settings.scale_rule,
    )
    return adapted, space


def require_validation(task: Task) -> None:
    """Refuse a task by whose examples no sub-adapter could be chosen, before hours of work lead up to that."""
    if not task.validation:
        raise PhoenixError(f"task {task.name}: no examples to validate with; set task.validation above 0")


def require_targets(source: Path, settings: FinetuneSettings) -> None:
    """Refuse adapter targets, and ranks for layers, that the model doesn't have, from its configuration alone."""
    from phoenix_sparse.finetuning.adapter import target_linears
    from phoenix_sparse.finetuning.elastic import spaces

    targets = target_linears(empty_model(load_config(source)), settings.targets)
    if settings.method != "full":
        spaces(targets, settings.ranks)


def require_trackers(settings: FinetuneSettings) -> None:
    """Refuse trackers that are unknown or not installed."""
    from phoenix_sparse.finetuning.trackers import choose_trackers

    choose_trackers(settings.trackers)


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
    """Step 2, its end: choose a sub-adapter on the validation split. Writes search.json and adapter/chosen.

    Trained weights have no ranks: they are the one candidate, evaluated all the same, and adapter/chosen is theirs.
    """
    from phoenix_sparse.evaluation import harness
    from phoenix_sparse.finetuning import full
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
    examples = min(settings.examples, len(task.validation))

    def accuracy(model: Any) -> searching.Score:
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

    whole = full.is_full(adapter)
    if whole:
        model, layers = full.load_weights(base, adapter, masks), list[str]()
    else:
        model = load_adapter(base, adapter, masks)
        layers = list(elastic_layers(model))

    def score(ranks: searching.Ranks) -> searching.Score:
        if whole:
            return accuracy(model)
        set_ranks(model, ranks)
        with written_out(model):
            return accuracy(model)

    def parameters(ranks: searching.Ranks) -> int:
        return full.kept_weights(adapter, masks) if whole else adapter_parameters(model, ranks)

    record = searching.search(
        layers,
        {} if whole else adapter_space(adapter),
        settings,
        evaluate=score,
        count_parameters=parameters,
        seed=machine.seed,
        journal=work / "candidates.jsonl",
        progress=machine.progress,
    )
    record["validation_examples"] = examples
    if whole:
        record["method"] = "none (method full has no ranks)"
        full.copy_weights(adapter, out / "adapter" / "chosen")
    else:
        set_ranks(model, record["candidates"][record["choice"]]["ranks"])
        save_adapter(model, out / "adapter" / "chosen", masks)
    write_json(out / "search.json", record)
    return ["adapter/chosen", "search.json"]
