"""Making the environment that has cerebras_pytorch, and ModelZoo where a checkout of it is given."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from phoenix_sparse.cerebras.environment import find_environment, probe
from phoenix_sparse.errors import PhoenixError, first_line

PACKAGE = "cerebras_pytorch==2.10.0"
PYTHON = "python3.11"  # it has wheels for no other
# ModelZoo's setup.py names these three by archives on GitHub; lm-eval is the same release on PyPI.
ARCHIVES = {"lm-eval": "lm-eval==0.4.9.1", "lm-dataformat": None, "bigcode_eval": None}
# Imported by its command line, and named nowhere.
UNNAMED = ["rich"]
REQUIREMENT = re.compile(r"^\s*f?[\"']([A-Za-z][A-Za-z0-9_.-]*)\s*(@|[<>=!~]=?[^\"']*)?[^\"']*[\"'],\s*$")


def set_up(
    directory: Path, *, modelzoo: Path | None, bigcode: Path | None, python: str | None, say: Callable[[str], None]
) -> Path:
    """Make a virtual environment (5.7 GB), or add ModelZoo to one.

    Args:
        directory: of the environment.
        modelzoo: a checkout of github.com/Cerebras/modelzoo at Release_2.10.0, which is installed in place.
        bigcode: a checkout of github.com/bigcode-project/bigcode-evaluation-harness, which ModelZoo imports; pip
            fetches the archive that ModelZoo names unless given.
        python: of version 3.11.
        say: told what is done.

    Returns:
        The environment's Python.

    Raises:
        PhoenixError: there is no Python 3.11, or pip failed; the message has pip's reason.
    """
    ours = directory / "bin" / "python"
    if modelzoo is not None and not (modelzoo / "src/cerebras/modelzoo/__init__.py").is_file():
        raise PhoenixError(f"setup: {modelzoo} is no checkout of github.com/Cerebras/modelzoo (src/cerebras/modelzoo)")
    if not ours.is_file():
        found = shutil.which(python or PYTHON)
        if found is None:
            raise PhoenixError(f"setup: there is no {python or PYTHON}; install Python 3.11, or name it with --python")
        _require_3_11(found)
        say(f"making {directory}")
        _run([found, "-m", "venv", str(directory)], "venv")
    if probe(ours)["cerebras_pytorch"] is None:  # also where an earlier installation failed half way
        say(f"installing {PACKAGE} (5.7 GB, some minutes)")
        _pip(ours, [PACKAGE])
    if modelzoo is not None:
        say(f"installing ModelZoo from {modelzoo}")
        named = _requirements(modelzoo / "setup.py")
        pinned = [one for name, one in named.items() if name not in ARCHIVES]
        _pip(ours, [PACKAGE, *pinned, *[one for one in ARCHIVES.values() if one], *UNNAMED])
        archive = re.search(r"bigcode_eval @ ([^\"'\s]+)", (modelzoo / "setup.py").read_text(encoding="utf-8"))
        harness = ["--editable", str(bigcode)] if bigcode else [f"bigcode_eval @ {archive[1]}"] if archive else []
        _pip(ours, ["--no-deps", *harness, "--editable", str(modelzoo)])
    find_environment(ours)
    return ours


def _requirements(setup: Path) -> dict[str, str]:
    """What ModelZoo pins in its setup.py, by package; archives as their names alone."""
    text = setup.read_text(encoding="utf-8")
    start = text.find("install_requires=[")
    end = text.find("],\n", start)
    if start < 0 or end < 0:
        raise PhoenixError(f"setup: {setup} has no install_requires; give ModelZoo's Release_2.10.0")
    found = [REQUIREMENT.match(line) for line in text[start:end].splitlines()]
    pins = {one[1]: one[1] + ("" if (one[2] or "@") == "@" else one[2]) for one in found if one}
    return {name: pin for name, pin in pins.items() if name != "cerebras_pytorch"}


def _require_3_11(python: str) -> None:
    told = subprocess.run([python, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True)
    if told.stdout.split() != ["3", "11"]:
        raise PhoenixError(f"setup: {python} is not Python 3.11, and {PACKAGE} has wheels for no other")


def _pip(python: Path, packages: list[str]) -> None:
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages], "pip")


def _run(command: list[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise PhoenixError(f"setup: {what} can't be started ({first_line(error)})") from error
    if done.returncode != 0:
        wrong = [line for line in done.stderr.splitlines() if line.startswith(("ERROR", "error", "Error"))]
        last = (wrong or done.stderr.splitlines() or ["no message"])[-1]
        raise PhoenixError(f"setup: {what} failed ({last[:200]})")
