"""What a run directory says: its JSON files, read, checked and put side by side. Nothing is filled in."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import parse_yaml, read_json
from phoenix_sparse.jsonl import read_jsonl
from phoenix_sparse.report.records import (
    Accuracy,
    AllAccuracies,
    Allocation,
    Certificate,
    Flops,
    Manifest,
    Perplexity,
    Prediction,
    Record,
    Search,
    Tune,
)

# The four models of a run, in the order in which they are shown, with the directory of their files.
ROLES = {"dense": "baselines/dense", "dense_lora": "baselines/dense_lora", "pruned": "baselines/pruned", "tuned": "."}
ROLE_NAMES = {
    "dense": "Dense base",
    "dense_lora": "Dense LoRA",
    "pruned": "Pruned, untuned",
    "tuned": "Sparse, tuned, merged",
}


SHOWN = 3  # right answers, and wrong ones


@dataclass(frozen=True)
class Facts:
    """Everything that a report shows. None, or a missing key, where a file is missing."""

    manifest: Manifest
    recipe: Mapping[str, Any] | None
    accuracies: Mapping[str, Accuracy]
    predictions: Mapping[str, list[Prediction]]
    all_accuracies: Mapping[str, AllAccuracies]
    tunes: Mapping[str, Tune]
    perplexities: Mapping[str, Perplexity]
    allocation: Allocation | None
    search: Search | None
    certificate: Certificate | None
    flops: Flops | None
    has_merged_model: bool
    merged_was_removed: bool  # it was made, and isn't there

    @property
    def sparsities(self) -> dict[str, float]:
        """Sparsity of each pruned linear: measured in the merged model, else that of the masks."""
        layers = self.certificate.layers if self.certificate else self.allocation.layers if self.allocation else {}
        return {name: layer.sparsity for name, layer in layers.items()}

    @property
    def role_names(self) -> dict[str, str]:
        """The models' names; a merge that filled the zeros isn't called sparse."""
        filled = self.certificate is not None and self.certificate.off_mask_nonzeros > 0
        return ROLE_NAMES | ({"tuned": "Tuned, merged dense"} if filled else {})

    @property
    def accuracies_compare(self) -> bool:
        """Whether all accuracies were measured in one way: task, metric, split, number of examples and of shots."""
        ways = {(a.task, a.metric, a.split, a.examples, a.num_fewshot) for a in self.accuracies.values()}
        return len(ways) <= 1

    def paired(self, one: str, other: str) -> tuple[float, float] | None:
        """Mean and standard error of one role's score minus another's on the same examples; None if they aren't."""
        first, second = self.predictions.get(one, []), self.predictions.get(other, [])
        if len(first) < 2 or [row.hash for row in first] != [row.hash for row in second]:
            return None
        apart = [mine.score - theirs.score for mine, theirs in zip(first, second, strict=True)]
        return statistics.fmean(apart), statistics.stdev(apart) / math.sqrt(len(apart))

    @property
    def examples(self) -> list[Prediction]:
        """Answers of the result to show: the first ones that are right, and the first ones that aren't."""
        rows = self.predictions.get("tuned", [])
        right, wrong = [row for row in rows if row.score], [row for row in rows if not row.score]
        return right[:SHOWN] + wrong[:SHOWN]


def read_facts(run_directory: Path) -> Facts:
    """Read the files of a run directory.

    Raises:
        PhoenixError: it isn't a run directory, or one of its files is damaged (the message names file and field).
    """
    run_directory = Path(run_directory)
    if not (run_directory / "manifest.json").is_file():
        raise PhoenixError(f"{run_directory}: no manifest.json; give a run directory")
    manifest = _read(run_directory / "manifest.json", Manifest)
    if manifest is None:
        raise PhoenixError(f"{run_directory}: no manifest.json; give a run directory")
    search = _read(run_directory / "search.json", Search)
    if search is not None:
        _check_search(run_directory / "search.json", search)
    has_merged_model = (run_directory / "merged" / "config.json").is_file()
    merge = manifest.stages.get("merge")
    return Facts(
        manifest=manifest,
        recipe=_read_recipe(run_directory / "recipe.yaml"),
        accuracies=_by_role(run_directory, "eval.json", Accuracy, "phoenix"),
        predictions=_predictions(run_directory),
        all_accuracies=_by_role(run_directory, "eval_all.json", AllAccuracies),
        tunes=_by_role(run_directory, "tune.json", Tune),
        perplexities=_by_role(run_directory, "perplexity.json", Perplexity),
        allocation=_read(run_directory / "allocation.json", Allocation),
        search=search,
        certificate=_read(run_directory / "certificate.json", Certificate),
        flops=_read(run_directory / "flops.json", Flops),
        has_merged_model=has_merged_model,
        merged_was_removed=merge is not None and merge.status == "done" and not has_merged_model,
    )


def _predictions(run_directory: Path) -> dict[str, list[Prediction]]:
    found = {}
    for role, place in ROLES.items():
        path = run_directory / place / "predictions.jsonl"
        if path.exists():
            found[role] = [_check(path, Prediction, row) for row in read_jsonl(path)]
    return found


R = TypeVar("R", bound=Record)


def _read(path: Path, kind: type[R], key: str | None = None) -> R | None:
    """Read one file, or None where there is none. With `key`, only that part of it."""
    if not path.exists():
        return None
    value = read_json(path)
    if key is not None:
        if not isinstance(value, dict) or key not in value:
            raise PhoenixError(f"{path}: no {key!r} in it; the file is not one that Phoenix wrote")
        value = value[key]
    return _check(path, kind, value)


def _check(path: Path, kind: type[R], value: Any) -> R:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise PhoenixError(f"{path}: {field}: {first['msg']}; the file is damaged") from error


def _by_role(run_directory: Path, file: str, kind: type[R], key: str | None = None) -> dict[str, R]:
    found = {role: _read(run_directory / place / file, kind, key) for role, place in ROLES.items()}
    return {role: value for role, value in found.items() if value is not None}


def _read_recipe(path: Path) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    try:
        recipe = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PhoenixError(f"{path}: not a YAML file ({type(error).__name__})") from error
    if not isinstance(recipe, dict):
        raise PhoenixError(f"{path}: expected settings by name; the file is damaged")
    return recipe


def _check_search(path: Path, search: Search) -> None:
    known = {candidate.id for candidate in search.candidates}
    for name in [*search.front, search.choice]:
        if name not in known:
            raise PhoenixError(f"{path}: candidate {name!r} is named and isn't listed; the file is damaged")
