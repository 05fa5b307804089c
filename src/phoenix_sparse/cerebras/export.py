"""A pruned model and its task as a directory that a CS-3 user submits as it is."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from phoenix_sparse.cerebras import masked_lora_source, runner_source
from phoenix_sparse.cerebras.environment import Environment
from phoenix_sparse.cerebras.layout import CALLBACK, CHECKPOINT, PARAMS, RECORD, RUNNER, write_masks
from phoenix_sparse.cerebras.readme import readme
from phoenix_sparse.cerebras.shapes import conversion_config, shape_of
from phoenix_sparse.cerebras.tokens import fitting_length, token_array
from phoenix_sparse.cerebras.training import TrainingSettings, sparsity_groups, training_params
from phoenix_sparse.errors import CheckFailed, PhoenixError
from phoenix_sparse.files import atomic_path, read_json, sha256, write_json, write_text
from phoenix_sparse.masks import Masks, masks_sha256

Rows = Sequence[dict[str, list[int]]]


@dataclass(frozen=True)
class Examples:
    """Tokenised examples to train on and to evaluate with (`input_ids`, and `labels` with -100 on the prompt)."""

    train: Rows
    validation: Rows
    pad: int
    longest: int  # positions at most


def export(
    source: Path,
    files: dict[str, str],
    masks: Masks,
    examples: Examples,
    settings: TrainingSettings,
    out: Path,
    environment: Environment,
) -> dict[str, Any]:
    """Write an export: checkpoint, YAML, data, runner and README, whole or not at all.

    Args:
        source: the pruned model's Hugging Face directory.
        files: its safetensors files by tensor name.
        masks: of every prunable linear, by Hugging Face names.
        examples: of the task.
        settings: of the job.
        out: the directory to write.
        environment: with ModelZoo, whose converter does the work.

    Returns:
        The record, as it is written to phoenix.json.

    Raises:
        PhoenixError: a model that can't be converted, no ModelZoo, or a conversion that failed; there is no export.
        CheckFailed: a weight of the model is not zero off its mask.
    """
    environment.require_modelzoo("the conversion of a checkpoint")
    config = read_json(source / "config.json")
    shape = shape_of(config, str(source))
    length = fitting_length([*examples.train, *examples.validation], min(examples.longest, shape.positions))
    with atomic_path(out) as place:
        place.mkdir()
        made = environment.work(
            "convert_work",
            source=source,
            files=files,
            config=conversion_config(config, str(source)),
            linears=sorted(masks),
            heads=[shape.heads, shape.key_heads],
            out=place / CHECKPOINT,
        )
        weights = inspect(place / CHECKPOINT, masks, shape.heads, shape.key_heads, environment)["weights"]
        if wrong := [name for name, weight in weights.items() if weight["off_mask_nonzeros"]]:
            raise CheckFailed(
                f"cerebras: {source} has non-zeros off the masks ({wrong[0]} first); export the pruned model"
            )
        held_out = min(settings.batch_size, len(examples.validation))
        groups = sparsity_groups(weights)
        params = training_params(made["model"], groups, settings, evaluation_batch=held_out)
        counts = _write_data(place, examples, length, environment)
        write_text(place / PARAMS, yaml.safe_dump(params, sort_keys=False))
        shutil.copyfile(runner_source(), place / RUNNER)
        shutil.copyfile(masked_lora_source(), place / CALLBACK)
        adapter = params["trainer"]["init"]["callbacks"][-1].get("MaskedLora")
        lora = None
        if adapter:
            filters = [name for group in groups for name in group["param_filter"]]
            lora = {"filters": filters} | {key: adapter[key] for key in ("r", "alpha", "dropout")}
        record = {
            "mode": settings.mode,
            "shape": shape.model_dump(),
            "model": made["model"],
            "weights": {name: weight["sparsity"] for name, weight in weights.items()},
            "masks_sha256": masks_sha256(masks),
            "source_sha256": sha256(source),
            "length": length,
            "pad": examples.pad,
            "scale": settings.scale if lora else None,
            "lora": lora,
            "settings": settings.model_dump(mode="json"),
            "examples": counts,
            "cerebras_pytorch": environment.cerebras_pytorch,
            "modelzoo": environment.modelzoo,
        }
        write_json(place / RECORD, record)
        write_text(place / "README.md", readme(record))
    return record


def inspect(checkpoint: Path, masks: Masks, heads: int, key_heads: int, environment: Environment) -> dict[str, Any]:
    """Zeros of a Cerebras checkpoint's pruned weights, and non-zeros off their masks, by ModelZoo's names.

    Raises:
        PhoenixError: the file is no checkpoint, or has other weights than the masks.
    """
    with tempfile.TemporaryDirectory(prefix="phoenix-cerebras-") as work:
        packed = Path(work) / "masks.npz"
        write_masks(masks, heads, key_heads, packed)
        return environment.work("inspect_work", checkpoint=checkpoint, masks=packed)


def _write_data(place: Path, examples: Examples, length: int, environment: Environment) -> dict[str, int]:
    """Both splits as HDF5; gives how many examples each has."""
    arrays, counts = {}, {}
    with tempfile.TemporaryDirectory(prefix="phoenix-cerebras-") as work:
        for split, rows in (("train", examples.train), ("validation", examples.validation)):
            fitting = [row for row in rows if len(row["input_ids"]) <= length + 1]
            if not fitting:
                raise PhoenixError(f"cerebras: no example of {split} fits into {length + 1} tokens")
            counts[split] = len(fitting)
            array = Path(work) / f"{split}.npy"
            np.save(array, token_array(fitting, length, examples.pad))
            arrays[str((place / "data" / split / "examples.h5").absolute())] = str(array)
        environment.work("data_work", arrays=arrays)
    return counts
