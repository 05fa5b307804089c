"""A run directory: stages that read files and write files, a manifest that vouches for them, resume after a kill."""

import contextlib
import fcntl
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

import phoenix_sparse
from phoenix_sparse import processes
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import inside, parse_yaml, read_json, sha256, write_json, write_text
from phoenix_sparse.progress import Announce
from phoenix_sparse.recipe import Recipe, dump_recipe

MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"
LOCK = ".lock"
WORK = ".work"
# What the main process says to those that follow it.
BEGIN, DONE = "begin", "done"
Action = Callable[[], Iterable[str]]
# Gives a stage's outputs, made by the action or taken from elsewhere, and facts for its record in the manifest.
Share = Callable[["Run", str, Action], tuple[list[str], dict[str, Any]]]
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "lm-eval", "safetensors", "optuna")


class Run:
    """A run directory that this process holds."""

    def __init__(
        self,
        directory: Path,
        manifest: dict[str, Any],
        announce: Announce | None = None,
        share: Share | None = None,
    ) -> None:
        self.directory, self.manifest = directory, manifest
        self._share: Share = share or (lambda _run, _stage, action: (list(action()), {}))
        self._announce = announce or (lambda _stage, _state: None)
        self._redo = False
        self._joined = False  # whether the other processes of this launch are at work, too

    def path(self, name: str) -> Path:
        return self.directory / name

    def work(self, stage: str) -> Path:
        """A place for a stage's checkpoints and journals, removed when the stage is done."""
        return self.directory / WORK / stage

    def stage(self, name: str, action: Action, *, together: bool = False) -> bool:
        """Do a stage, unless it was done before and its files are as it left them; then all later ones are, too.

        Args:
            name: of the stage.
            action: does the work and gives the names of the files and directories it wrote.
            together: whether all processes of this launch do the work; the others wait for the main one otherwise.

        Returns:
            Whether the stage was done now.
        """
        done = self._stage(name, self._joining(action) if together else action)
        processes.say(DONE)
        return done

    def alone(self, action: Action) -> list[str]:
        """A part of a stage that all processes do: the main one does it while the others wait."""
        self._joined = False
        outputs = list(action())
        processes.say(DONE)
        self._joined = True
        return outputs

    def _joining(self, action: Action) -> Action:
        def joined() -> list[str]:
            processes.say(BEGIN)
            self._joined = True
            outputs = list(action())
            self._joined = False
            return outputs

        return joined

    def failed(self, error: BaseException) -> None:
        """Let the processes that wait end with the same status; those that are at work meet the error themselves."""
        if not self._joined:
            processes.say({"exit": error.exit_code if isinstance(error, PhoenixError) else 1})

    def _stage(self, name: str, action: Action) -> bool:
        record = self.manifest["stages"].get(name)
        if not self._redo and record and self._intact(record):
            self._announce(name, "kept")
            return False
        if self._redo:  # what a kill left of this stage began from other files than it will now
            shutil.rmtree(self.work(name), ignore_errors=True)
        self._redo = True
        self._announce(name, "started")
        begun = {"begun": datetime.now(UTC).isoformat(timespec="milliseconds")}
        self.manifest["stages"][name] = {"status": "running"} | begun
        self._save()
        started = time.perf_counter()
        try:
            outputs, facts = self._share(self, name, action)
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self.manifest["stages"][name] = {"status": status, "seconds": time.perf_counter() - started} | begun
            with contextlib.suppress(PhoenixError):  # a full disk must not hide the error that comes up here
                self._save()
            raise
        seconds = time.perf_counter() - started
        hashes = {output: sha256(self.path(output)) for output in outputs}
        self.manifest["stages"][name] = {"status": "done", "seconds": seconds, "outputs": hashes} | facts | begun
        self._save()
        shutil.rmtree(self.work(name), ignore_errors=True)
        self._announce(name, f"{seconds:.1f} s")
        return True

    def describe(self, **inputs: dict[str, Any]) -> None:
        """Note facts about the inputs in the manifest; a run that is taken up again must have the same.

        Raises:
            PhoenixError: an input isn't the one that the run began with.
        """
        for name, facts in inputs.items():
            before = self.manifest["inputs"].setdefault(name, facts)
            if before != facts:
                raise PhoenixError(
                    f"{self.directory}: the {name} has changed since this run began "
                    f"({', '.join(key for key in facts if before.get(key) != facts[key])}); give another with --out"
                )
        self._save()

    def _intact(self, record: dict[str, Any]) -> bool:
        if record.get("status") != "done" or not isinstance(record.get("outputs"), dict):
            return False
        paths = {inside(self.directory, name): digest for name, digest in record["outputs"].items()}
        return all(path.exists() and sha256(path) == digest for path, digest in paths.items())

    def _save(self) -> None:
        write_json(self.path(MANIFEST), self.manifest)


class Follower(Run):
    """The run in a process that isn't the main one: it does what all do, waits for the rest, and writes nothing."""

    def stage(self, name: str, action: Action, *, together: bool = False) -> bool:  # noqa: ARG002
        heard = self._hear()
        if heard == BEGIN:
            list(action())
            self._hear()
        return bool(heard == BEGIN)

    def alone(self, action: Action) -> list[str]:  # noqa: ARG002
        self._hear()
        return []

    def describe(self, **inputs: dict[str, Any]) -> None:
        """Left to the main process."""

    def _hear(self) -> Any:
        told = processes.say()
        if isinstance(told, dict):
            raise SystemExit(told["exit"])
        return told


@contextlib.contextmanager
def open_run(
    recipe: Recipe,
    directory: Path,
    *,
    resume: bool,
    overwrite: bool = False,
    announce: Announce | None = None,
    share: Share | None = None,
) -> Iterator[Run]:
    """Make a run directory, or take an existing one up again, and hold it against other processes.

    Of several processes of one launch, the main one holds it; the others follow.

    Raises:
        PhoenixError: the directory is in use, holds something else, or holds a run of another recipe.
    """
    if not processes.is_main():
        yield Follower(directory, {})
        return
    leading: Run | None = None
    try:
        with _hold_run(recipe, directory, resume, overwrite, announce, share) as leading:
            yield leading
    except BaseException as error:
        if leading is None:
            leading = Run(directory, {})
        if isinstance(error, Exception):
            leading.failed(error)
        raise


@contextlib.contextmanager
def _hold_run(
    recipe: Recipe,
    directory: Path,
    resume: bool,
    overwrite: bool,
    announce: Announce | None,
    share: Share | None,
) -> Iterator[Run]:
    if directory.exists() and not directory.is_dir():
        raise PhoenixError(f"{directory} is not a directory; give another with --out")
    if not (directory / MANIFEST).is_file() and _holds_something(directory):
        if overwrite:
            raise PhoenixError(f"{directory} holds no {MANIFEST}; only a run directory is overwritten")
        raise PhoenixError(f"{directory} exists and is no run directory; give another with --out")
    with _held(directory):
        if overwrite:
            _remove([child for child in directory.iterdir() if child.name != LOCK])
        elif (directory / MANIFEST).is_file() and not resume:
            raise PhoenixError(
                f"{directory} holds a run already; go on with it by --resume, or give another with --out"
            )
        _remove(list(directory.rglob(".*.tmp")))  # what a kill left half written
        run = Run(directory, _take_up(directory, recipe), announce, share)
        yield run
        shutil.rmtree(directory / WORK, ignore_errors=True)


def _holds_something(directory: Path) -> bool:
    """Whether there are files that aren't what a kill leaves of a run's first moments."""
    children = directory.iterdir() if directory.is_dir() else ()
    return any(child.name != LOCK and not (child.name[0] == "." and child.suffix == ".tmp") for child in children)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _take_up(directory: Path, recipe: Recipe) -> dict[str, Any]:
    """The manifest of the run that lies here, or that of a new one."""
    if (directory / MANIFEST).is_file():
        manifest = _read_manifest(directory)
        if manifest["stages"] or (directory / RECIPE).is_file():
            _require_same(directory, recipe)
            return manifest
    # The manifest comes first: where there is one, the directory is a run's.
    manifest = _new_manifest(recipe)
    write_json(directory / MANIFEST, manifest)
    write_text(directory / RECIPE, dump_recipe(recipe))
    return manifest


def _read_manifest(directory: Path) -> dict[str, Any]:
    manifest = read_json(directory / MANIFEST)
    known = manifest if isinstance(manifest, dict) else {}
    stages = known.get("stages")
    records = stages.values() if isinstance(stages, dict) else [None]
    if not isinstance(known.get("inputs"), dict) or not all(isinstance(record, dict) for record in records):
        raise PhoenixError(f"{directory / MANIFEST} is no run's manifest; begin anew with --overwrite")
    return known


def _require_same(directory: Path, recipe: Recipe) -> None:
    path = directory / RECIPE
    try:
        before = _flat(parse_yaml(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PhoenixError(
            f"{path} can't be read, so nobody knows what this run is; begin anew with --overwrite"
        ) from error
    now = _flat(parse_yaml(dump_recipe(recipe)))
    for field in now | before:
        there, here = before.get(field), now.get(field)
        if there != here:
            raise PhoenixError(
                f"{directory} is a run of another recipe: {field} is {there} there and {here} here; "
                "give another with --out"
            )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by their dotted names."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        key: value
        for name, inner in values.items()
        for key, value in _flat(inner, f"{prefix}.{name}".lstrip(".")).items()
    }


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Make the directory if need be, and lock it; the lock ends with the process, whatever ends it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / LOCK).open("w")
    except OSError as error:
        raise PhoenixError(f"{directory}: {error.strerror}; give another directory with --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PhoenixError(
                f"{directory} is in use by another process; wait for it or give another with --out"
            ) from error
        yield


def _new_manifest(recipe: Recipe) -> dict[str, Any]:
    return {
        "phoenix": phoenix_sparse.__version__,
        "name": recipe.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
        "host": host(),
        "seed": recipe.seed,
        "inputs": {},
        "stages": {},
    }


def host() -> dict[str, Any]:
    """The machine in figures, without its name."""
    import torch

    return {
        "platform": platform.platform(terse=True),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of Phoenix itself, where it runs from a checkout of its own."""
    here = Path(__file__).resolve().parent
    command = ["git", "rev-parse", "--show-toplevel", "HEAD"]
    try:
        answer = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    top, _, commit = answer.stdout.strip().partition("\n")
    return commit if answer.returncode == 0 and Path(top) / "src" / "phoenix_sparse" == here else None
