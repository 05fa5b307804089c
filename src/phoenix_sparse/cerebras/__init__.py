"""Cerebras systems: from a run to a job for a CS-3 and back.

Two environments meet here. Phoenix's own has transformers 5; the one with `cerebras_pytorch` and ModelZoo has torch 2.4
and Python 3.11 (`phx cerebras setup` makes it). What needs the latter is a worker: a module that Phoenix starts there,
and which imports nothing of Phoenix but the ground floor.
"""

from pathlib import Path

HERE = Path(__file__).parent


def masked_lora_source() -> Path:
    """The file of the callbacks, which an export carries a copy of."""
    return HERE / "masked_lora.py"


def runner_source() -> Path:
    """The file of the runner, which an export carries a copy of."""
    return HERE / "runner.py"
