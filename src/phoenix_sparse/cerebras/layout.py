"""What an export's directory holds, and the record that vouches for it."""

from pathlib import Path
from typing import Any

import numpy as np

from phoenix_sparse.cerebras.names import cerebras_masks
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_json
from phoenix_sparse.masks import Masks

RECORD, PARAMS, CHECKPOINT, RUNNER = "phoenix.json", "params.yaml", "checkpoint.mdl", "run.py"
CALLBACK, MODEL_DIR = "phoenix_masked_lora.py", "model_dir"
KEYS = {"mode", "shape", "masks_sha256", "weights", "length", "pad", "scale", "lora", "model", "source_sha256"}


def read_record(directory: Path) -> dict[str, Any]:
    """What `phx cerebras export` noted.

    Raises:
        PhoenixError: the directory is no export.
    """
    path = directory / RECORD
    if not path.is_file():
        raise PhoenixError(f"cerebras: {directory} has no {RECORD}; give a directory that phx cerebras export wrote")
    record = read_json(path)
    if not isinstance(record, dict) or set(record) < KEYS or not isinstance(record["weights"], dict):
        raise PhoenixError(f"cerebras: {path} is no record of an export; give a directory as it was written")
    return record


def write_masks(masks: Masks, heads: int, key_heads: int, path: Path) -> None:
    """Write masks for a worker: 8 weights a byte, by ModelZoo's names and in its layout (.npz)."""
    laid_out = cerebras_masks(masks, heads, key_heads)
    np.savez(path, **{name: np.packbits(mask.numpy()) for name, mask in laid_out.items()})  # type: ignore[arg-type]


def latest_checkpoint(directory: Path) -> Path:
    """The trained checkpoint of the highest step, in the export's model_dir or in the directory itself.

    Raises:
        PhoenixError: there is none.
    """
    found = [path for place in (directory / MODEL_DIR, directory) for path in place.glob("checkpoint_*.mdl")]
    steps = {path: path.stem.removeprefix("checkpoint_").split("_")[0] for path in found}
    numbered = [path for path, step in steps.items() if step.isdigit() and int(step) > 0]
    if not numbered:
        raise PhoenixError(
            f"cerebras: {directory} has no trained checkpoint (model_dir/checkpoint_N.mdl); train it, or give "
            "--checkpoint"
        )
    return max(numbered, key=lambda path: (int(steps[path]), path.stat().st_mtime))
