"""What the commands on files share: opening a task, checking the common options, a place for checkpoints."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from phoenix_sparse.errors import PhoenixError

# For `pipeline.model_directory`, which every command with a MODEL finds it by.
Model = Annotated[str, typer.Argument(help="a Hugging Face model directory, a hub name, or demo", show_default=False)]

USAGE: Any = typer.BadParameter.__base__  # what typer raises where options and arguments are not what they should be

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


class SeveralValues(TyperCommand):
    """A command two of whose options take several values after one name: `--sparsity 0.5 0.7 --compare wanda ria`.

    `--sparsity` takes the numbers that follow, `--compare` the words that are neither an option nor KEY=VALUE.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_repeated(args, {"--sparsity": True, "--compare": False})))


def _repeated(args: Iterable[str], numeric: dict[str, bool]) -> Iterator[str]:
    """The arguments with an option's name before each of its values."""
    option, values, rest = "", 0, False  # the option that is being read, and how many values it has
    for word in args:
        name, equals, _ = word.partition("=")
        if rest or word == "--":  # nothing behind a bare -- is an option
            rest = True
        elif name in numeric:
            option, values = name, 1 if equals else 0
        elif option and values == 0:
            values = 1
        elif option and (NUMBER.fullmatch(word) if numeric[option] else not (word.startswith("-") or equals)):
            yield option
        else:
            option = ""
        yield word


def named_task(name: str, data: Path | None, seed: int, **more: Any) -> Any:
    """Load the task that --task and --data say."""
    from phoenix_sparse.pipeline import open_task
    from phoenix_sparse.recipe import check
    from phoenix_sparse.tasks import TaskSettings

    return open_task(check(TaskSettings, {"name": name, "data": data} | more, "task"), seed=seed)


def checked_recipe(path: Path, overrides: Iterable[str] | None) -> Any:
    """Read the recipe of one run, in which no setting may be for what only another run would do."""
    from phoenix_sparse.recipe import load_recipe, without_idle

    changes = list(overrides or ())
    return without_idle(load_recipe(path, changes), [text.partition("=")[0] for text in changes])


def refuse_idle(command: str, of: str, given: Any, options: Mapping[str, Any]) -> None:
    """Refuse options that are for another one where that isn't given."""
    idle = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if given is None and idle:
        raise PhoenixError(f"{command}: {idle[0]} is for {of}, which isn't given; give it too, or leave {idle[0]} out")


def require_task(name: str | None, data: Path | None) -> None:
    """Refuse data without the task that it is of."""
    if name is None and data is not None:
        raise PhoenixError(f"--data: {data} is the data of a task, and none is given; give --task, or leave --data out")


def require_mode(settings: Any, masks: Path | None) -> None:
    """Refuse masks that a way of fine-tuning has no use for, one without the masks that it needs, and what is said
    about a merge, which is a command of its own."""
    if settings.mode == "sparse_to_sparse" and masks is None:
        raise PhoenixError("tune: mode=sparse_to_sparse trains through masks; give --masks, or mode=sparse_to_dense")
    if settings.mode == "sparse_to_dense" and masks is not None:
        raise PhoenixError("tune: mode=sparse_to_dense trains without masks; leave --masks out")
    if settings.dense_merge != "dense":
        raise PhoenixError("tune: dense_merge: nothing is merged here; leave it out, and give phx merge --remask")


@contextmanager
def set_up(dtype: str, device: str, seed: int, out: Path | None) -> Iterator[Any]:
    """Check the options that commands share, and show progress for the block."""
    from phoenix_sparse import steps
    from phoenix_sparse.console import showing
    from phoenix_sparse.determinism import be_deterministic
    from phoenix_sparse.recipe import check

    options = check(steps.Common, {"dtype": dtype, "device": device, "seed": seed}, "options")
    if out is not None:
        require_writable(out)
    be_deterministic()
    with showing() as show:
        yield steps.Machine(options.dtype, options.device, options.seed, show.progress)


def require_writable(out: Path) -> None:
    """Refuse a place that can't be written to before the work is done, not after it. Makes nothing."""
    here = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not here.is_dir():
        raise PhoenixError(f"--out: {here} is not a directory")
    if not os.access(here, os.W_OK | os.X_OK):
        raise PhoenixError(f"--out: {here} can't be written to; give another directory")


def require_writable_file(out: Path) -> None:
    """As `require_writable`, for a file: one that is there is written over, a directory is not."""
    if out.is_dir():
        raise PhoenixError(f"--out: {out} is a directory; give a file's name, such as {out / 'figures.json'}")
    require_writable(out.parent)


def refuse_empty(words: Sequence[str]) -> None:
    """Refuse arguments of nothing: as a path that would be the directory that one is in."""
    for number, word in enumerate(words):
        if not word or (word.startswith("--") and word.endswith("=")):
            which = word or f"the argument after {words[number - 1]}" if number or word else "the first argument"
            raise PhoenixError(
                f"{which} is empty (a variable of the shell that isn't set?); give it a value, or leave it out"
            )


def usage(error: Any) -> str:
    """What is wrong with the options and arguments of a command, in one line, and where to read what is right."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    command = " ".join(context.command_path.split()[1:]) if context is not None else ""
    said = " ".join(error.format_message().split()).rstrip(".")
    # In the words of messages about settings, which this is one of as well.
    said = re.sub(r"^Invalid value for '(.+?)': (Input |Value error, )?", r"\1 ", said)
    said = said if said.startswith("-") else said[:1].lower() + said[1:]
    takes = getattr(parameter, "help", None)
    see = " ".join(filter(None, ("phx", command, "--help")))
    return f"{command}{': ' if command else ''}{said}{f' ({takes})' if takes else ''}; see `{see}`"


def refuse_existing(path: Path) -> None:
    """Refuse to write over what an earlier step made: an adapter or a model may hang on it."""
    if path.exists():
        raise PhoenixError(f"--out: {path} exists already; give another directory, or remove it")
    require_writable(path.parent)


def refuse_run(out: Path) -> None:
    """Refuse to write measurements over those of a run, which its manifest vouches for."""
    if (out / "manifest.json").is_file():
        raise PhoenixError(f"--out: {out} is a run, with figures of its own; give another directory")


@contextmanager
def workplace(out: Path, files: list[Path | None], settings: list[Any]) -> Iterator[Path]:
    """A place for checkpoints, which stays if the block is killed.

    It is named after the step's inputs, so that a step goes on from its own checkpoints only, never from those of
    other settings or files.
    """
    from phoenix_sparse.files import sha256

    key = repr([sha256(file) if file else None for file in files] + settings)
    yield out / ".work" / hashlib.sha256(key.encode()).hexdigest()[:16]
    shutil.rmtree(out / ".work", ignore_errors=True)


def say_trained(out: Path, adapter: Path) -> None:
    """Say where a training left its adapter, and how many examples it left out, if any."""
    from phoenix_sparse.files import read_json

    if short := read_json(out / "tune.json")["examples_left_out"]:
        say(f"training examples left out, too long for max_length: {short}")
    say(f"adapter: {adapter}")


def say(*lines: str) -> None:
    """Print lines as they are."""
    from phoenix_sparse.console import OUT

    for line in lines:
        OUT.print(line, markup=False)
