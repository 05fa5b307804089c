"""The recipe: one YAML file that says what a run does, checked as a whole before anything is loaded."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.evaluation.settings import EvaluateSettings
from phoenix_sparse.finetuning.settings import FinetuneSettings, SearchSettings
from phoenix_sparse.pruning.settings import SparsifySettings
from phoenix_sparse.settings import Device, Dtype, Settings
from phoenix_sparse.tasks.settings import TaskSettings

S = TypeVar("S", bound=Settings)


class Recipe(Settings):
    """A run: a model, a task, and the three steps between them and the evidence."""

    name: str = Field(description="names the run directory: runs/<name>")
    model: str = Field(description="a Hugging Face model directory, a hub name, or demo")
    task: TaskSettings
    seed: int = Field(0, ge=0)
    dtype: Dtype = Field("auto", description="in which the model is loaded, trained and saved; auto: as it is stored")
    device: Device = Field("auto", description="auto: a GPU where there is one")
    deterministic: bool = Field(True, description="the same machine gives the same weights again")
    sparsify: SparsifySettings = SparsifySettings()
    finetune: FinetuneSettings = FinetuneSettings()
    search: SearchSettings = SearchSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @field_validator("name")
    @classmethod
    def _is_a_directory_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError("use letters, digits, dots, dashes and underscores, such as llama-gsm8k-50")
        return name


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
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PhoenixError(f"recipe: {path} can't be read ({error.__class__.__name__}); give a YAML file") from error
    except yaml.YAMLError as error:
        raise PhoenixError(f"recipe: {path} is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise PhoenixError(f"recipe: {path} must hold keys and values, such as model: and task:")
    return check(Recipe, override(content, overrides), str(path))


def override(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Set `key.key=value` in nested mappings, in a copy."""
    result = dict(values)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise PhoenixError(f"{text!r} is not key=value; write for example sparsify.sparsity=0.6")
        here, *rest = key.split(".")
        if rest:
            section = result.get(here)
            # A section may be given by its name alone (task: gsm8k).
            inner = {"name": section} if isinstance(section, str) else section or {}
            if not isinstance(inner, Mapping):
                raise PhoenixError(f"{key}: {here} has no fields")
            result[here] = override(inner, [f"{'.'.join(rest)}={value}"])
        else:
            try:
                result[here] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise PhoenixError(f"{key}: {value!r} is not a YAML value") from error
    return result


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
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _fields(kind, problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"{field} is no field; {hint}"
    if problem["type"] == "missing":
        return f"{field} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error" and not isinstance(problem["input"], str | int | float):
        return f"{field}: {message}" if field else message
    return f"{field}={problem['input']!r}: {message[0].lower()}{message[1:]}"


def _fields(kind: type[BaseModel], path: Iterable[Any]) -> list[str]:
    for part in path:
        annotation = kind.model_fields[part].annotation if part in kind.model_fields else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        kind = next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), kind)
    return list(kind.model_fields)
