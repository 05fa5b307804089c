"""A sweep under faults: sixty short runs, a worker and a run killed with -9, one run made to fail; then `resume`.

    python benchmarks/sweep_faults.py OUT [--engine parsl|inline] [--calm] [KEY=VALUE ...]

Prints what happened to the runs, and the sweep's overhead: the share of the workers' time that no run's process used.
With `--calm` nothing is killed or made to fail, and that share is the engine's, the registry's and the imports' alone.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas

from phoenix_sparse.sweep.places import Places, attempts, is_alive

SWEEP = Path(__file__).parents[1] / "recipes" / "sweep-demo.yaml"
WORKERS = 2


def phx(command: str, out: Path, engine: str, changes: list[str]) -> subprocess.Popen[str]:
    settings = [f"engine.kind={engine}", f"engine.workers={WORKERS}", *changes]
    arguments = [sys.executable, "-m", "phoenix_sparse.cli", "sweep", command, str(SWEEP), *settings, "--out", str(out)]
    return subprocess.Popen(arguments, text=True)


def at_work(places: Places, besides: set[str]) -> tuple[str, int]:
    """A cell whose process has run for some seconds, and that process."""
    while True:
        for cell in sorted((places.out / "cells").glob("*")):
            known = attempts(cell)
            stage = places.run(cell.name) / "masks.safetensors"
            if cell.name not in besides and known and is_alive(known[-1]) and stage.is_file():
                return cell.name, int(known[-1]["pid"])
        time.sleep(0.2)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--engine", default="parsl", choices=("parsl", "inline"))
    parser.add_argument("--calm", action="store_true", help="no faults: measure the overhead alone")
    given = parser.parse_args()
    places = Places(given.out.resolve())
    if given.calm:
        started = time.perf_counter()
        code = phx("run", places.out, given.engine, given.changes).wait()
        print(f"exit code {code}")
        report_overhead(places, time.perf_counter() - started)
        return
    # A file where a run's directory should be: that run can't begin, whatever is tried.
    blocked = places.run("demo-demo-random-90-s2d-s0")
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way\n")
    started = time.perf_counter()
    sweep = phx("run", places.out, given.engine, given.changes)
    time.sleep(20)
    killed, pid = at_work(places, set())
    os.kill(pid, signal.SIGKILL)
    print(f"killed the run {killed}", flush=True)
    if given.engine == "parsl":
        time.sleep(25)
        lost, pid = at_work(places, {killed})
        os.kill(parent(pid), signal.SIGKILL)
        print(f"killed the worker of {lost}", flush=True)
    code = sweep.wait()
    wall = time.perf_counter() - started
    table = pandas.read_parquet(places.out / "registry.parquet")
    print(f"exit code {code}; states: {table['state'].value_counts().to_dict()}")
    print(f"with an accuracy: {table['accuracy'].notna().sum()} of {len(table)}")
    for _, row in table[table["state"] != "done"].iterrows():
        print(f"  {row['cell']}: {row['reason']}")
    for _, row in table[table["attempts"] > 1].iterrows():
        print(f"  {row['cell']}: {row['attempts']} attempts, {row['state']}")
    report_overhead(places, wall)
    blocked.unlink()
    code = phx("resume", places.out, given.engine, given.changes).wait()
    table = pandas.read_parquet(places.out / "registry.parquet")
    print(f"resume: exit code {code}; states: {table['state'].value_counts().to_dict()}")


def report_overhead(places: Places, wall: float) -> None:
    """Processes' seconds against the workers' time, of attempts that ended in order."""
    used = 0.0
    for cell in (places.out / "cells").glob("*"):
        used += sum(attempt.get("seconds") or 0.0 for attempt in attempts(cell))
    shared = sum(
        stage["seconds"]
        for manifest in places.out.glob("runs/*/manifest.json")
        for stage in json.loads(manifest.read_text())["stages"].values()
        if "shared" in stage
    )
    available = WORKERS * wall
    print(f"wall {wall:.1f} s x {WORKERS} workers = {available:.1f} s; runs' processes {used:.1f} s")
    print(f"overhead {(available - used) / used:.1%} of the runs' time; taking shared work {shared:.1f} s of it")


if __name__ == "__main__":
    main()
