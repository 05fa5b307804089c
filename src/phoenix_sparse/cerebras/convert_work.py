"""Worker: a pruned Hugging Face checkpoint in ModelZoo's format, checked weight by weight."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from phoenix_sparse.cerebras import modelzoo
from phoenix_sparse.cerebras.names import ROTATED, cerebras_name, interleave
from phoenix_sparse.cerebras.shapes import model_block
from phoenix_sparse.cerebras.worker import serve
from phoenix_sparse.errors import PhoenixError


def work(
    source: str, files: dict[str, str], config: dict[str, Any], linears: list[str], heads: list[int], out: str
) -> dict[str, Any]:
    """Convert, and compare every pruned linear with its source bit for bit.

    Args:
        source: the model's directory.
        files: the safetensors file of each tensor, by the tensor's name.
        config: for the converter.
        linears: names of the pruned linears.
        heads: of queries, and of keys and values.
        out: the .mdl file to write; it appears when all is right, and not before.

    Returns:
        `model`: the model section of the training YAML.
    """
    import cerebras.pytorch as cstorch
    import yaml

    cstorch.backend("CPU")
    with tempfile.TemporaryDirectory(dir=Path(out).parent, prefix=".convert-") as name:
        place = Path(name)
        (place / "out").mkdir()
        index = _stage(Path(source), files, config, place)
        written = modelzoo.convert(index, place / "config.json", config["model_type"], place / "out")
        emitted = next((place / "out").glob("*.yaml"))
        block = model_block(yaml.safe_load(emitted.read_text(encoding="utf-8")))
        tensors = modelzoo.load(written)
        modelzoo.require_whole(tensors, block)
        _require_equal(tensors, Path(source), files, linears, heads)
        os.replace(written, out)  # noqa: PTH105 (one rename, on one disk)
    return {"model": block}


def _stage(source: Path, files: dict[str, str], config: dict[str, Any], place: Path) -> Path:
    """An index and links to the weights beside it: the converter takes no lone model.safetensors."""
    for file in set(files.values()):
        (place / file).symlink_to((source / file).resolve())
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    index = place / "model.safetensors.index.json"
    total = sum((source / file).stat().st_size for file in set(files.values()))
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": files}), encoding="utf-8")
    return index


def _require_equal(
    tensors: dict[str, Any], source: Path, files: dict[str, str], linears: list[str], heads: list[int]
) -> None:
    """A conversion that lost, filled or left out a weight must not pass for the pruned model."""
    import torch
    from safetensors import safe_open

    for linear in linears:
        name = f"{linear}.weight"
        if name not in files:
            raise PhoenixError(f"convert: {source} has no {name}; are these its masks?")
        with safe_open(str(source / files[name]), framework="pt") as reader:
            wanted = reader.get_tensor(name)
        if linear.endswith(ROTATED):
            wanted = interleave(wanted, heads[0] if linear.endswith("q_proj") else heads[1])
        found = modelzoo.real(tensors[cerebras_name(linear)])
        if found.shape != wanted.shape or not torch.equal(found.float(), wanted.float()):
            raise PhoenixError(f"convert: {name} came out of the converter with other values; nothing was kept")


if __name__ == "__main__":
    serve(work)
