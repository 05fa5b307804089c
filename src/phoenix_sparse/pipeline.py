"""The whole story: dense model and task in, sparse fine-tuned model and its evidence out."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from phoenix_sparse import processes, steps
from phoenix_sparse.determinism import be_deterministic
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_text, sha256
from phoenix_sparse.models import empty_model, find_device, find_model, load_config, load_tokenizer, require_shapes
from phoenix_sparse.progress import Announce, Progress
from phoenix_sparse.pruning.fitting import require_fit
from phoenix_sparse.recipe import Recipe
from phoenix_sparse.runs import Run, Share, open_run
from phoenix_sparse.steps import Machine
from phoenix_sparse.steps.machine import longest
from phoenix_sparse.tasks import Task, TaskSettings, load_task, mix

BYTES_A_TOKEN = 64  # more than tokens have, in any text of length


def run(
    recipe: Recipe,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    announce: Announce | None = None,
    share: Share | None = None,
) -> Path:
    """Do what a recipe says.

    Args:
        recipe: from `load_recipe`.
        out: the run directory; runs/<name> unless given.
        resume: go on with a run that lies there, from the last stage or checkpoint that was finished.
        overwrite: remove a run that lies there.
        progress: called with (what, done, all).
        announce: called when a stage begins, ends or is skipped.
        share: does a stage's work, or finds it done by another run.

    Returns:
        The run directory.

    Raises:
        PhoenixError: for everything that is wrong with the input.
    """
    if not isinstance(recipe, Recipe):
        raise PhoenixError(
            f"run: {type(recipe).__name__} given; give a recipe, such as load_recipe('recipes/demo.yaml')"
        )
    model, task, also = prepare_all(recipe)
    texts = _texts(recipe)
    machine = Machine(recipe.dtype, recipe.device, recipe.seed, progress)
    with open_run(
        recipe,
        Path(out or Path("runs") / recipe.name),
        resume=resume,
        overwrite=overwrite,
        announce=announce,
        share=share,
    ) as this:
        this.describe(model={"path": recipe.model, "sha256": sha256(model)}, task=task.record(), texts=texts)
        if also:
            this.describe(also={other.name: other.record() for other in also})
        if (teacher := _teacher_directory(recipe)) is not None:
            this.describe(teacher={"path": str(teacher), "sha256": sha256(teacher)})

        # 1. Adaptive sparsity initialisation: which weights can the task do without?
        this.stage(
            "sparsify",
            lambda: steps.sparsify(model, task, recipe.sparsify, this.directory, machine, work=this.work("sparsify")),
        )

        # 2. Sparsity-aware fine-tuning through the mask, and the search for the best sub-adapter.
        distill = recipe.finetune.distill
        first = ("dense_lora",) if distill is not None and distill.teacher == "dense_lora" else ()
        for baseline in first:  # the teacher comes before what learns from it
            action = partial(_baseline, this, recipe, task, machine, model, baseline, also)
            this.stage(f"baseline {baseline}", action, together=True)
        this.stage("finetune", lambda: _finetune(this, recipe, task, machine, model), together=True)
        this.stage("search", lambda: _search(this, recipe, task, machine), together=True)

        # 3. The merge, which keeps every zero, and its certificate.
        this.stage("merge", lambda: _merge(this, recipe, task, machine))

        # The evidence.
        this.stage(
            "evaluate",
            lambda: steps.evaluate(this.path("merged"), task, recipe.evaluate, this.directory, machine, also),
        )
        for baseline in (name for name in recipe.evaluate.baselines if name not in first):
            action = partial(_baseline, this, recipe, task, machine, model, baseline, also)
            this.stage(f"baseline {baseline}", action, together=baseline == "dense_lora")
        this.stage("flops", lambda: _flops(this, recipe))
        this.stage("report", lambda: _report(this))
    return this.directory


def prepare(recipe: Recipe) -> tuple[Path, Task]:
    """Find the model, read the task, and check whatever can be checked before the work begins."""
    return prepare_all(recipe)[:2]


def prepare_all(recipe: Recipe) -> tuple[Path, Task, list[Task]]:
    """As `prepare`, with the further tasks to evaluate on.

    Raises:
        PhoenixError: for everything that is wrong with the input.
    """
    if recipe.deterministic:
        be_deterministic()
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    find_device(recipe.device)
    processes.start(recipe.device)
    model = model_directory(recipe.model)
    if any(other.mixture for other in recipe.evaluate.also):
        raise PhoenixError("evaluate.also: a further task is only evaluated on; give what to train on as task.mixture")
    if any(other.max_train is not None and not other.num_fewshot for other in recipe.evaluate.also):
        raise PhoenixError(
            "evaluate.also: a further task is only evaluated on, and max_train takes nothing; leave it out"
        )
    task = open_task(recipe.task, seed=recipe.seed)
    also = [open_task(other, seed=recipe.seed) for other in recipe.evaluate.also]
    names = [task.name, *(other.name for other in also)]
    if len(set(names)) != len(names):
        raise PhoenixError(f"evaluate.also: a task stands twice in {', '.join(names)}; give each once")
    if also or recipe.task.mixture:
        task = mix(task, recipe.task.mixture, also, seed=recipe.seed, drop_overlap=recipe.task.drop_overlap)
    steps.require_validation(task)
    empty = empty_model(load_config(model))
    require_fit(empty, recipe.sparsify)
    require_shapes(empty, model)
    _require_text(recipe, model, load_tokenizer(model))
    steps.require_targets(model, recipe.finetune)
    steps.require_trackers(recipe.finetune)
    _require_teacher(recipe, model)
    _require_dense_rate(recipe)
    if recipe.finetune.evolve is not None and recipe.sparsify.pattern != "unstructured":
        raise PhoenixError(
            f"finetune.evolve: single weights change places, which would break sparsify.pattern="
            f"{recipe.sparsify.pattern}; use unstructured, or leave evolve out"
        )
    steps.require_trainable(model, task, recipe.finetune)
    for one in (task, *also):
        steps.require_room(
            model, one, recipe.evaluate.perplexity, recipe.evaluate.split if one in also else "validation"
        )
    return model, task, also


def _teacher_directory(recipe: Recipe) -> Path | None:
    """The model that a recipe gives a directory of to learn from."""
    distill = recipe.finetune.distill
    return None if distill is None or distill.teacher in steps.OF_A_RUN else Path(distill.teacher)


def _require_teacher(recipe: Recipe, model: Path) -> None:
    """Refuse a teacher that isn't there or doesn't fit, and one whose own training has no learning rate."""
    distill, directory = recipe.finetune.distill, _teacher_directory(recipe)
    if distill is None:
        return
    if directory is not None:
        if not directory.is_dir():
            raise PhoenixError(
                f"finetune.distill.teacher: {directory} is no directory; give dense_lora, dense or a model's directory"
            )
        find_model(str(directory))
        steps.require_alike(load_config(directory), load_config(model), distill, str(directory))
        load_tokenizer(directory)


def _require_text(recipe: Recipe, model: Path, tokenizer: Any) -> None:
    """Refuse texts too short for one sequence. Long ones, and missing ones, which are told elsewhere, aren't read."""
    calibration, perplexity = recipe.sparsify.calibration, recipe.evaluate.perplexity
    wanted = [("sparsify.calibration", calibration.text, min(calibration.length, longest(model)))]
    wanted += [("evaluate.perplexity", perplexity.text, perplexity.context_length)] if perplexity is not None else []
    for field, text, length in wanted:
        if text is not None and text.is_file() and text.stat().st_size < BYTES_A_TOKEN * length:
            count = len(tokenizer(read_text(text, f"{field}.text")).input_ids)
            if count < length:
                raise PhoenixError(
                    f"{field}.text: {text} has {count} tokens, less than one sequence of {length}; give more"
                )


def _require_dense_rate(recipe: Recipe) -> None:
    """Refuse to train the dense LoRA, as a baseline or as the teacher, at a rate that is meant for whole weights."""
    if recipe.trains_dense and recipe.finetune.method == "full" and recipe.evaluate.dense_lora_learning_rate is None:
        raise PhoenixError(
            "evaluate.dense_lora_learning_rate: the dense LoRA is an adapter, whose rate isn't that of method: full; "
            "give it its own, such as 3e-4, or leave dense_lora out of evaluate.baselines"
        )


def model_directory(name: str) -> Path:
    """The directory of a model by the name that a recipe gives it; `demo` is the bundled one."""
    if name == "demo":
        from phoenix_sparse import demo

        return demo.model_directory()
    return find_model(name)


def open_task(settings: TaskSettings, *, seed: int) -> Task:
    """Load a task; `demo` is the bundled one."""
    if settings.name == "demo":
        from phoenix_sparse import demo

        settings = settings.model_copy(update={"name": str(demo.task_directory())})
    return load_task(settings, seed=seed)


def _texts(recipe: Recipe) -> dict[str, str]:
    """The recipe's text files by their hashes: a missing one is told now, a changed one when a run is gone on with."""
    perplexity = recipe.evaluate.perplexity
    files = [recipe.sparsify.calibration.text, perplexity.text if perplexity else None]
    return {str(file): sha256(file) for file in files if file is not None}


def _masks(this: Run, recipe: Recipe) -> steps.Masks:
    """The masks of the result: those of the pruning, or those that fine-tuning made of them."""
    return steps.read_masks(this.path("masks.safetensors" if recipe.finetune.evolve is None else steps.EVOLVED))


def _finetune(this: Run, recipe: Recipe, task: Task, machine: Machine, model: Path) -> list[str]:
    through = recipe.finetune.mode == "sparse_to_sparse"
    teachers = {"dense": model, "dense_lora": this.path("baselines/dense_lora/merged")}
    distill = recipe.finetune.distill
    return steps.tune(
        this.path("sparse"),
        steps.read_masks(this.path("masks.safetensors")) if through else None,
        task,
        recipe.finetune,
        this.directory,
        machine,
        work=this.work("finetune"),
        teacher=teachers.get(distill.teacher) if distill is not None else None,
    )


def _search(this: Run, recipe: Recipe, task: Task, machine: Machine) -> list[str]:
    return steps.search(
        this.path("sparse"),
        _masks(this, recipe) if recipe.finetune.mode == "sparse_to_sparse" else None,
        task,
        this.path("adapter/super"),
        recipe.search,
        recipe.evaluate,
        this.directory,
        machine,
        work=this.work("search"),
    )


def _merge(this: Run, recipe: Recipe, task: Task, machine: Machine) -> list[str]:
    examples = (task.validation or task.train)[: recipe.evaluate.certificate_examples]
    return steps.merge(
        this.path("sparse"),
        _masks(this, recipe),
        this.path("adapter/chosen"),
        this.directory,
        machine,
        remask=recipe.finetune.dense_merge == "remask",
        texts=[example.prompt + example.completion for example in examples],
    )


def _baseline(
    this: Run, recipe: Recipe, task: Task, machine: Machine, model: Path, name: str, also: list[Task]
) -> list[str]:
    out = this.path(f"baselines/{name}")
    written: list[str] = []
    if name == "dense_lora":
        written += _train_dense(this, recipe, task, machine, model, out)
        source = out / "merged"
        written += this.alone(lambda: steps.evaluate(source, task, recipe.evaluate, out, machine, also))
    else:
        source = {"dense": model, "pruned": this.path("sparse")}[name]
        written += steps.evaluate(source, task, recipe.evaluate, out, machine, also)
    return [f"baselines/{name}/{file}" for file in written]


def _train_dense(this: Run, recipe: Recipe, task: Task, machine: Machine, model: Path, out: Path) -> list[str]:
    """A plain LoRA of the largest rank on the dense model, with the recipe's hyper-parameters, merged."""
    rate = recipe.evaluate.dense_lora_learning_rate or recipe.finetune.learning_rate
    changes: dict[str, Any] = {"mode": "sparse_to_dense", "method": "lora", "learning_rate": rate}
    changes |= {"ranks": recipe.finetune.largest_ranks, "sampling": "uniform", "distill": None, "evolve": None}
    settings = recipe.finetune.model_copy(update=changes)
    work = this.work("baseline dense_lora")
    written = steps.tune(model, None, task, settings, out, machine, adapter="adapter", work=work)
    return written + this.alone(lambda: steps.merge_dense(model, out / "adapter", out / "merged", machine))


def _flops(this: Run, recipe: Recipe) -> list[str]:
    """Sparse where the merged model is: a dense merge has filled the zeros."""
    filled = recipe.finetune.mode == "sparse_to_dense" and recipe.finetune.dense_merge == "dense"
    return steps.flops(this.path("merged"), None if filled else _masks(this, recipe), recipe.evaluate, this.directory)


def _report(this: Run) -> list[str]:
    from phoenix_sparse.report import build_report

    build_report(this.directory)
    return ["report.html", "README.md"]
