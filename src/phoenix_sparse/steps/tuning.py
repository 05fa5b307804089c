"""Step 2 on files: a sparse model and its masks in, an adapter or trained weights out, and the choice among them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from phoenix_sparse import processes
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.evaluation.settings import EvaluateSettings
from phoenix_sparse.files import write_json
from phoenix_sparse.finetuning.sections import DistillSettings
from phoenix_sparse.finetuning.settings import FinetuneSettings, SearchSettings
from phoenix_sparse.masks import Masks, require_pruned, save_mask
from phoenix_sparse.models import empty_model, find_model, load_config, load_tokenizer, prunable_linears
from phoenix_sparse.steps.machine import Machine, longest
from phoenix_sparse.tasks import Task

EVOLVED = "masks_evolved.safetensors"
OF_A_RUN = ("dense", "dense_lora")  # teachers that a recipe's run has


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
    teacher: Path | None = None,
) -> list[str]:
    """Step 2: train the super-adapter, through the masks unless they are None; or the kept weights themselves.

    Writes the adapter (or the trained weights, in its place), tune.json, and masks_evolved.safetensors where
    `finetune.evolve` changes the masks: the adapter belongs to these. The dense model to distil from is `teacher`, or
    the directory that `finetune.distill.teacher` gives. Several processes call this together; the
    main one writes.

    Raises:
        PhoenixError: what `finetuning.trainer.train` raises, or masks are missing that the method needs.
    """
    from phoenix_sparse.finetuning import full
    from phoenix_sparse.finetuning.adapter import save_adapter
    from phoenix_sparse.finetuning.evolve import moving_masks
    from phoenix_sparse.finetuning.examples import tokenize
    from phoenix_sparse.finetuning.trainer import train

    require_trackers(settings)
    processes.start(machine.device)
    model, tokenizer = machine.open(source)
    if masks is not None:
        require_pruned(masks, prunable_linears(model), str(source))
    learnt_from = _teacher(model, tokenizer, settings, teacher, machine)
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
        teacher=learnt_from,
        logs=out / logs,
        progress=machine.progress,
    )
    written = [adapter, "tune.json"]
    if settings.evolve is not None:
        assert masks is not None, "the settings go with sparse_to_sparse"
        learner = trained if settings.method == "full" else trained.get_base_model()
        masks = {**masks, **{name: one.mask.cpu() for name, one in moving_masks(learner).items()}}
        written.append(EVOLVED)
    if processes.is_main():
        record["examples_left_out"] = len(task.train) - len(rows)
        if settings.evolve is not None:
            assert masks is not None
            save_mask(masks, out / EVOLVED, {"evolved": settings.evolve.model_dump(), "changes": record["changes"]})
        if settings.method == "full":
            assert masks is not None
            weights = {name: layer.rounded for name, layer in full.trained_linears(trained).items()}
            full.save_weights(weights, out / adapter, masks)
        else:
            ranks = space if isinstance(settings.ranks, Mapping) else settings.ranks
            save_adapter(trained, out / adapter, masks, ranks, evolved=settings.evolve is not None)
        write_json(out / "tune.json", record)
    return written


def _teacher(model: Any, tokenizer: Any, settings: FinetuneSettings, given: Path | None, machine: Machine) -> Any:
    """The model to distil from, or None."""
    if settings.distill is None:
        return None
    if given is None and settings.distill.teacher in OF_A_RUN:
        raise PhoenixError(
            f"finetune.distill.teacher: {settings.distill.teacher} is known in a run alone; give a model's directory"
        )
    directory = given or find_model(settings.distill.teacher)
    teacher, words = machine.open(directory)
    require_alike(teacher.config, model.config, settings.distill, str(directory))
    if words.get_vocab() != tokenizer.get_vocab():
        raise PhoenixError(f"finetune.distill.teacher: {directory} has another tokenizer; give a model of the same")
    return teacher


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


def require_trainable(source: Path, task: Task, settings: FinetuneSettings) -> None:
    """Refuse a training without an example, or one too short for its mask to change, before the pruning.

    Raises:
        PhoenixError: as the training would raise it.
    """
    from phoenix_sparse.finetuning.evolve import require_change
    from phoenix_sparse.finetuning.examples import require_rows, tokenize

    room, tokenizer = min(settings.max_length, longest(source)), load_tokenizer(source)
    # The first that fits is enough, and no large set has to be tokenized twice.
    require_rows(any(tokenize([example], tokenizer, room) for example in task.train))
    if settings.evolve is not None:  # with the most steps that there can be: each example that doesn't fit makes fewer
        require_change(settings.evolve, settings.count_steps(len(task.train)))


def require_alike(teacher: Any, student: Any, settings: DistillSettings, where: str) -> None:
    """Refuse a model whose configuration doesn't fit the one that is to learn from it."""
    from phoenix_sparse.finetuning import distill

    distill.require_alike(teacher, student, settings, where)


def require_adapter(directory: Path) -> None:
    """Refuse a directory that holds neither an adapter nor trained weights."""
    from phoenix_sparse.finetuning.adapter import require_record

    require_record(directory)


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
    Several processes call this together and share the candidates; the main one chooses and writes.

    Raises:
        PhoenixError: there is no such super-adapter, it belongs to other masks than those given or to none, or there is
            nothing to validate with, or to search.
    """
    from phoenix_sparse.evaluation import harness
    from phoenix_sparse.finetuning import adapter as adapters
    from phoenix_sparse.finetuning import full
    from phoenix_sparse.finetuning import search as searching
    from phoenix_sparse.finetuning.elastic import is_fixed, spaces
    from phoenix_sparse.finetuning.examples import PadRight, tokenize
    from phoenix_sparse.finetuning.memory import AtOnce
    from phoenix_sparse.finetuning.stopping import validation_loss
    from phoenix_sparse.finetuning.together import Together

    require_validation(task)
    processes.start(machine.device)
    base, tokenizer = machine.open(source)
    examples = min(settings.examples, len(task.validation))
    whole = full.is_full(adapter)
    if whole:
        model, layers = full.load_weights(base, adapter, masks), list[str]()
    else:
        if masks is not None and not adapters.is_masked(adapter):
            raise PhoenixError(f"search: {adapter} was trained without masks; leave --masks out")
        model = adapters.load_adapter(base, adapter, masks)
        layers = list(adapters.elastic_layers(model))
    if settings.nsga2 and (whole or is_fixed(spaces(layers, adapters.adapter_space(adapter)))):
        raise PhoenixError(f"search.nsga2: {adapter} has one rank or none, so nothing is searched; set nsga2=0")

    @contextmanager
    def computing(ranks: searching.Ranks) -> Iterator[None]:
        if whole:
            yield
        else:
            adapters.set_ranks(model, ranks)
            with adapters.written_out(model):
                yield

    def score(ranks: searching.Ranks) -> searching.Score:
        with computing(ranks):
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

    rows = tokenize(task.validation[:examples], tokenizer, longest(source)) if settings.pool > 1 else []

    def loss(ranks: searching.Ranks) -> float:
        at_once = AtOnce(evaluate.batch_size)
        with computing(ranks):
            return validation_loss(model, rows, PadRight(tokenizer.pad_token_id), at_once, step=0)

    def parameters(ranks: searching.Ranks) -> int:
        return full.kept_weights(adapter, masks) if whole else adapters.adapter_parameters(model, ranks)

    together = Together({"score": score, "loss": loss})
    outputs = ["adapter/chosen", "search.json"]
    if not processes.is_main():
        together.serve()
        return outputs
    record = searching.search(
        layers,
        {} if whole else adapters.adapter_space(adapter),
        settings,
        evaluate=partial(together.ask, "score"),
        losses=partial(together.ask, "loss"),
        count_parameters=parameters,
        seed=machine.seed,
        journal=work / "candidates.jsonl",
        progress=machine.progress,
    )
    together.finish()
    record["validation_examples"] = examples
    if whole:
        record["method"] = "none (method full has no ranks)"
        full.copy_weights(adapter, out / "adapter" / "chosen")
    else:
        adapters.set_ranks(model, record["candidates"][record["choice"]]["ranks"])
        evolved = adapters.has_evolved(adapter)
        adapters.save_adapter(model, out / "adapter" / "chosen", masks, evolved=evolved)
    write_json(out / "search.json", record)
    return outputs
