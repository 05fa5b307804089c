"""A task with its data: examples to train on, and lm-eval's own task object to evaluate with.

Both come from one YAML. The prompt of a training example is the text that lm-eval would show the model (zero-shot),
its completion the text that lm-eval would score, so training and evaluation can't drift apart.
"""

import contextlib
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import sha256
from phoenix_sparse.jsonl import read_jsonl
from phoenix_sparse.tasks.definition import Definition, harness_config, load_definition
from phoenix_sparse.tasks.right_answers import CHECKED, check_right_answers
from phoenix_sparse.tasks.settings import TaskSettings
from phoenix_sparse.tasks.splits import Row, carve, hold_out, question_key, sample, without

Split = Literal["test", "validation"]


@dataclass(frozen=True)
class Example:
    """Text to train on. The completion begins with the delimiter that parts it from the prompt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Task:
    """A task with its data.

    `dropped_overlap` counts the training examples that were dropped because their question is also one of the
    evaluation split.
    """

    name: str
    metric: str
    train: list[Example] = field(repr=False)
    validation: list[Example] = field(repr=False)
    test_size: int
    dropped_overlap: int
    num_fewshot: int
    definition: Definition = field(repr=False)
    rows: dict[str, list[Row]] = field(repr=False)
    sources: dict[str, str] = field(repr=False)
    mixture: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)

    def harness_task(self, split: Split, limit: int | None = None) -> Any:
        """lm-eval's ConfigurableTask over the first `limit` examples of a split; solved examples come from train.

        Raises:
            PhoenixError: the split has no examples.
        """
        rows = self.rows[split][: self.test_size] if split == "test" else self.rows[split]
        if not rows:
            raise PhoenixError(f"task {self.name}: no examples to validate with; set task.validation above 0")
        return _harness_task(self.definition, {"train": self.rows["train"], split: rows[:limit]}, split)

    def record(self) -> dict[str, Any]:
        """What the manifest keeps: sizes, and hashes of the files that the data came from."""
        mixture = {"mixture": self.mixture} if self.mixture else {}
        return mixture | {
            "name": self.name,
            "train": len(self.train),
            "validation": len(self.validation),
            "test": self.test_size,
            "dropped_overlap": self.dropped_overlap,
            "metric": self.metric,
            "sources": self.sources,
        }


class _Rows(list[Row]):
    """Rows as lm-eval wants a data set: a sequence that knows its fields. Values keep their types."""

    @property
    def features(self) -> dict[str, None]:
        return dict.fromkeys(self[0])

    def map(self, function: Callable[[Row], Row]) -> "_Rows":
        """What lm-eval's clean-up of records calls."""
        return _Rows({**row, **function(row)} for row in self)


def load_task(settings: TaskSettings, *, seed: int) -> Task:
    """Read a task's definition and data, and sort out who trains, validates and tests.

    Raises:
        PhoenixError: the task, a split or a field is missing, or a file is damaged.
    """
    definition = load_definition(settings.name)
    splits, sources = _read_splits(definition, settings)

    def key(row: Row) -> str:
        return question_key(row[name] for name in definition.prompt_fields)

    train, validation, test = splits["train"], splits["validation"], splits["test"]
    if test and settings.holdout is not None:
        raise PhoenixError(f"task {definition.name}: the data has a test split of its own; remove task.holdout")
    if not test:
        train, test = _without_test_split(definition, settings, train, key)
    size = len(train)
    if settings.drop_overlap:
        train = without(train, test, key)
    dropped = size - len(train)
    if validation:
        # The search must not choose by an example that is trained on or tested with.
        validation = without(validation, [*train, *test], key)[: settings.validation]
    else:
        train, validation = carve(train, settings.validation, key, seed)
    train = sample(train, settings.max_train, seed)
    if not train:
        raise PhoenixError(
            f"task {definition.name}: no training examples are left; lower task.validation or task.holdout"
        )
    if settings.num_fewshot > len(train):
        raise PhoenixError(f"task.num_fewshot={settings.num_fewshot} is more than the {len(train)} training examples")
    rows = {"train": train, "validation": validation, "test": test}
    harness = _harness_task(definition, {"train": train, "test": test}, "test")
    if definition.folder is not None:
        some = {"train": train[:1], "test": test[:CHECKED]}
        check_right_answers(_harness_task(definition, some, "test"), definition)
    return Task(
        name=definition.name,
        metric=definition.metric,
        train=_examples(harness, train),
        validation=_examples(harness, validation),
        test_size=len(test[: settings.max_test]),
        dropped_overlap=dropped,
        num_fewshot=settings.num_fewshot,
        definition=definition,
        rows=rows,
        sources=sources,
    )


def read_training_rows(definition: Definition, data: Path | None) -> tuple[list[Row], dict[str, str]]:
    """The training rows of a task, and the hash of where they came from.

    Raises:
        PhoenixError: as `load_task` raises it.
    """
    splits, sources = _read_splits(definition, TaskSettings(name=definition.name, data=data))
    name = definition.config.get("training_split") or "train"
    return splits["train"], {key: digest for key, digest in sources.items() if Path(key).stem == name}


def render(definition: Definition, rows: list[Row]) -> list[Example]:
    """Rows as text to train on."""
    harness = _harness_task(definition, {"train": rows, "test": rows[:1]}, "test")
    return _examples(harness, rows)


def _read_splits(definition: Definition, settings: TaskSettings) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """The rows of train, validation (for the search) and test, with the hash of where each came from."""
    config = definition.config
    local = definition.folder is not None
    names = {part: config.get(f"{part}_split") or (part if local else None) for part in ("validation", "test")}
    names["train"] = config.get("training_split") or "train"
    folder = settings.data or definition.folder
    if settings.data is not None and not settings.data.is_dir():
        raise PhoenixError(
            f"task {definition.name}: its data, {settings.data}, is not a folder; it should hold <split>.jsonl"
        )
    if folder is not None and (settings.data is not None or (folder / f"{names['train']}.jsonl").is_file()):
        found = _read_folder(folder, names)
        sources = {path.name: sha256(path) for path in found.values()}
        rows = {part: _check_rows(read_jsonl(path), definition, str(path), ":") for part, path in found.items()}
    elif "dataset_path" in config:
        rows, sources = _read_hub(definition, names)
    else:
        raise PhoenixError(f"{folder}: there is no {names['train']}.jsonl, and task.yaml names no dataset_path")
    splits = {part: rows.get(part, []) for part in ("train", "validation", "test")}
    if not config.get("test_split") and not splits["test"] and not settings.holdout:
        # A task without a public test split (BoolQ) is tested on its validation split.
        splits["test"], splits["validation"] = splits["validation"], []
    return splits, sources


def _read_folder(folder: Path, names: dict[str, str | None]) -> dict[str, Path]:
    paths = {part: folder / f"{name}.jsonl" for part, name in names.items() if name}
    if not paths["train"].is_file():
        raise PhoenixError(f"{folder}: there is no {paths['train'].name}; the training split is one JSON object a line")
    return {part: path for part, path in paths.items() if path.is_file()}


def _read_hub(definition: Definition, names: dict[str, str | None]) -> tuple[dict[str, list[Row]], dict[str, str]]:
    import datasets

    path, subset = definition.config["dataset_path"], definition.config.get("dataset_name")
    try:
        loaded = datasets.load_dataset(path, subset)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise PhoenixError(
            f"task {definition.name}: the data set {path} can't be had from the hub ({reason}); "
            "give a folder of <split>.jsonl as its data (task.data, or data of an entry; a command: --data)"
        ) from error
    rows: dict[str, list[Row]] = {}
    sources: dict[str, str] = {}
    for part, name in names.items():
        if name in loaded:
            renamed = [{definition.rename.get(key, key): value for key, value in row.items()} for row in loaded[name]]
            rows[part] = _check_rows(renamed, definition, f"{path} {name}", " record ")
            content = json.dumps(rows[part], sort_keys=True, default=str, ensure_ascii=False)
            sources[f"{path}/{name}"] = hashlib.sha256(content.encode()).hexdigest()
    if "train" not in rows:
        raise PhoenixError(f"task {definition.name}: the data set {path} has no split {names['train']}")
    return rows, sources


def _check_rows(rows: list[Row], definition: Definition, where: str, between: str) -> list[Row]:
    for number, row in enumerate(rows, start=1):
        missing = sorted(name for name in definition.fields if row.get(name) is None)
        if missing:
            raise PhoenixError(
                f"{where}{between}{number}: the field {missing[0]!r} that the task {definition.name} uses is missing"
            )
    return rows


def _without_test_split(
    definition: Definition, settings: TaskSettings, train: list[Row], key: Any
) -> tuple[list[Row], list[Row]]:
    if settings.holdout is None:
        raise PhoenixError(
            f"task {definition.name}: the data has no {definition.config.get('test_split') or 'test'} split; "
            "add it, or, in a recipe, set task.holdout to test on a share of the training split (0.3, say)"
        )
    kept, held = hold_out(train, settings.holdout, key)
    if not held or not kept:
        raise PhoenixError(
            f"task.holdout: {settings.holdout} of {len(train)} examples leaves "
            f"{len(kept)} to train with and {len(held)} to test with"
        )
    return kept, held


def _harness_task(definition: Definition, rows: dict[str, list[Row]], split: str) -> Any:
    from jinja2 import TemplateError
    from lm_eval.api.task import ConfigurableTask

    _compile_templates_once()
    config = harness_config(definition)
    for key in ("dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "test_split"):
        config.pop(key, None)
    config |= {"training_split": "train", "fewshot_split": "train", f"{split}_split": split, "num_fewshot": 0}
    config["custom_dataset"] = lambda **_options: {name: _Rows(part) for name, part in rows.items()}
    try:
        with quiet_harness():
            return ConfigurableTask(config=config)
    except (TemplateError, KeyError, ValueError, TypeError, IndexError, SyntaxError) as error:
        raise PhoenixError(f"{definition.source}: lm-eval can't read the task ({str(error)[:200]})") from error


def _compile_templates_once() -> None:
    """Let lm-eval compile a template once, not anew for every record, which is nine tenths of rendering a task."""
    from lm_eval.utils import env

    if not hasattr(env.from_string, "cache_info"):
        setattr(env, "from_string", functools.lru_cache(maxsize=256)(env.from_string))  # noqa: B010


def _examples(harness: Any, rows: list[Row]) -> list[Example]:
    clean = harness.config.process_docs
    return [_example(harness, row) for row in (clean(_Rows(rows)) if clean and rows else rows)]


def _example(harness: Any, row: Row) -> Example:
    """Render one record with lm-eval's own functions."""
    from jinja2 import TemplateError

    name = harness.config.task
    try:
        target = harness.doc_to_target(row)
        if harness.multiple_input:
            # The choices are beginnings of one text (WinoGrande): the right one is the prompt.
            prompt = harness.doc_to_choice(row)[harness.doc_to_text(row)]
        else:
            prompt = harness.fewshot_context(row, num_fewshot=0)
        if harness.config.doc_to_choice is not None:
            choices = harness.doc_to_choice(row)
            target = choices[target] if isinstance(target, int) else target
    except (TemplateError, KeyError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise PhoenixError(
            f"task {name}: a record can't be put into the template ({str(error)[:150]}): {row!r:.200}"
        ) from error
    if isinstance(target, list) and target:
        target = target[0]
    if not isinstance(prompt, str) or not prompt or not isinstance(target, str) or not target.strip():
        raise PhoenixError(f"task {name}: the prompt or the target of a record is empty or not text: {row!r:.200}")
    return Example(prompt, f"{harness.config.target_delimiter}{target}")


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep lm-eval's remarks to itself (it logs a warning for what we do on purpose)."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
