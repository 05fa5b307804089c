"""What a sweep would do: how many runs, what they share, what they are known to cost. Runs nothing."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.recipe import Recipe
from phoenix_sparse.sweep.matrix import Cell, Sweep
from phoenix_sparse.sweep.shared_work import GRADIENTS, inputs_of, key_of


def shared_counts(sweep: Sweep) -> dict[str, tuple[int, int]]:
    """How often each shared piece of work is needed and done: stage to (runs that need it, times it is done).

    Counted by names in place of the hashes of models and data, which are only known when they are read.
    """
    needed: Counter[str] = Counter()
    done: dict[str, set[str]] = {}
    for cell in sweep.cells:
        recipe = cell.recipe
        manifest = _nameless(recipe)
        for stage in _stages(recipe):
            inputs = inputs_of(stage, recipe, manifest)
            if inputs is not None:
                needed[stage] += 1
                done.setdefault(stage, set()).add(key_of(inputs))
    return {stage: (count, len(done[stage]) if sweep.settings.share else count) for stage, count in needed.items()}


def check_inputs(sweep: Sweep) -> None:
    """Read each model's configuration and each task's data once for every kind of run, and check what can be checked.

    Raises:
        PhoenixError: naming the first cell whose model, data or shapes don't fit.
    """
    from phoenix_sparse.pipeline import prepare

    for cell in representatives(sweep):
        try:
            prepare(cell.recipe)
        except PhoenixError as error:
            raise PhoenixError(f"{cell.name}: {error}") from error


def representatives(sweep: Sweep) -> Iterator[Cell]:
    """One cell for each model, task and method: sparsities, modes and seeds read nothing else."""
    seen = set()
    for cell in sweep.cells:
        kind = (cell.axes["model"], cell.axes["task"], cell.axes["method"])
        if kind not in seen:
            seen.add(kind)
            yield cell


def estimated_cost(sweep: Sweep) -> dict[str, float]:
    """Training time and disk of all runs, as `phx plan` estimates them, one estimate for each model and task.

    Training is that of the runs and of the dense baselines that are left after sharing; what runs share on the disk is
    counted for each of them. With `keep: results` a run leaves its masks there, those at work have all of theirs, and
    what is shared stays until the end.
    """
    from phoenix_sparse.pipeline import prepare
    from phoenix_sparse.plan import estimate

    known: dict[tuple[Any, ...], dict[str, Any]] = {}
    seconds = disk = largest = 0.0
    baselines, pruned = set(), set()
    light, share = sweep.settings.keep == "results", sweep.settings.share
    for cell in sweep.cells:
        kind = (cell.axes["model"], cell.axes["task"])
        if kind not in known:
            known[kind] = estimate(cell.recipe, *prepare(cell.recipe))
        figures = known[kind]
        trainings = figures["training"]["trainings"]
        passes = cell.recipe.finetune.passes
        one = figures["seconds"]["training, at that rate"] / (passes + trainings - 1)
        seconds += passes * one
        key = _key("baseline dense_lora", cell.recipe) if share else cell.name
        if trainings > 1 and key not in baselines:
            baselines.add(key)
            seconds += one
        bytes_ = figures["disk_bytes"]
        largest = max(largest, bytes_["in all"])
        disk += bytes_["masks"] if light else bytes_["in all"]
        if light and share and (pruning := _key("sparsify", cell.recipe)) not in pruned:
            pruned.add(pruning)
            disk += bytes_["models"] / (1 + trainings)
    return {"training_seconds": seconds, "disk_bytes": disk + light * sweep.settings.engine.workers * largest}


def _key(stage: str, recipe: Recipe) -> str:
    inputs = inputs_of(stage, recipe, _nameless(recipe))
    assert inputs is not None
    return key_of(inputs)


def _stages(recipe: Recipe) -> list[str]:
    distill = recipe.finetune.distill
    baselines = set(recipe.evaluate.baselines) | (
        {"dense_lora"} if distill and distill.teacher == "dense_lora" else set()
    )
    found = ["sparsify", *(f"baseline {name}" for name in sorted(baselines))]
    return [*found, GRADIENTS] if recipe.sparsify.reads_gradients else found


def _nameless(recipe: Recipe) -> dict[str, Any]:
    """A manifest in which names stand for hashes."""
    inputs = {"model": {"sha256": recipe.model}, "task": recipe.task.name, "texts": None}
    return {"host": {}, "versions": {}, "phoenix": None, "git_commit": None, "inputs": inputs}
