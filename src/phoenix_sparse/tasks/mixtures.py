"""Training on a mixture: the task's own examples and those of others, none of which any evaluation asks about."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.tasks.definition import Definition, load_definition
from phoenix_sparse.tasks.loading import Task, read_training_rows, render
from phoenix_sparse.tasks.settings import SourceSettings
from phoenix_sparse.tasks.splits import Row, question_key, sample


def mix(
    task: Task, sources: Sequence[SourceSettings], others: Sequence[Task], *, seed: int, drop_overlap: bool = True
) -> Task:
    """Add the examples of other sources to a task's training examples.

    Questions that stand in the test split of the task or of another one that is evaluated, or among the task's
    validation examples, are trained on from no source. Questions are compared as texts, so the same one is found under
    other names of fields.

    Args:
        task: as `load_task` gives it.
        sources: where more examples come from.
        others: tasks that are evaluated as well.
        seed: for the samples of `max_train`.
        drop_overlap: whether questions of test splits are left out; those of the validation examples always are.

    Returns:
        The task with all training examples, its own first, and `mixture`: by source how many, how many were dropped,
        and the hashes of their files.

    Raises:
        PhoenixError: a source can't be read, stands twice, or has no example left.
    """
    if len({one.name for one in sources}) != len(sources):
        raise PhoenixError("task.mixture: a source stands twice; give each once, with all of its data")
    tested = set().union(*(_keys(one.definition, one.rows["test"]) for one in (task, *others)))
    tested = tested if drop_overlap else set()
    known = tested | _keys(task.definition, task.rows["validation"])
    kept = [index for index, row in enumerate(task.rows["train"]) if _key(task.definition, row) not in tested]
    train = [task.train[index] for index in kept]
    rows = [task.rows["train"][index] for index in kept]
    if not train:
        raise PhoenixError(f"task {task.name}: every training question stands in a test split of evaluate.also")
    mixture = {}
    for source in sources:
        definition = load_definition(source.name)
        found, hashes = read_training_rows(definition, source.data)
        fresh = [row for row in found if _key(definition, row) not in known]
        chosen = sample(fresh, source.max_train, seed)
        if not chosen:
            raise PhoenixError(f"task.mixture: {source.name} has no example that no evaluation asks about")
        train += render(definition, chosen)
        mixture[definition.name] = {
            "train": len(chosen),
            "dropped_overlap": len(found) - len(fresh),
            "sources": hashes,
        }
    dropped = task.dropped_overlap + len(task.train) - len(kept)
    return replace(task, train=train, rows={**task.rows, "train": rows}, dropped_overlap=dropped, mixture=mixture)


def _keys(definition: Definition, rows: Iterable[Row]) -> set[str]:
    return {_key(definition, row) for row in rows}


def _key(definition: Definition, row: Row) -> str:
    return question_key(row[name] for name in definition.prompt_fields)
