"""The commands of many runs: sweep plan, run, status, resume; and report. `cli` joins them to the others."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from phoenix_sparse.commands import require_writable, say
from phoenix_sparse.errors import PhoenixError

app = typer.Typer()
sweep = typer.Typer(
    no_args_is_help=True, help="Many runs: a matrix of models, tasks, methods, sparsities, modes, seeds."
)
app.add_typer(sweep, name="sweep")

SweepFile = Annotated[Path, typer.Argument(help="the sweep, a YAML file", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="changes, such as engine.workers=2 or engine.kind=inline"),
]
Out = Annotated[Path | None, typer.Option(help="the sweep's directory; sweeps/<name> unless given")]
PARTLY = 3  # the exit code when some runs failed


@app.command()
def report(
    directory: Annotated[
        Path, typer.Argument(help="a run directory; with --out, a directory that holds runs", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="write an analysis over all the runs here: summary.csv, index.html")
    ] = None,
) -> None:
    """Write a run's report.html and model card anew, or, with --out, an analysis over many runs."""
    from phoenix_sparse.report import build_report
    from phoenix_sparse.report.overview import PUBLISHED, SUMMARY, build_overview
    from phoenix_sparse.report.run_rows import find_runs

    if out is None:
        if find_runs(directory) != [directory]:
            raise PhoenixError(
                f"{directory} holds runs and is none; add --out DIR to analyse them, or give one of them"
            )
        say(f"report: {build_report(directory)}")
        return
    require_writable(out)
    command = f"phx report {directory.name} --out {out.name}"
    page = build_overview(directory, out, command=command, tell=lambda text: say(f"left out: {text}"))
    say(f"report: {page}", f"beside published figures: {out / PUBLISHED}", f"every figure: {out / SUMMARY}")


@sweep.command()
def plan(
    file: SweepFile,
    overrides: Overrides = None,
    *,
    cells: Annotated[bool, typer.Option("--cells", help="name every run")] = False,
    inputs: Annotated[
        bool,
        typer.Option("--inputs/--no-inputs", help="read models' configurations and tasks' data, and estimate costs"),
    ] = True,
) -> None:
    """Check every cell, and say how many runs there are, what they share and what they cost. Runs nothing."""
    from phoenix_sparse.console import showing
    from phoenix_sparse.report.series import counted
    from phoenix_sparse.report.text import seconds, size
    from phoenix_sparse.sweep.matrix import load_sweep
    from phoenix_sparse.sweep.planning import check_inputs, estimated_cost, shared_counts
    from phoenix_sparse.sweep.settings import AXES

    loaded = load_sweep(file, overrides or ())
    settings = loaded.settings
    sizes = [settings.models, settings.tasks, settings.methods, settings.sparsities, settings.modes, settings.seeds]
    product = " x ".join(counted(len(one), name) for one, name in zip(sizes, AXES, strict=True))
    left_out = f", {loaded.excluded} excluded" if loaded.excluded else ""
    say(f"{settings.name}: {counted(len(loaded.cells), 'run')} ({product}{left_out})")
    for stage, (needed, done) in shared_counts(loaded).items():
        say(f"  {stage}: needed by {counted(needed, 'run')}, computed {counted(done, 'time')}")
    gpus = f", GPUs {', '.join(settings.engine.gpus)}" if settings.engine.gpus else ""
    say(f"engine: {_engine(settings)}{gpus}; {counted(settings.retries, 'retry')}")
    if cells:
        say(*(cell.name for cell in loaded.cells))
    if not inputs:
        say("models and data were not looked at (--no-inputs)")
        return
    with showing():
        check_inputs(loaded)
        cost = estimated_cost(loaded)
    say(
        f"training, estimated: {seconds(cost['training_seconds'])} in all, one run after another (pruning, search and "
        "evaluation are not in it)",
        f"disk, estimated: {size(cost['disk_bytes'])} at most (what runs share lies there once)",
    )


@sweep.command()
def run(file: SweepFile, overrides: Overrides = None, *, out: Out = None) -> None:
    """Run a sweep. Exits with 3 when runs failed; the others are done."""
    _run(file, overrides, out, resume=False)


@sweep.command()
def resume(file: SweepFile, overrides: Overrides = None, *, out: Out = None) -> None:
    """Go on with a sweep that was stopped, and try its failed runs again. SWEEP.yaml may be the sweep's directory."""
    if file.is_dir():
        from phoenix_sparse.sweep.places import Places
        from phoenix_sparse.sweep.running import FILE, known_cells

        if out is not None:
            raise PhoenixError(f"--out: {file} is the sweep's directory already; leave --out away")
        known_cells(Places(file))
        file, out = file / FILE, file
    _run(file, overrides, out, resume=True)


@sweep.command()
def status(file: SweepFile, overrides: Overrides = None, *, out: Out = None) -> None:
    """Say where every run stands, from the runs' directories alone. SWEEP.yaml may be the sweep's directory.

    Exits with 0 whatever the runs' states are.
    """
    from phoenix_sparse.sweep.places import Places
    from phoenix_sparse.sweep.running import known_cells
    from phoenix_sparse.sweep.status import standings

    places = Places(file) if file.is_dir() else Places(_directory(file, overrides, out))
    found = standings(places, known_cells(places))
    for one in found:
        if one.state in ("running", "interrupted"):
            say(f"{one.state}: {one.name} ({one.stage or 'starting'}, attempt {one.attempts})")
    _tell_failures(found)
    say(_counted(found))
    states = {one.state for one in found}
    if "interrupted" in states and "running" not in states:  # else the sweep may be at work, and come to it itself
        say(f"{places.resume} goes on with what was interrupted")


@sweep.command(hidden=True)
def one(
    out: Annotated[Path, typer.Argument(help="a sweep's directory")],
    name: Annotated[str, typer.Argument(help="a cell's name")],
    share: Annotated[bool, typer.Option("--share/--no-share", help="share work with the sweep's other runs")] = True,
    models: Annotated[bool, typer.Option("--models/--no-models", help="keep the finished run's models")] = True,
) -> None:
    """Run one cell of a sweep that is laid out, or go on with it: what the engine starts for each."""
    from phoenix_sparse.sweep.places import Places, note

    places = Places(out)
    try:
        signal.signal(signal.SIGTERM, _interrupt)  # first: what is imported takes seconds
        sys.unraisablehook = _again
        _run_cell(places, name, share=share, models=models)
    except KeyboardInterrupt:
        note(places.cell(name), "interrupted", pid=os.getpid())
        typer.echo(f"interrupted; {places.resume} goes on from the last checkpoint", err=True)
        raise typer.Exit(130) from None


def _run_cell(places: Any, name: str, *, share: bool, models: bool) -> None:
    from phoenix_sparse import pipeline
    from phoenix_sparse.console import showing
    from phoenix_sparse.report import build_report
    from phoenix_sparse.runs import MANIFEST
    from phoenix_sparse.sweep.launching import end_with
    from phoenix_sparse.sweep.running import cell_recipe, remove_models
    from phoenix_sparse.sweep.shared_work import sharing
    from phoenix_sparse.sweep.status import is_complete

    if parent := os.environ.get("PHOENIX_SWEEP_PARENT"):
        end_with(int(parent))
    recipe, directory = cell_recipe(places, name), places.run(name)
    if models or not is_complete(directory):  # one that ended while its models were removed has no more to do
        with showing() as show:
            pipeline.run(
                recipe,
                directory,
                resume=(directory / MANIFEST).is_file(),
                progress=show.progress,
                announce=show.announce,
                share=sharing(recipe, places.shared) if share else None,
            )
    if not models:
        remove_models(directory)
        build_report(directory)


def _interrupt(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what follows writes the manifest
    raise KeyboardInterrupt


def _again(unraisable: Any) -> None:
    """Interrupt once more where Python dropped it, which it does with what is raised while it frees an object."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
    else:
        sys.__unraisablehook__(unraisable)


def _engine(settings: Any) -> str:
    """Where a sweep's runs are run."""
    place = settings.engine.provider.kind
    where = "this machine" if place == "local" else place
    return f"{settings.engine.kind} on {where}, {settings.engine.workers} at once on a node"


def _directory(file: Path, overrides: list[str] | None, out: Path | None) -> Path:
    from phoenix_sparse.sweep.matrix import load_sweep

    return out or Path("sweeps") / load_sweep(file, overrides or ()).settings.name


def _run(file: Path, overrides: list[str] | None, out: Path | None, *, resume: bool) -> None:
    from phoenix_sparse.console import ERR, showing
    from phoenix_sparse.report.series import counted
    from phoenix_sparse.sweep.matrix import load_sweep
    from phoenix_sparse.sweep.places import Places
    from phoenix_sparse.sweep.planning import check_inputs
    from phoenix_sparse.sweep.running import require_place, run_sweep

    loaded = load_sweep(file, overrides or ())
    directory = out or Path("sweeps") / loaded.settings.name
    require_writable(directory)
    require_place(loaded, directory, resume=resume)
    with showing():
        check_inputs(loaded)

    def tell(one: Any, count: int, total: int) -> None:
        took = f" in {one.seconds:.1f} s" if one.seconds is not None else ""
        again = f", attempt {one.attempts}" if one.attempts > 1 else ""
        ERR.print(f"{count}/{total} {one.state}: {one.name}{took}{again}", markup=False)

    def begin(todo: int) -> None:
        queue = "" if loaded.settings.engine.provider.kind == "local" else "; its jobs may wait in the queue"
        text = f"{counted(todo, 'run')} to do in {directory}, {_engine(loaded.settings)}{queue}"
        ERR.print(f"{text}; `phx sweep status {directory}` says where each stands", markup=False, soft_wrap=True)

    found = run_sweep(loaded, directory, resume=resume, tell=tell, begin=begin)
    _tell_failures(found)
    say(_counted(found), f"registry: {directory / 'registry.csv'}")
    states = {one.state for one in found}
    if states - {"done", "failed"}:
        typer.echo(f"phx: stopped; go on with {Places(directory).resume}", err=True)
        raise typer.Exit(130)
    if "failed" in states:
        raise typer.Exit(PARTLY)


def _tell_failures(found: Sequence[Any]) -> None:
    from phoenix_sparse.report.series import counted

    for one in found:
        if one.state == "failed":
            say(f"failed: {one.name} ({counted(one.attempts, 'attempt')}): {one.reason}")


def _counted(found: Sequence[Any]) -> str:
    from phoenix_sparse.report.series import counted
    from phoenix_sparse.sweep.status import counts

    if not found:
        raise PhoenixError("sweep: no cell lies here")
    return f"{counted(len(found), 'run')}: " + ", ".join(
        f"{count} {state}" for state, count in counts(found).items() if count
    )
