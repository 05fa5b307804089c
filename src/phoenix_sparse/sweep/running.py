"""Run a sweep: lay its cells out, give those that aren't done to an engine, keep the registry."""

import contextlib
import fcntl
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import parse_yaml, write_json, write_text
from phoenix_sparse.recipe import Recipe, dump_recipe, load_recipe
from phoenix_sparse.sweep.engine_inline import run_inline
from phoenix_sparse.sweep.engine_parsl import run_parsl
from phoenix_sparse.sweep.launching import Job, Stop
from phoenix_sparse.sweep.matrix import Sweep, read_yaml
from phoenix_sparse.sweep.places import Places, attempts
from phoenix_sparse.sweep.registry import write_registry
from phoenix_sparse.sweep.status import Standing, standing, standings

FILE = "sweep.yaml"
LOCK = ".lock"
# Fields that may differ when a sweep is gone on with: they change how it is run, not what.
FREE = ("engine", "retries", "share", "keep")
Tell = Callable[[Standing, int, int], None]  # (the cell that ended, how many have, of how many)


def run_sweep(
    sweep: Sweep,
    out: Path,
    *,
    resume: bool,
    tell: Tell | None = None,
    begin: Callable[[int], None] | None = None,
) -> list[Standing]:
    """Run all cells that aren't done.

    Runs that fail don't stop the others. SIGTERM and Ctrl-C end the runs at a checkpoint that `resume` goes on from.

    Args:
        sweep: from `load_sweep`.
        out: the sweep's directory.
        resume: go on with a sweep that lies there; failed cells are tried again.
        tell: called when a cell has ended.
        begin: called with the number of cells to run, before the engine starts.

    Returns:
        Where every cell stands.

    Raises:
        PhoenixError: the directory holds another sweep, is in use, or the engine can't start.
    """
    places = Places(out)
    with _held(out):
        lay_out(sweep, places, resume=resume)
        names = [cell.name for cell in sweep.cells]
        todo = [one.name for one in standings(places, names) if one.state != "done"]
        engine, directory = sweep.settings.engine, str(Path.cwd())
        settings, where = sweep.settings, str(out.resolve())
        light = settings.keep == "results"
        jobs = [
            Job(
                name,
                where,
                directory,
                settings.retries,
                settings.share,
                engine.threads,
                engine.gpus,
                keep_models=not light,
            )
            for name in todo
        ]
        count = 0
        if begin is not None and jobs:
            begin(len(jobs))

        def ended(name: str, _code: int) -> None:
            nonlocal count
            count += 1
            if tell is not None:
                tell(standing(places, name), count, len(jobs))

        stop = Stop()
        try:
            with _signals(stop):
                if jobs and engine.kind == "inline":
                    run_inline(jobs, engine.workers, stop, ended)
                elif jobs:
                    run_parsl(jobs, engine, places, stop, ended)
        finally:
            found = standings(places, names)
            write_registry(places, sweep.cells, found)
        _finish_removals(places, found)
        if light and all(one.state == "done" for one in found):
            shutil.rmtree(places.shared, ignore_errors=True)  # no run is left to take anything from it
    return found


def require_place(sweep: Sweep, out: Path, *, resume: bool) -> None:
    """Refuse a directory that `run_sweep` would refuse, before models and data are read for it. Makes nothing.

    Raises:
        PhoenixError: as `run_sweep` would raise it.
    """
    with _held(out) if (out / LOCK).is_file() else contextlib.nullcontext():
        _require_own(sweep, Places(out), resume=resume)


def lay_out(sweep: Sweep, places: Places, *, resume: bool) -> None:
    """Write the cells' recipes, or check that those that lie there are the same.

    Raises:
        PhoenixError: a sweep lies there and `resume` isn't set, or it is another one, or its file is damaged.
    """
    _require_own(sweep, places, resume=resume)
    for cell in sweep.cells:
        directory = places.cell(cell.name)
        # Threads are the engine's matter, which may differ; the recipe that a run was begun with is the one to keep.
        if not (directory / "cell.json").is_file():
            write_text(directory / "recipe.yaml", dump_recipe(cell.recipe))
            write_json(directory / "cell.json", dict(cell.axes))
    write_text(places.out / FILE, yaml.safe_dump(_plain(sweep), sort_keys=False, allow_unicode=True))


def _require_own(sweep: Sweep, places: Places, *, resume: bool) -> None:
    """Refuse a directory that holds another sweep, or one that isn't to be gone on with."""
    file = places.out / FILE
    mine = _plain(sweep)
    if file.is_file():
        if not resume:
            raise PhoenixError(f"{places.out} holds a sweep already; go on with it by {places.resume}, or give --out")
        try:
            before = read_yaml(file)
        except PhoenixError as error:
            raise PhoenixError(
                f"{error}; delete it, and `phx sweep run` with the file that the sweep was begun with goes on from the "
                "runs that lie there"
            ) from error
        for field in mine:
            if field not in FREE and before.get(field) != mine[field]:
                raise PhoenixError(
                    f"{places.out} is a sweep with another {field}; give another directory with --out, or the file "
                    "that it was begun with"
                )
    elif resume:
        raise PhoenixError(f"{places.out}: no {FILE}; begin it with `phx sweep run`, or give its directory with --out")


def _plain(sweep: Sweep) -> dict[str, Any]:
    """The sweep's settings as YAML has them."""
    plain: dict[str, Any] = parse_yaml(yaml.safe_dump(sweep.settings.model_dump(mode="json"), sort_keys=False))
    return plain


def cell_recipe(places: Places, name: str) -> Recipe:
    """The recipe of a cell that is laid out.

    Raises:
        PhoenixError: there is no such cell.
    """
    path = places.cell(name) / "recipe.yaml"
    if not path.is_file():
        raise PhoenixError(f"{places.out}: no cell {name!r}; `phx sweep plan --cells` names them")
    return load_recipe(path)


def _finish_removals(places: Places, found: list[Standing]) -> None:
    """Remove what a run that was killed in its removal has left of its models: it is done, and not begun again."""
    for one in found:
        known = attempts(places.cell(one.name))
        if one.state == "done" and known and not known[-1].get("keep_models", True):
            remove_models(places.run(one.name))


def remove_models(run: Path) -> None:
    """Remove the models and adapters of a finished run; masks, results and reports stay.

    Its manifest goes on naming them with their hashes: what they were is known, and the same recipe makes them again.
    """
    found = [path.parent for name in ("config.json", "adapter_config.json") for path in run.rglob(name)]
    for directory in found:
        if directory != run:
            shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):  # it holds something else, or isn't there
        (run / "adapter").rmdir()


def known_cells(places: Places) -> list[str]:
    """The names of a sweep's cells, from its directory alone.

    Raises:
        PhoenixError: it holds no sweep.
    """
    cells = places.out / "cells"
    if not cells.is_dir():
        raise PhoenixError(f"{places.out}: no sweep lies here; begin it with `phx sweep run`")
    return sorted(child.name for child in cells.iterdir() if (child / "cell.json").is_file())


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """One sweep process a directory."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("w")
    except OSError as error:
        raise PhoenixError(f"{out}: {error.strerror}; give another directory with --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PhoenixError(f"{out} is in use by another `phx sweep`; wait for it or give another --out") from error
        yield


@contextlib.contextmanager
def _signals(stop: Stop) -> Iterator[None]:
    """Let SIGTERM, SIGINT and what batch systems send before the walltime end the sweep in order."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
