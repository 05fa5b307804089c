"""The sparsity of a Cerebras checkpoint against the masks of its run."""

from pathlib import Path
from typing import Any

from phoenix_sparse.cerebras.environment import Environment
from phoenix_sparse.cerebras.export import inspect
from phoenix_sparse.cerebras.layout import RECORD, read_record
from phoenix_sparse.cerebras.shapes import Shape, shape_of
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_json
from phoenix_sparse.masks import Masks, masks_sha256

ABOVE = 3  # directories above a checkpoint in which its export's record may lie


def validate(checkpoint: Path, masks: Masks, config: Path | None, environment: Environment) -> dict[str, Any]:
    """Say whether every weight off its mask is zero, q and k in ModelZoo's rotary layout.

    Args:
        checkpoint: an .mdl file, before, during or after training.
        masks: of the run, by Hugging Face names.
        config: the Hugging Face config.json, for the numbers of heads; the export's record above the checkpoint
            unless given.
        environment: cerebras_pytorch is enough.

    Returns:
        `valid`, `off_mask_nonzeros`, `sparsity`, `zeros` and `total` of all weights, and `weights` by ModelZoo's name;
        `adapters`: LoRA pairs in the checkpoint, which are not merged here.

    Raises:
        PhoenixError: there is no such checkpoint, or the masks are another model's.
    """
    if not checkpoint.is_file():
        raise PhoenixError(f"cerebras: there is no file {checkpoint}; give a checkpoint_N.mdl")
    shape = _shape(checkpoint, config)
    found = inspect(checkpoint, masks, shape.heads, shape.key_heads, environment)
    weights = found["weights"]
    zeros = sum(weight["zeros"] for weight in weights.values())
    total = sum(mask.numel() for mask in masks.values())
    wrong = sum(weight["off_mask_nonzeros"] for weight in weights.values())
    return {
        "checkpoint": checkpoint.name,
        "masks_sha256": masks_sha256(masks),
        "valid": wrong == 0,
        "off_mask_nonzeros": wrong,
        "zeros": zeros,
        "total": total,
        "sparsity": zeros / total,
        "adapters": found["adapters"],
        "weights": weights,
    }


def _shape(checkpoint: Path, config: Path | None) -> Shape:
    if config is not None:
        file = config / "config.json" if config.is_dir() else config
        return shape_of(read_json(file), str(file))
    for directory in list(checkpoint.absolute().parents)[:ABOVE]:
        if (directory / RECORD).is_file():
            return Shape(**read_record(directory)["shape"])
    raise PhoenixError(
        f"cerebras: no {RECORD} lies near {checkpoint}, and the rotary layout needs the numbers of heads; give the "
        "model's config.json with --config"
    )
