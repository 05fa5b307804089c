"""The environment that has cerebras_pytorch: finding it, and having work done there."""

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import phoenix_sparse
from phoenix_sparse.cerebras.worker import MARK
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_json

VARIABLE, DEFAULT = "PHOENIX_CEREBRAS_PYTHON", Path(".venv-cerebras/bin/python")
WANTED = "cerebras_pytorch 2.10 (Python 3.11, torch 2.4)"
PROBE = """
import importlib.metadata, json
found = {}
for name in ("cerebras_pytorch", "cerebras_modelzoo"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""
# Phoenix is not installed there and its own environment must not be on the path: torch would be the wrong one.
BOOTSTRAP = """
import importlib.util, runpy, sys
package, module = sys.argv.pop(1), sys.argv.pop(1)
spec = importlib.util.spec_from_file_location(
    "phoenix_sparse", package + "/__init__.py", submodule_search_locations=[package])
sys.modules["phoenix_sparse"] = loaded = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loaded)
runpy.run_module("phoenix_sparse.cerebras." + module, run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Environment:
    """A Python with cerebras_pytorch, and maybe with ModelZoo."""

    python: Path
    cerebras_pytorch: str
    modelzoo: str | None

    def require_modelzoo(self, purpose: str) -> None:
        """Refuse what can't be done without ModelZoo.

        Raises:
            PhoenixError: it isn't installed there.
        """
        if self.modelzoo is None:
            raise PhoenixError(
                f"cerebras: {purpose} needs ModelZoo, which {self.python} doesn't have; `phx cerebras setup --modelzoo "
                "DIR` installs a checkout of github.com/Cerebras/modelzoo, Release_2.10.0"
            )

    def work(self, module: str, **job: Any) -> dict[str, Any]:
        """Have a worker of this room do a job there.

        Args:
            module: a module of `phoenix_sparse.cerebras` that serves.
            job: plain values; paths become text.

        Raises:
            PhoenixError: what the worker refused, or the last line of what went wrong.
        """
        with tempfile.TemporaryDirectory(prefix="phoenix-cerebras-") as place:
            request, answer = Path(place) / "job.json", Path(place) / "answer.json"
            request.write_text(json.dumps(job, default=_plain), encoding="utf-8")
            package = Path(str(phoenix_sparse.__file__)).parent
            done = self.run(["-c", BOOTSTRAP, str(package), module, str(request), str(answer)], cwd=Path(place))
            if done.returncode != 0:
                raise PhoenixError(f"cerebras: {_told(done.stderr)}")
            result: dict[str, Any] = read_json(answer)
            return result

    def run(self, arguments: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run this Python, with the compiler's front end on the PATH."""
        tools = f"lib/python3.11/site-packages/cerebras/pytorch/lib{os.pathsep}{os.environ.get('PATH', '')}"
        variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        variables["PATH"] = str(self.python.parent.parent / tools)
        return subprocess.run(
            [str(self.python), *arguments], env=variables, cwd=cwd, capture_output=True, text=True, errors="replace"
        )


def find_environment(python: Path | None = None) -> Environment:
    """Find the environment: the one given, the one that PHOENIX_CEREBRAS_PYTHON names, or .venv-cerebras here.

    Raises:
        PhoenixError: there is none, or it lacks cerebras_pytorch, with what to do about it.
    """
    chosen = python or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else DEFAULT)
    if not chosen.is_file():
        raise PhoenixError(
            f"cerebras: there is no {chosen}; `phx cerebras setup` makes an environment with {WANTED}, or name one in "
            f"{VARIABLE} or with --python"
        )
    chosen = chosen.parent.resolve() / chosen.name  # the file itself is a link, which is what makes it an environment
    found = probe(chosen)
    if not found["cerebras_pytorch"]:
        raise PhoenixError(f"cerebras: {chosen} has no cerebras_pytorch; `phx cerebras setup` makes one with {WANTED}")
    return Environment(chosen, found["cerebras_pytorch"], found["cerebras_modelzoo"])


def probe(python: Path) -> dict[str, str | None]:
    """The versions of cerebras_pytorch and cerebras_modelzoo that a Python has, None for what it hasn't.

    Raises:
        PhoenixError: it doesn't run.
    """
    try:
        done = subprocess.run([str(python), "-c", PROBE], capture_output=True, text=True, timeout=120)
        found: dict[str, str | None] = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        raise PhoenixError(f"cerebras: {python} is no Python that runs; give one with {WANTED}") from error
    return found


def _plain(value: Any) -> str:
    if isinstance(value, Path):
        return str(value.absolute())
    raise TypeError(f"{type(value).__name__} is no plain value")


def _told(stderr: str) -> str:
    """What a worker said of its failure."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    marked = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
    return (marked or lines or ["the worker ended without a word"])[-1].removeprefix("cerebras: ")
