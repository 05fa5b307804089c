"""Where the cells of a sweep stand, from the files beside them alone: nothing is asked of an engine."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_json
from phoenix_sparse.runs import MANIFEST
from phoenix_sparse.sweep.places import Places, attempts, is_alive, reason

State = Literal["done", "running", "stopped", "failed", "waiting"]
STATES: tuple[State, ...] = ("done", "running", "stopped", "failed", "waiting")


@dataclass(frozen=True)
class Standing:
    """A cell's state."""

    name: str
    state: State
    stage: str | None  # the one that runs, or that was the last to begin
    attempts: int
    seconds: float | None  # of its processes, all attempts together; None while one's end isn't known
    reason: str | None  # why it failed, with the last lines of its log


def standings(places: Places, names: Iterable[str]) -> list[Standing]:
    """The state of each cell."""
    return [standing(places, name) for name in names]


def standing(places: Places, name: str) -> Standing:
    cell, tried = places.cell(name), attempts(places.cell(name))
    stages = read_stages(places.run(name))
    stage = max(stages, key=lambda one: str(stages[one].get("begun", "")), default=None)
    known = [attempt.get("seconds") for attempt in tried]
    seconds = sum(one for one in known if one is not None) if known and None not in known else None
    last = tried[-1] if tried else None
    if last is not None and is_alive(last):
        return Standing(name, "running", stage, len(tried), None, None)
    if is_finished(stages):
        return Standing(name, "done", stage, len(tried), seconds, None)
    if last is None:
        return Standing(name, "stopped" if stages else "waiting", stage, 0, None, None)
    if last.get("stopped") or last.get("exit") == 130:
        return Standing(name, "stopped", stage, len(tried), seconds, None)
    return Standing(name, "failed", stage, len(tried), seconds, reason(cell, last))


def read_stages(run: Path) -> dict[str, Any]:
    """A run's stages as its manifest has them; none where there is no run yet."""
    if not (run / MANIFEST).is_file():
        return {}
    try:
        stages = read_json(run / MANIFEST)["stages"]
    except (PhoenixError, KeyError, TypeError):
        return {}
    return {name: one for name, one in stages.items() if isinstance(one, dict)} if isinstance(stages, dict) else {}


def is_finished(stages: Mapping[str, Mapping[str, Any]]) -> bool:
    """The report is a run's last stage; a stage that is done again leaves it standing and is itself not done."""
    return "report" in stages and all(one.get("status") == "done" for one in stages.values())


def counts(found: Iterable[Standing]) -> dict[State, int]:
    """How many cells are in each state."""
    counted = Counter(one.state for one in found)
    return {state: counted[state] for state in STATES}
