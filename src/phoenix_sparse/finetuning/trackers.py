"""Where the training log goes besides tune.json: TensorBoard, Weights & Biases and others, through the Trainer."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phoenix_sparse.errors import PhoenixError

# Trackers that write files, and the variable that says where. Others go where they were set up to.
PLACES = {"tensorboard": "TENSORBOARD_LOGGING_DIR", "wandb": "WANDB_DIR"}


def choose_trackers(named: tuple[str, ...] | None) -> list[str]:
    """The trackers to use: those named; where none is said, TensorBoard if it is installed.

    Raises:
        PhoenixError: one of them is unknown or not installed.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    installed = get_available_reporting_integrations()
    if named is None:
        return [name for name in ("tensorboard",) if name in installed]
    for name in named:
        if name not in INTEGRATION_TO_CALLBACK:
            raise PhoenixError(
                f"finetune.trackers: {name!r} is unknown; there are {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            )
        if name not in installed:
            raise PhoenixError(
                f"finetune.trackers: {name} is not installed; `pip install {name.replace('_', '-')}`, or leave it out"
            )
    return list(named)


@contextmanager
def writing_to(logs: Path | None, trackers: list[str]) -> Iterator[None]:
    """Let trackers that write files write them below `logs` for the block, unless the environment has said where."""
    changed = []
    for variable in (PLACES[name] for name in trackers if name in PLACES):
        if logs is not None and variable not in os.environ:
            logs.mkdir(parents=True, exist_ok=True)
            os.environ[variable] = str(logs.resolve())
            changed.append(variable)
    try:
        yield
    finally:
        for variable in changed:
            del os.environ[variable]
