"""Initialisations compared by what counts: the accuracy after a short masked fine-tune of each, not the one before.

Every initialisation is a run of the pipeline in a directory of its own, with one recipe but for the pruning. Both
accuracies are of the validation split: whoever chooses by them has not looked at the test split.
"""

import math
import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from phoenix_sparse import pipeline
from phoenix_sparse.errors import PhoenixError, first_line
from phoenix_sparse.files import read_json, read_text, sha256, write_json
from phoenix_sparse.progress import Announce, Progress
from phoenix_sparse.pruning.importance import find_importance, importances
from phoenix_sparse.pruning.patterns import parse_pattern
from phoenix_sparse.pruning.settings import Method, SparsifySettings, Update
from phoenix_sparse.recipe import Recipe, check, override
from phoenix_sparse.report.text import flatten

FILE = "compare.json"
UPDATES = tuple(name for name in get_args(Update) if name != "none")
ALLOCATIONS = tuple(name for name in get_args(Method) if name != "uniform")
SCORE_THEMSELVES = ("sparsegpt", "alps")
# What a spec says, so that no other setting may.
SAID_BY_SPECS = {
    "importance": "magnitude+owl",
    "update": "dsnot+owl (an importance without one has none)",
    "allocation": "wanda+owl",
    "pattern": "wanda+2:4",
}
# A short fine-tune of one rank, of which the search has nothing to choose: one example is enough for its record.
SHORT: dict[str, Any] = {
    "finetune": {"ranks": [32], "max_steps": 100},
    "search": {"bounds": False, "hill_climb": 0, "examples": 1},
    "evaluate": {"split": "validation", "baselines": ["pruned"]},
}


@dataclass(frozen=True)
class Spec:
    """An initialisation by words: `wanda+owl`."""

    text: str
    settings: Mapping[str, str]

    @property
    def name(self) -> str:
        """Of its run and directory: `magnitude+2:4` is magnitude-2of4."""
        return re.sub(r"[^A-Za-z0-9._-]", "-", self.text.replace(":", "of"))


def parse_spec(text: str) -> Spec:
    """Read an initialisation.

    Args:
        text: words joined by `+`, of each kind at most one: an importance, an update (dsnot, sparsegpt, alps), an
            allocation (owl, alphapruning, evolutionary), a pattern (2:4, 16x1, structured). What isn't named is as in
            a recipe: `owl` is SparseGPT's, `16x1` and `dsnot` go by Wanda's scores.

    Raises:
        PhoenixError: a word is none of these, there are two of a kind, or they don't go together.
    """
    said: dict[str, str] = {}
    for word in text.split("+"):
        kind = _kind(word, text)
        if kind in said:
            raise PhoenixError(f"compare: {text!r} names two of a kind, {said[kind]} and {word}; give two specs")
        said[kind] = word
    alone = said.get("update") in SCORE_THEMSELVES and said.get("allocation") != "evolutionary"
    if alone and "importance" in said:
        raise PhoenixError(
            f"compare: {text!r}: {said['update']} scores the weights itself; leave {said['importance']} out"
        )
    return Spec(text, said)


def _kind(word: str, text: str) -> str:
    """Which setting a word of a spec is for."""
    if word in UPDATES:
        return "update"
    if word in ALLOCATIONS:
        return "allocation"
    if word == "structured" or re.fullmatch(r"\d+[:x]\d+", word):
        parse_pattern(word)
        return "pattern"
    try:
        find_importance(word)
    except PhoenixError as error:
        raise PhoenixError(
            f"compare: {word!r} in {text!r} is no importance ({', '.join(importances())}), update "
            f"({', '.join(UPDATES)}), allocation ({', '.join(ALLOCATIONS)}) or pattern (2:4, 16x1, structured)"
        ) from error
    return "importance"


def comparison_recipes(
    values: Mapping[str, Any], specs: Sequence[str], overrides: Iterable[str] = ()
) -> dict[str, Recipe]:
    """The recipes of a comparison by their specs, all checked.

    Args:
        values: of a recipe: model, task, seed and so on, `sparsify.sparsity`. A short fine-tune of rank 32 and 100
            steps is filled in, and evaluation on the validation split.
        specs: initialisations, as `parse_spec` reads them.
        overrides: `key=value` as for `load_recipe`; settings of the pruning (`calibration.samples=16`) also without
            `sparsify.` before them.

    Raises:
        PhoenixError: a spec or a setting is wrong, an override says what specs say, or two specs are the same.
    """
    changes = [f"sparsify.{text}" if _first(text) in SparsifySettings.model_fields else text for text in overrides]
    short = {section: dict(fields) for section, fields in SHORT.items()}
    if any(text.startswith("finetune.epochs=") for text in changes):
        del short["finetune"]["max_steps"]
    shared = override({**short, **values}, changes)
    whole = check(Recipe, {"name": "all", **shared}, "compare")
    said = [field for field in SAID_BY_SPECS if field in shared["sparsify"]]
    if said:
        raise PhoenixError(f"compare: {said[0]} can't be set; name it in a spec, such as {SAID_BY_SPECS[said[0]]}")
    if whole.evaluate.split != "validation" or "pruned" not in whole.evaluate.baselines:
        raise PhoenixError("compare: evaluate needs split: validation, and pruned among its baselines, to rank by")
    found: dict[str, Recipe] = {}
    for spec in map(parse_spec, specs):
        sparsify = {**shared.get("sparsify", {}), **spec.settings}
        recipe = check(Recipe, {**shared, "name": spec.name, "sparsify": sparsify}, f"compare: {spec.text}")
        for text, other in found.items():
            if other.sparsify == recipe.sparsify or other.name.casefold() == recipe.name.casefold():
                raise PhoenixError(f"compare: {text!r} and {spec.text!r} are the same; leave one out")
        found[spec.text] = recipe
    for recipe in found.values():
        for field, why in recipe.idle.items():
            # Calibration is shared with initialisations that are added to the comparison later.
            if field != "sparsify.calibration" and not any(other.uses(field) for other in found.values()):
                raise PhoenixError(f"compare: {field.removeprefix('sparsify.')}: {why}")
    return found


def _first(text: str) -> str:
    return text.partition("=")[0].partition(".")[0]


def compare(
    recipes: Mapping[str, Recipe],
    out: Path,
    *,
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> dict[str, Any]:
    """Run every recipe of a comparison in a directory of its own, and rank them. Writes compare.json.

    What was run before with the same settings is kept, and ranked along with the rest: a stopped comparison goes on,
    and one more initialisation can be added later. An initialisation that fails doesn't stop the others.

    Args:
        recipes: from `comparison_recipes`.
        out: the directory of the comparison.
        progress: called with (what, done, all).
        announce: called with (`spec: stage`, state).

    Returns:
        What compare.json holds: `settings` that all share, `inputs`, `split`, and `specs`, the best after the
        fine-tune first, then those that failed. One has `spec`, `directory`, `settings`, `sparsity`, `before` and
        `after` (each accuracy, stderr, examples and so on), `rank_before`, `rank_after` (equal accuracies share a
        rank), `seconds` and `pruning_seconds`; or `error`. `close` names those whose accuracy after is less than two
        standard errors below the best one's.

    Raises:
        PhoenixError: the model or the task can't be read, or `out` is a comparison with other settings.
    """
    first = next(iter(recipes.values()))
    model, task = pipeline.prepare(first)
    if first.sparsify.calibration.text is not None:
        read_text(first.sparsify.calibration.text, "calibration.text")
    result: dict[str, Any] = {
        "settings": _shared(first),
        "inputs": {"model": {"sha256": sha256(model)}, "task": task.record()},
        "split": first.evaluate.split,
    }
    result["specs"] = _earlier(out, result["settings"], result["inputs"])
    write_json(out / FILE, result)  # before the first run: from now on nobody compares with other settings here
    for spec, recipe in recipes.items():
        entry = {"spec": spec, "directory": recipe.name, "settings": _own(recipe)}
        entry |= _run(spec, recipe, out / recipe.name, progress, announce)
        result["specs"] = _ranked([*(other for other in result["specs"] if other["spec"] != spec), entry])
        result["close"] = _close(result["specs"])
        write_json(out / FILE, result)
    return result


def _run(
    spec: str, recipe: Recipe, directory: Path, progress: Progress | None, announce: Announce | None
) -> dict[str, Any]:
    """What came out of one run."""

    def tell(stage: str, state: str) -> None:
        if announce is not None:
            announce(f"{spec}: {stage}", state)

    try:
        pipeline.run(
            recipe, directory, resume=(directory / "manifest.json").is_file(), progress=progress, announce=tell
        )
    except PhoenixError as error:
        return {"error": str(error)}
    except Exception as error:  # a registered importance is anybody's code; one that breaks must not cost the rest
        return {"error": f"{type(error).__name__}: {first_line(error)}", "traceback": traceback.format_exc()}
    stages = read_json(directory / "manifest.json")["stages"]
    return {
        "sparsity": read_json(directory / "allocation.json")["sparsity"],
        "before": _accuracy(directory / "baselines" / "pruned"),
        "after": _accuracy(directory),
        "seconds": sum(stage["seconds"] for stage in stages.values()),
        "pruning_seconds": stages["sparsify"]["seconds"],
    }


def _accuracy(directory: Path) -> dict[str, Any]:
    measured = read_json(directory / "eval.json")["phoenix"]
    return {key: measured[key] for key in ("accuracy", "stderr", "metric", "task", "split", "examples", "num_fewshot")}


def _ranked(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """With ranks before and after, the best after first and the failed ones last; of equals, the earlier one."""
    entries = list(entries)
    done = [entry for entry in entries if "error" not in entry]
    for moment in ("before", "after"):
        for entry in done:
            better = sum(other[moment]["accuracy"] > entry[moment]["accuracy"] for other in done)
            entry[f"rank_{moment}"] = 1 + better
    return sorted(done, key=lambda entry: entry["rank_after"]) + [entry for entry in entries if "error" in entry]


def _close(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Specs that these examples don't tell apart from the first one."""
    best, *others = [entry for entry in entries if "error" not in entry] or [{}]

    def error(entry: Mapping[str, Any]) -> float:
        return math.hypot(best["after"]["stderr"] or 0, entry["after"]["stderr"] or 0)

    return [
        entry["spec"] for entry in others if best["after"]["accuracy"] - entry["after"]["accuracy"] <= 2 * error(entry)
    ]


def _own(recipe: Recipe) -> dict[str, Any]:
    """What a spec says, and what stands for what it doesn't."""
    return recipe.sparsify.model_dump(mode="json", include=set(SAID_BY_SPECS))


def _shared(recipe: Recipe) -> dict[str, Any]:
    """What all recipes of a comparison have in common."""
    return recipe.model_dump(mode="json", exclude={"name": True, "sparsify": set(SAID_BY_SPECS)})


def _earlier(out: Path, settings: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The initialisations that an earlier comparison in this directory has run."""
    if not (out / FILE).is_file():
        if out.is_dir() and any(not child.name.startswith(".") for child in out.iterdir()):
            raise PhoenixError(f"{out} exists and is no comparison; give another directory with --out")
        return []
    there = read_json(out / FILE)
    if not isinstance(there, dict) or not {"settings", "inputs", "specs"} <= there.keys():
        raise PhoenixError(f"{out / FILE} is no comparison; give another directory with --out")
    for before, now in ((there["settings"], settings), (there["inputs"], inputs)):
        one, other = dict(flatten(before)), dict(flatten(now))
        for field in one | other:
            if one.get(field) != other.get(field):
                raise PhoenixError(
                    f"{out} is a comparison with other settings: {field} is {one.get(field)} there and "
                    f"{other.get(field)} here; give another with --out"
                )
    return list(there["specs"])
