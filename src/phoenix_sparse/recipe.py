"""The recipe: one YAML file that says what a run does, checked as a whole before anything is loaded."""

import copy
import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.evaluation.settings import EvaluateSettings
from phoenix_sparse.files import parse_yaml
from phoenix_sparse.finetuning.settings import FinetuneSettings, SearchSettings
from phoenix_sparse.pruning.settings import CHOOSING, SparsifySettings
from phoenix_sparse.settings import Device, DirectoryName, Dtype, Settings
from phoenix_sparse.tasks.settings import TaskSettings

S = TypeVar("S", bound=Settings)


# Settings that some choices alone look at, with the fields that choose.
CHOSEN_BY = {
    "sparsify.calibration": ("sparsify.importance", "sparsify.update", "sparsify.allocation"),
    "sparsify.evolution": ("sparsify.allocation",),
    "evaluate.dense_lora_learning_rate": ("evaluate.baselines", "finetune.distill"),
}


class Recipe(Settings):
    """A run: a model, a task, and the three steps between them and the evidence."""

    name: DirectoryName = Field(description="names the run directory: runs/<name>")
    model: str = Field(description="a Hugging Face model directory, a hub name, or demo")
    task: TaskSettings = Field(description="a built-in task or a folder with task.yaml, or a section with name")
    seed: int = Field(0, ge=0, lt=2**32, description="for everything that is drawn")
    dtype: Dtype = Field("auto", description="in which the model is loaded, trained and saved; auto: as it is stored")
    device: Device = Field("auto", description="auto: a GPU where there is one")
    threads: int | None = Field(None, ge=1, description="CPU threads; torch's own number unless given")
    deterministic: bool = Field(True, description="the same machine gives the same weights again")
    sparsify: SparsifySettings = SparsifySettings()
    finetune: FinetuneSettings = FinetuneSettings()
    search: SearchSettings = SearchSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def _something_to_search(self) -> Self:
        # Hill climbing is on by default and passes over one candidate; NSGA-II runs where somebody asks for it alone.
        if self.search.nsga2 and not self.finetune.is_searchable:
            one = "method: full has no ranks" if self.finetune.method == "full" else "finetune.ranks gives one rank"
            raise ValueError(f"search.nsga2: {one}, so there is one candidate and no search; set search.nsga2=0")
        return self

    @property
    def trains_dense(self) -> bool:
        """Whether the dense LoRA is trained, as a baseline or as the teacher."""
        distill = self.finetune.distill
        return "dense_lora" in self.evaluate.baselines or (distill is not None and distill.teacher == "dense_lora")

    @property
    def idle(self) -> dict[str, str]:
        """The fields that were changed and that this run doesn't look at, with what is wrong and would be right."""
        found = {f"sparsify.{section}": why for section, why in self.sparsify.idle.items()}
        if self.evaluate.dense_lora_learning_rate is not None and not self.trains_dense:
            found["evaluate.dense_lora_learning_rate"] = (
                "no dense LoRA is trained; leave its rate out, or add dense_lora to evaluate.baselines"
            )
        return found

    def uses(self, field: str) -> bool:
        """Whether the run looks at one of the fields of `CHOSEN_BY`."""
        section, _, name = field.partition(".")
        return self.sparsify.uses(name) if section == "sparsify" else self.trains_dense


def load_recipe(path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and change some of its values.

    Args:
        path: the YAML file.
        overrides: `key=value`, with dots into sections (`finetune.epochs=2`) and values in YAML.

    Raises:
        PhoenixError: naming the field and what would be right.
    """
    path = Path(path)
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PhoenixError(f"recipe: {path} can't be read ({error.__class__.__name__}); give a YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2025-13-01
        raise PhoenixError(f"recipe: {path} is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise PhoenixError(f"recipe: {path} must hold keys and values, such as model: and task:")
    if "models" in content and "model" not in content:
        raise PhoenixError(f"recipe: {path} is a sweep of many runs; give it to `phx sweep run`, or a recipe here")
    return check(Recipe, override(content, overrides), str(path))


def override(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Set `key.key=value` in nested mappings, in a copy.

    An importance or a group set for a recipe that prunes by SparseGPT or ALPS takes their place, unless the update is
    set too: beside them it would do nothing.
    """
    result = copy.deepcopy(dict(values))
    named = set()
    for text in overrides:
        key, equals, value = text.partition("=")
        *sections, last = key.split(".")
        named.add(key)
        if not equals or not last or not all(sections):
            raise PhoenixError(f"{text!r} is not key=value; write for example sparsify.sparsity=0.6")
        here = result
        for depth, name in enumerate(sections, start=1):
            inner = {} if here.get(name) is None else here[name]
            if name == "task" and isinstance(inner, str):
                inner = {"name": inner}  # task: gsm8k is short for task: {name: gsm8k}
            if not isinstance(inner, dict):
                place = ".".join(sections[:depth])
                raise PhoenixError(
                    f"{text!r}: {place} is a value ({_short(inner)}) and has no fields; set it as a whole"
                )
            here[name] = inner
            here = inner
        try:
            here[last] = parse_yaml(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise PhoenixError(f"{key}: {value!r} is not a YAML value") from error
    pruning = result.get("sparsify")
    if isinstance(pruning, dict) and "sparsify.update" not in named and pruning.get("update") in CHOOSING:
        grouped = "sparsify.group" in named and pruning.get("group") is not None
        # A search of the allocation goes by the importance beside any update.
        if (grouped or "sparsify.importance" in named) and pruning.get("allocation") != "evolutionary":
            del pruning["update"]
    return result


def without_idle(recipe: Recipe, named: Collection[str], *, shared: bool = False) -> Recipe:
    """The recipe of one run without settings that the run doesn't look at.

    What a file says for a choice in whose place another is set goes with that choice: the calibration where an
    importance is set that measures nothing on it. So does what several runs share, for those that don't look at it.

    Args:
        recipe: checked.
        named: the fields that were set over the file, by their dotted names.
        shared: whether the file is that of several runs.

    Raises:
        PhoenixError: a field was set that does nothing, or the file itself says one beside the choice that ignores it.
    """
    sections: dict[str, Any] = {}
    for field, why in recipe.idle.items():
        chosen_anew = shared or any(_names(named, choice) for choice in CHOSEN_BY[field])
        if _names(named, field) or not chosen_anew:
            raise PhoenixError(f"{field}: {why}")
        section, _, name = field.partition(".")
        here = sections.get(section, getattr(recipe, section))
        sections[section] = here.model_copy(update={name: type(here).model_fields[name].default})
    return recipe.model_copy(update=sections)


def _names(dotted: Iterable[str], field: str) -> bool:
    """Whether one of several dotted names is the field, a part of it, or a section that has it."""
    return any(f"{name}.".startswith(f"{field}.") or f"{field}.".startswith(f"{name}.") for name in dotted)


def is_changed(values: Mapping[str, Any], field: str) -> bool:
    """Whether plain values of a recipe say something else than the default in a field of `CHOSEN_BY`."""
    usual: Any = Recipe(name="any", model="any", task="any").model_dump(mode="json")  # type: ignore[arg-type]
    given: Any = values
    for name in field.split("."):
        if not isinstance(given, Mapping) or name not in given:
            return False
        given, usual = given[name], usual[name]
    if isinstance(given, Mapping):
        return any(usual.get(name) != value for name, value in given.items())
    return bool(given != usual)


def check(kind: type[S], values: Mapping[str, Any], where: str) -> S:
    """Build settings from plain values; what doesn't fit is told in one line, field by field."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise PhoenixError(f"{where}: " + "; ".join(_explain(kind, problem) for problem in error.errors())) from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _explain(kind: type[BaseModel], problem: Any) -> str:
    place, given, what = problem["loc"], problem["input"], problem["type"]
    field = ".".join(str(part) for part in place)
    if what == "extra_forbidden":
        here = _section(kind, place[:-1]).model_fields
        if isinstance(given, Mapping) and given and set(given) <= set(here):  # tune finetune.epochs=2
            return f"{field} is no field; write {next(iter(given))}=... alone"
        return f"{field} is no field; {_instead(kind, place)}"
    if what == "missing":
        wanted = _section(kind, place[:-1]).model_fields.get(place[-1])
        return f"{field} is missing" + (f" ({wanted.description})" if wanted and wanted.description else "")
    if what == "model_type":
        return f"{field}={_short(given)} should be a section with keys such as {next(_fields(_section(kind, place)))}"
    message = problem["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    message = message.replace("Tuple should have", "Input should have").replace(" after validation", "")
    if what == "path_type":
        message = "Input should be a path"
    if isinstance(given, Mapping) and what == "value_error":
        # A check of several fields together begins with the one to change.
        name, colon, rest = message.partition(": ")
        known = colon and name in _section(kind, place).model_fields
        return (f"{field}.{name}: {rest}" if known else f"{field}: {message}").lstrip(".: ")
    if message.startswith("Input "):
        return f"{field}={_short(given)} {message.removeprefix('Input ')}"
    return f"{field}={_short(given)}: {message[0].lower()}{message[1:]}"


def _instead(kind: type[BaseModel], place: tuple[Any, ...]) -> str:
    """What somebody may have meant: a field of that very name in another section, or one of a similar name here."""
    *path, wrong = place
    here = _section(kind, path)
    meant = [name for name in _fields(kind) if name.rsplit(".", 1)[-1] == wrong]
    close = difflib.get_close_matches(str(wrong), here.model_fields, 1)
    meant = meant or [".".join(map(str, [*path, name])) for name in close]
    return f"did you mean {' or '.join(meant)}?" if meant else f"known here: {', '.join(here.model_fields)}"


def _fields(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All fields and the fields of sections, with dots."""
    for name in kind.model_fields:
        yield prefix + name
        inner = _section(kind, [name])
        if inner is not kind:
            yield from _fields(inner, f"{prefix}{name}.")


def _section(kind: type[BaseModel], path: Iterable[Any]) -> type[BaseModel]:
    """The settings that lie at a path."""
    for part in path:
        annotation = kind.model_fields[part].annotation if part in kind.model_fields else None
        kind = next((one for one in _within(annotation) if isinstance(one, type) and issubclass(one, BaseModel)), kind)
    return kind


def _within(annotation: Any) -> Iterator[Any]:
    """A type, and those that it is made of: optional sections, lists of sections."""
    yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _within(part)


def _short(value: Any) -> str:
    text = "(empty)" if value is None else repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else text[:57] + "..."
