"""A sweep's directory, and the record of a cell's attempts.

OUT/sweep.yaml          the sweep as it was begun, for `resume` to compare with
OUT/cells/<name>/       recipe.yaml, cell.json (its place in the matrix), log.txt, attempts.jsonl
OUT/runs/<name>/        the run directory
OUT/shared/             work that runs share, by hash
OUT/registry.csv        and registry.parquet: every run's settings and results
"""

import json
import os
import platform
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LAST_LINES = 3
LONGEST = 400  # characters of a reason


@dataclass(frozen=True)
class Places:
    """Where the files of a sweep lie."""

    out: Path

    @property
    def stop(self) -> Path:
        """Stands there while the sweep is told to end, for workers on other machines."""
        return self.out / ".stop"

    @property
    def shared(self) -> Path:
        return self.out / "shared"

    @property
    def resume(self) -> str:
        """The command that goes on with the sweep, to be copied into a shell."""
        return f"`phx sweep resume {shlex.quote(str(self.out))}`"

    def cell(self, name: str) -> Path:
        return self.out / "cells" / name

    def run(self, name: str) -> Path:
        return self.out / "runs" / name


def note(cell: Path, event: str, **facts: Any) -> None:
    """Add a line to a cell's record in one write, so that a kill leaves whole lines."""
    line = {"event": event, "at": datetime.now(UTC).isoformat(timespec="milliseconds"), "host": platform.node()}
    cell.mkdir(parents=True, exist_ok=True)
    with (cell / "attempts.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line | facts) + "\n")


def attempts(cell: Path) -> list[dict[str, Any]]:
    """A cell's attempts in their order, each with what is known of its end.

    That is what its worker noted (`exit`, `seconds`, `stopped`), and `interrupted` where the run itself noted that it
    was: the end of a batch job, or a kill, leaves no worker to note anything.
    """
    path = cell / "attempts.jsonl"
    found: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # the end of a file that a full disk cut off
        if line.get("event") == "begun":
            found.append({key: line[key] for key in line if key not in ("event", "at")} | {"begun": line["at"]})
        elif line.get("event") == "ended" and found:
            found[-1] |= {key: line.get(key) for key in ("exit", "seconds", "stopped")}
        elif line.get("event") == "interrupted" and found and found[-1].get("pid") == line.get("pid"):
            found[-1]["interrupted"] = True
    return found


def is_alive(attempt: Mapping[str, Any]) -> bool:
    """Whether an attempt's process still works; of one on another machine only its record is known."""
    if "exit" in attempt:
        return False
    if attempt["host"] != platform.node():
        return not attempt.get("interrupted")
    try:
        os.kill(attempt["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    stat = Path(f"/proc/{attempt['pid']}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"  # ended, and nobody has asked how yet
    except (OSError, IndexError):
        return True


def reason(cell: Path, attempt: Mapping[str, Any]) -> str:
    """How an attempt ended, with the last lines of its log."""
    code = attempt.get("exit")
    if code is None:
        how = "its process is gone without a word"
    elif code < 0:
        how = f"killed by signal {-code}"
    else:
        how = f"exit code {code}"
    lines = last_lines(cell / "log.txt")
    return how + (": " + " | ".join(lines) if lines else "")


def last_lines(path: Path, count: int = LAST_LINES) -> list[str]:
    """The last lines of a log that say something."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - 8192))
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("--- attempt")]
    return [line[:LONGEST] for line in lines[-count:]]


def running(places: Places, names: Iterable[str]) -> dict[str, int]:
    """Processes on this machine that are at work on cells."""
    found = {}
    for name in names:
        known = attempts(places.cell(name))
        if known and known[-1]["host"] == platform.node() and is_alive(known[-1]):
            found[name] = int(known[-1]["pid"])
    return found
