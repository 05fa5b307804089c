"""Where the cells of a sweep stand, from the files beside them alone: nothing is asked of an engine."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_json
from phoenix_sparse.report.run_rows import run_row
from phoenix_sparse.runs import MANIFEST, RECIPE
from phoenix_sparse.sweep.places import Places, attempts, is_alive, reason

State = Literal["done", "running", "interrupted", "failed", "waiting"]
STATES: tuple[State, ...] = ("done", "running", "interrupted", "failed", "waiting")


@dataclass(frozen=True)
class Standing:
    """A cell's state."""

    name: str
    state: State
    stage: str | None  # the one that runs, or that was the last to begin
    attempts: int
    seconds: float | None  # of its processes, all attempts together; None while one's end isn't known
    reason: str | None  # why it failed, with the last lines of its log, or which of its files can't be read


def standings(places: Places, names: Iterable[str]) -> list[Standing]:
    """The state of each cell."""
    return [standing(places, name) for name in names]


def standing(places: Places, name: str) -> Standing:
    """The state of one cell. A run with a file that can't be read isn't done, whatever its processes said."""
    cell, tried = places.cell(name), attempts(places.cell(name))
    stages, damage = read_stages(places.run(name))
    stage = max(stages, key=lambda one: str(stages[one].get("begun", "")), default=None)
    known = [attempt.get("seconds") for attempt in tried]
    seconds = sum(one for one in known if one is not None) if known and None not in known else None
    last = tried[-1] if tried else None
    if last is not None and is_alive(last):
        return Standing(name, "running", stage, len(tried), None, None)
    damage = damage or (damaged_result(places.run(name)) if is_finished(stages) else None)
    if damage is not None:
        return Standing(name, "failed", stage, len(tried), seconds, damage)
    if is_finished(stages):
        return Standing(name, "done", stage, len(tried), seconds, None)
    if last is None:
        return Standing(name, "interrupted" if stages else "waiting", stage, 0, None, None)
    if last.get("stopped") or last.get("interrupted") or last.get("exit") == 130:
        return Standing(name, "interrupted", stage, len(tried), seconds, None)
    if last.get("exit") == 0 and not stages:  # its process said that all went well
        gone = f"{places.run(name)} is gone; {places.resume} begins this run anew"
        return Standing(name, "failed", stage, len(tried), seconds, gone)
    return Standing(name, "failed", stage, len(tried), seconds, reason(cell, last))


def read_stages(run: Path) -> tuple[dict[str, Any], str | None]:
    """A run's stages as its manifest has them, none where there is no run yet; and what is wrong with the manifest."""
    path = run / MANIFEST
    if not path.is_file():
        return {}, None
    try:
        manifest = read_json(path)
        stages = manifest["stages"]
        if isinstance(manifest["inputs"], dict) and all(isinstance(one, dict) for one in stages.values()):
            return stages, None
        what = f"{path} is no run's manifest"
    except PhoenixError as error:
        what = str(error)
    except (KeyError, TypeError, AttributeError):
        what = f"{path} is no run's manifest"
    return {}, f"{what}; {_anew(run)}"


def reached(run: Path) -> tuple[int, int]:
    """How far a run is: the stages that are done, and the step of the newest checkpoint that a training left."""
    stages, _ = read_stages(run)
    folders = [name for _, names, _ in os.walk(run) for name in names]  # which doesn't mind what vanishes meanwhile
    steps = [int(found[1]) for name in folders if (found := re.fullmatch(r"checkpoint-(\d+)", name))]
    return sum(one.get("status") == "done" for one in stages.values()), max(steps, default=0)


def damaged_result(run: Path) -> str | None:
    """Which file of a finished run can't be read, and what mends it."""
    try:
        run_row(run)
    except PhoenixError as error:
        text = str(error)
        if text.startswith(str(run / RECIPE)):  # without it nobody knows what the run is
            return f"{text}; {_anew(run)}"
        if text.startswith(str(run / "bench.json")):  # no part of the sweep's own work
            return f"{text}; delete it, or measure anew by `phx bench`"
        first = "" if text.startswith(str(run)) else "delete it, then "  # a stage sees that its output isn't whole
        return f"{text}; {first}{_sweep_of(run).resume} makes it anew"
    return None


def _sweep_of(run: Path) -> Places:
    return Places(run.parent.parent)


def _anew(run: Path) -> str:
    return f"delete {run}, then {_sweep_of(run).resume} begins this run anew"


def is_finished(stages: Mapping[str, Mapping[str, Any]]) -> bool:
    """The report is a run's last stage; a stage that is done again leaves it standing and is itself not done."""
    return "report" in stages and all(one.get("status") == "done" for one in stages.values())


def is_complete(run: Path) -> bool:
    """Whether a run has ended, and its results can be read."""
    stages, damage = read_stages(run)
    return damage is None and is_finished(stages) and damaged_result(run) is None


def counts(found: Iterable[Standing]) -> dict[State, int]:
    """How many cells are in each state."""
    counted = Counter(one.state for one in found)
    return {state: counted[state] for state in STATES}
