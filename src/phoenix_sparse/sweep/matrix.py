"""The matrix: every cell of a sweep as a checked recipe, before anything runs."""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import parse_yaml
from phoenix_sparse.pruning.settings import SparsifySettings
from phoenix_sparse.recipe import CHOSEN_BY, Recipe, check, is_changed, override, without_idle
from phoenix_sparse.sweep.settings import AXES, SweepSettings

SHOWN = 5  # wrong cells that a message names


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: where it stands in the matrix, and its recipe."""

    axes: Mapping[str, str | float | int]  # model, task, method, sparsity, mode, seed
    recipe: Recipe

    @property
    def name(self) -> str:
        return self.recipe.name


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked as a whole."""

    settings: SweepSettings
    cells: tuple[Cell, ...]
    excluded: int


def load_sweep(path: Path | str, overrides: Iterable[str] = ()) -> Sweep:
    """Read a sweep file and resolve all its cells.

    Args:
        path: the YAML file.
        overrides: `key=value` for fields of the file, such as `engine.workers=2` or `base.finetune.epochs=1`.

    Raises:
        PhoenixError: the file is wrong, an exclusion matches nothing, or cells are wrong (they are named).
    """
    path = Path(path)
    content = read_yaml(path)
    if "model" in content and "models" not in content:
        raise PhoenixError(f"sweep: {path} is the recipe of one run; give it to `phx run`, or a file with models: here")
    settings = check(SweepSettings, override(content, overrides), str(path))
    base = settings.base
    values = read_yaml(path.parent / base) if isinstance(base, Path) else dict(base)
    if isinstance(base, Path):
        for field in ("name", "seed"):
            values.pop(field, None)  # a recipe's file has them; the cells have their own
    cells, excluded = resolve(settings, values)
    return Sweep(settings.model_copy(update={"base": values}), cells, excluded)


def resolve(settings: SweepSettings, base: Mapping[str, Any]) -> tuple[tuple[Cell, ...], int]:
    """All cells, and how many exclusions took away.

    Modes are the outermost axis: runs that share a pruned model lie far apart, so that one seldom waits for another.
    """
    cells: list[Cell] = []
    wrong: dict[str, str] = {}
    used: set[int] = set()
    excluded = 0
    for mode, seed, model, task, method, sparsity in itertools.product(
        settings.modes, settings.seeds, settings.models, settings.tasks, settings.methods, settings.sparsities
    ):
        chosen = (model, task, method, sparsity, mode, seed)
        axes: dict[str, str | float | int] = dict(zip(AXES, chosen, strict=True))
        matching = [index for index, one in enumerate(settings.exclude) if _matches(one, axes)]
        used.update(matching)
        if matching:
            excluded += 1
            continue
        name = f"{model}-{task}-{method}-{100 * sparsity:g}-{mode}-s{seed}"
        try:
            cells.append(Cell(axes, _recipe(settings, base, name, axes)))
        except PhoenixError as error:
            wrong[name] = str(error).removeprefix(f"{name}: ")
    unused = [dict(one) for index, one in enumerate(settings.exclude) if index not in used]
    if unused:
        raise PhoenixError(_tell_unused(settings, unused[0]))
    if wrong:
        raise PhoenixError(_tell(wrong, len(wrong) + len(cells)))
    if not cells:
        raise PhoenixError("exclude: nothing is left to run")
    for field in CHOSEN_BY:
        if is_changed(base, field) and not any(cell.recipe.uses(field) for cell in cells):
            raise PhoenixError(f"base.{field}: no run of the sweep has use for it; leave it out")
    return tuple(cells), excluded


def _recipe(settings: SweepSettings, base: Mapping[str, Any], name: str, axes: Mapping[str, Any]) -> Recipe:
    fields: dict[str, Any] = {"name": name}
    for axis, choices in (("model", settings.models), ("task", settings.tasks), ("mode", settings.modes)):
        fields |= choices[axes[axis]]
    for field, value in settings.methods[axes["method"]].items():
        # A method's fields are of the pruning unless they say otherwise.
        fields[f"sparsify.{field}" if field.partition(".")[0] in SparsifySettings.model_fields else field] = value
    fields |= {"sparsify.sparsity": axes["sparsity"], "seed": axes["seed"]}
    if settings.engine.threads is not None:
        fields["threads"] = settings.engine.threads
    texts = [f"{field}={yaml.safe_dump(value, default_flow_style=True)}" for field, value in fields.items()]
    recipe = check(Recipe, override(base, texts), name)
    return without_idle(recipe, fields, shared=True)


def _matches(exclusion: Mapping[str, tuple[Any, ...]], axes: Mapping[str, Any]) -> bool:
    return all(any(_same(axes[axis], value) for value in values) for axis, values in exclusion.items())


def _tell_unused(settings: SweepSettings, exclusion: Mapping[str, tuple[Any, ...]]) -> str:
    """What an exclusion names that there isn't, and what there is."""
    lists = (settings.models, settings.tasks, settings.methods, settings.sparsities, settings.modes, settings.seeds)
    there = dict(zip(AXES, map(list, lists), strict=True))
    words = ", ".join(f"{axis}: {_listed(values)}" for axis, values in exclusion.items())
    wrong = [
        axis for axis, values in exclusion.items() if not any(_matches({axis: values}, {axis: v}) for v in there[axis])
    ]
    known = "; ".join(f"{axis} is one of {_listed(there[axis])}" for axis in wrong)
    return f"exclude: {words} matches no cell; {known}"


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values) or "(nothing)"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, abs_tol=1e-9)
    return str(one) == str(other)


def _tell(wrong: Mapping[str, str], total: int) -> str:
    """Wrong cells by what is wrong with them, as one mistake mostly makes many cells wrong."""
    by_message: dict[str, list[str]] = {}
    for name, message in wrong.items():
        by_message.setdefault(message, []).append(name)
    parts = []
    for message, names in list(by_message.items())[:SHOWN]:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        parts.append(f"{names[0]}{others}: {message}")
    rest = len(by_message) - len(parts)
    return f"{len(wrong)} of {total} cells are wrong: " + "; ".join(parts) + (f"; and {rest} more" if rest else "")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys and values.

    Raises:
        PhoenixError: naming the file.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PhoenixError(
            f"sweep: {path} can't be read ({error.__class__.__name__}); give a YAML file, or for status and resume a "
            "sweep's directory"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise PhoenixError(f"sweep: {path} is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise PhoenixError(f"sweep: {path} must hold keys and values, such as models: and tasks:")
    return content
