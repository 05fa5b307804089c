"""What workers share: Cerebras checkpoints, ModelZoo's converter, and its models outside the Trainer."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

from phoenix_sparse.errors import PhoenixError

# `cs-current` is refused by the converter of 2.10, which calls its own newest format cs-2.9.
FORMAT = "cs-2.9"
CLI = "from cerebras.modelzoo.cli.main import main; main()"


def convert(source: Path, config: Path, kind: str, out: Path, *, back: bool = False) -> Path:
    """Convert a checkpoint with `cszoo checkpoint convert`.

    Args:
        source: the index of safetensors files, or an .mdl file with `back`.
        config: of the source's format.
        kind: llama, mistral or mixtral.
        out: an empty directory.
        back: from ModelZoo to Hugging Face, as safetensors.

    Returns:
        The file model.mdl's path, or the directory of safetensors with `back`.

    Raises:
        PhoenixError: the converter failed. What it had written until then is no checkpoint and isn't given.
    """
    formats = [FORMAT, "hf"] if back else ["hf", FORMAT]
    command = [sys.executable, "-c", CLI, "checkpoint", "convert", "--model", kind, "--src-fmt", formats[0]]
    command += ["--tgt-fmt", formats[1], "--config", str(config), "--output-dir", str(out), "--no-progress-bar"]
    command += ["--export-safetensors"] if back else []
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, errors="replace")
    written = [path for path in out.iterdir() if path.name.endswith("_to_hf" if back else ".mdl")]
    if done.returncode != 0 or len(written) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise PhoenixError(
            f"convert: ModelZoo's converter failed ({lines[-1][:200] if lines else 'without a word'}); nothing was kept"
        )
    return written[0]


def build(block: dict[str, Any]) -> Any:
    """ModelZoo's model of a `model` section, on torch's default device. Needs a backend of cerebras.pytorch."""
    kind = block["name"]
    module = importlib.import_module(f"cerebras.modelzoo.models.nlp.{kind}.model")
    name = kind.capitalize()
    return getattr(module, f"{name}Model")(getattr(module, f"{name}ModelConfig")(**block))


def load(checkpoint: Path) -> dict[str, Any]:
    """The model's tensors of an .mdl file by name, without the Trainer's `model.`; each is read when it is used.

    Raises:
        PhoenixError: it is no checkpoint. (It is HDF5: torch.load has no part in this.)
    """
    if not checkpoint.is_file():
        raise PhoenixError(f"checkpoint: there is no file {checkpoint}; give a checkpoint_N.mdl")
    import cerebras.pytorch as cstorch

    try:
        state = cstorch.load(str(checkpoint))
        tensors = state["model"]
    except Exception as error:  # whatever HDF5 and three layers above it raise over damaged bytes
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise PhoenixError(f"checkpoint: {checkpoint} can't be read as a Cerebras checkpoint ({line[:160]})") from error
    return {bare(name): tensor for name, tensor in tensors.items()}


def bare(name: str) -> str:
    """A weight's name without the Trainer's `model.`."""
    return name.removeprefix("model.")


def real(tensor: Any) -> Any:
    """The values of a tensor that is read when it is used."""
    return tensor.to("cpu") if hasattr(tensor, "to") else tensor


def require_whole(tensors: dict[str, Any], block: dict[str, Any], beside: tuple[str, ...] = ()) -> None:
    """Refuse a checkpoint that leaves a weight of the model random, or has one that the model doesn't read.

    Args:
        tensors: by name.
        block: the `model` section.
        beside: ends of names that may be there as well.

    Raises:
        PhoenixError: naming the first weight.
    """
    import torch

    with torch.device("meta"):
        model = build(block)
    wanted = {bare(name): tuple(value.shape) for name, value in model.state_dict().items()}
    given = {id(value) for name, value in model.named_parameters(remove_duplicate=False) if bare(name) in tensors}
    for name in sorted(wanted):
        # Tied weights (embeddings and head, the last norm) may be there by one of their names.
        if id(model.get_parameter(f"model.{name}")) not in given:
            raise PhoenixError(f"checkpoint: it has no {name}, which would stay random")
        if name in tensors and tuple(tensors[name].shape) != wanted[name]:
            raise PhoenixError(f"checkpoint: {name} is {tuple(tensors[name].shape)}, and the model's is {wanted[name]}")
    beyond = sorted(name for name in set(tensors) - set(wanted) if not name.endswith(beside or ("\0",)))
    if beyond:
        raise PhoenixError(f"checkpoint: the model has no {beyond[0]} ({len(beyond)} weights would not be read)")
