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

import phoenix_sparse
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import inside, read_json, sha256, write_json, write_text
from phoenix_sparse.progress import Announce
from phoenix_sparse.recipe import Recipe, dump_recipe

MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"
WORK = ".work"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "lm-eval", "safetensors", "optuna")


class Run:
    """A run directory that this process holds."""

    def __init__(self, directory: Path, manifest: dict[str, Any], announce: Announce | None = None) -> None:
        self.directory, self.manifest = directory, manifest
        self._announce = announce or (lambda _stage, _state: None)
        self._redo = False

    def path(self, name: str) -> Path:
        return self.directory / name

    def work(self, stage: str) -> Path:
        """A place for a stage's checkpoints and journals, removed when the stage is done."""
        return self.directory / WORK / stage

    def stage(self, name: str, action: Callable[[], Iterable[str]]) -> bool:
        """Do a stage, unless it was done before and its files are as it left them; then all later ones are, too.

        Args:
            name: of the stage.
            action: does the work and gives the names of the files and directories it wrote.

        Returns:
            Whether the stage was done now.
        """
        record = self.manifest["stages"].get(name)
        if not self._redo and record and self._intact(record):
            self._announce(name, "kept")
            return False
        self._redo = True
        self._announce(name, "started")
        self.manifest["stages"][name] = {"status": "running"}
        self._save()
        started = time.perf_counter()
        try:
            outputs = list(action())
        except BaseException:
            self.manifest["stages"][name] = {"status": "failed", "seconds": time.perf_counter() - started}
            with contextlib.suppress(PhoenixError):  # a full disk must not hide the error that comes up here
                self._save()
            raise
        seconds = time.perf_counter() - started
        hashes = {output: sha256(self.path(output)) for output in outputs}
        self.manifest["stages"][name] = {"status": "done", "seconds": seconds, "outputs": hashes}
        self._save()
        shutil.rmtree(self.work(name), ignore_errors=True)
        self._announce(name, f"{seconds:.1f} s")
        return True

    def describe(self, **inputs: Any) -> None:
        """Note facts about the inputs in the manifest."""
        self.manifest["inputs"] |= inputs
        self._save()

    def _intact(self, record: dict[str, Any]) -> bool:
        if record.get("status") != "done":
            return False
        paths = {inside(self.directory, name): digest for name, digest in record["outputs"].items()}
        return all(path.exists() and sha256(path) == digest for path, digest in paths.items())

    def _save(self) -> None:
        write_json(self.path(MANIFEST), self.manifest)


@contextlib.contextmanager
def open_run(
    recipe: Recipe, directory: Path, *, resume: bool, overwrite: bool = False, announce: Announce | None = None
) -> Iterator[Run]:
    """Make a run directory, or take an existing one up again, and hold it against other processes.

    Raises:
        PhoenixError: the directory is in use, holds something else, or holds a run of another recipe.
    """
    if overwrite and directory.exists():
        if not (directory / MANIFEST).is_file():
            raise PhoenixError(f"{directory} holds no {MANIFEST}; only a run directory is overwritten")
        with _held(directory):
            shutil.rmtree(directory)
    fresh = not (directory / MANIFEST).is_file()
    if fresh and directory.exists() and any(child.name != ".lock" for child in directory.iterdir()):
        raise PhoenixError(f"{directory} exists and is no run directory; give another with --out")
    if not fresh and not resume:
        raise PhoenixError(f"{directory} holds a run already; go on with it by --resume, or give another with --out")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PhoenixError(f"{directory}: {error.strerror}; give another directory with --out") from error
    with _held(directory):
        text = dump_recipe(recipe)
        if fresh:
            write_text(directory / RECIPE, text)
            manifest = _new_manifest(recipe)
            write_json(directory / MANIFEST, manifest)
        else:
            _require_same(directory, text)
            manifest = read_json(directory / MANIFEST)
        run = Run(directory, manifest, announce)
        yield run
        shutil.rmtree(directory / WORK, ignore_errors=True)


def _require_same(directory: Path, text: str) -> None:
    old = (directory / RECIPE).read_text(encoding="utf-8") if (directory / RECIPE).is_file() else ""
    if old != text:
        changed = next((line for line in text.splitlines() if line not in old.splitlines()), "a field less")
        raise PhoenixError(f"{directory} is a run of another recipe (here: {changed.strip()}); give another with --out")


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[None]:
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PhoenixError(
                f"{directory} is in use by another process; wait for it or give another --out"
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
