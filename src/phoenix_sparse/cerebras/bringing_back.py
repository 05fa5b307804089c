"""A trained checkpoint back to Hugging Face: merged through the mask, with the original configuration."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phoenix_sparse.cerebras.environment import Environment
from phoenix_sparse.cerebras.layout import latest_checkpoint, read_record, write_masks
from phoenix_sparse.cerebras.shapes import shape_of
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import atomic_path, read_json, sha256
from phoenix_sparse.masks import Masks, masks_sha256


def bring_back(
    export: Path, checkpoint: Path | None, source: Path, masks: Masks, out: Path, environment: Environment
) -> Path:
    """Merge a trained checkpoint through the masks, convert it, and give it the files of the pruned model around it.

    Args:
        export: the directory that was exported.
        checkpoint: an .mdl file; the latest in the export's model_dir unless given.
        source: the pruned model that was exported.
        masks: of the run.
        out: the Hugging Face directory to write; weights in float32 under the original configuration.
        environment: with ModelZoo.

    Returns:
        The checkpoint that was taken.

    Raises:
        PhoenixError: another run's export, no checkpoint, weights off their masks, or a failed conversion.
    """
    environment.require_modelzoo("the conversion of a checkpoint")
    record = read_record(export)
    if record["masks_sha256"] != masks_sha256(masks):
        raise PhoenixError(f"cerebras: {export} was exported with other masks than this run's; give its own run")
    if record["source_sha256"] != sha256(source):
        raise PhoenixError(f"cerebras: {source} is not the model that {export} was made from; give its own run")
    config = read_json(source / "config.json")
    shape = shape_of(config, str(source))
    taken = checkpoint or latest_checkpoint(export)
    with tempfile.TemporaryDirectory(prefix="phoenix-cerebras-") as work, atomic_path(out) as place:
        packed = Path(work) / "masks.npz"
        write_masks(masks, shape.heads, shape.key_heads, packed)
        environment.work(
            "merge_work",
            checkpoint=taken,
            masks=packed,
            block=record["model"],
            scale=record["scale"],
            out=place,
        )
        # The converter's own config.json has lost what ModelZoo has no word for.
        for file in source.iterdir():
            if file.is_file() and not file.name.startswith("model") and file.suffix != ".safetensors":
                shutil.copyfile(file, place / file.name)
    return taken


def trained_logits(export: Path, checkpoint: Path, rows: list[list[int]], environment: Environment) -> list[Tensor]:
    """Logits of the trained checkpoint by ModelZoo's own model, adapter unmerged: (tokens, vocabulary), float32.

    Args:
        export: the directory that was exported.
        checkpoint: an .mdl file of its training.
        rows: token numbers.
    """
    record = read_record(export)
    with tempfile.TemporaryDirectory(prefix="phoenix-cerebras-") as work:
        found = Path(work) / "logits.npz"
        job: dict[str, Any] = {"block": record["model"], "lora": record["lora"], "rows": rows, "out": found}
        environment.work("logits_work", checkpoint=checkpoint, **job)
        with np.load(found, allow_pickle=False) as logits:
            return [torch.from_numpy(logits[str(number)]) for number in range(len(rows))]
