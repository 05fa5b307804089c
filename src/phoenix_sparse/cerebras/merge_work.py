"""Worker: a trained Cerebras checkpoint merged through its masks, and converted to Hugging Face."""

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

from phoenix_sparse.cerebras import modelzoo
from phoenix_sparse.cerebras.worker import serve
from phoenix_sparse.errors import PhoenixError

LORA_A, LORA_B, MASK = ".lora_A", ".lora_B", ".weight_mask"


def work(checkpoint: str, masks: str, block: dict[str, Any], scale: float | None, out: str) -> dict[str, Any]:
    """Merge W += (B@A)·scale ⊙ M in float32, drop the adapter and the mask buffers, and convert.

    Args:
        checkpoint: an .mdl file of the Trainer.
        masks: bits by ModelZoo's names, as `inspect_work` reads them.
        block: the `model` section it was trained with.
        scale: alpha / r; None where there is no adapter.
        out: the directory of safetensors to write; it appears when all is right.

    Returns:
        `merged`: how many weights had an adapter.
    """
    import cerebras.pytorch as cstorch
    import numpy as np
    import torch
    import yaml

    cstorch.backend("CPU")
    tensors = modelzoo.load(Path(checkpoint))
    beside = (MASK,) if scale is None else (MASK, LORA_A, LORA_B)
    modelzoo.require_whole(tensors, block, beside)
    kept: dict[str, Any] = {}
    merged = 0
    with np.load(masks, allow_pickle=False) as packed:
        for name, tensor in tensors.items():
            if name.endswith(beside):
                continue
            weight = modelzoo.real(tensor)
            if name in packed.files:
                bits = np.unpackbits(packed[name], count=math.prod(weight.shape))
                weight = _masked(name, weight, tensors, torch.from_numpy(bits).view(weight.shape).bool(), scale)
                merged += scale is not None
            kept[name] = weight
        adapted = {name.removesuffix(LORA_A) + ".weight" for name in tensors if name.endswith(LORA_A)}
        if stray := sorted(adapted - set(packed.files)):
            raise PhoenixError(f"merge: {stray[0]} has an adapter and no mask; are these the masks of this run?")
    with tempfile.TemporaryDirectory(dir=Path(out).parent, prefix=".merge-") as place:
        whole, config, converted = Path(place) / "merged.mdl", Path(place) / "model.yaml", Path(place) / "out"
        converted.mkdir()
        cstorch.save({"model": kept}, str(whole))
        config.write_text(yaml.safe_dump({"model": block}), encoding="utf-8")
        shutil.move(modelzoo.convert(whole, config, block["name"], converted, back=True), out)
    return {"merged": merged}


def _masked(name: str, weight: Any, tensors: dict[str, Any], mask: Any, scale: float | None) -> Any:
    """A weight with its update, every zero in its place.

    Raises:
        PhoenixError: the weight, or the mask that it was trained through, isn't the run's.
    """
    if bool((weight[~mask] != 0).any()):
        raise PhoenixError(f"merge: {name} has non-zeros off its mask; it wasn't trained with this export's sparsity")
    if scale is None:
        return weight
    start = name.removesuffix(".weight")
    through = tensors.get(start + MASK)
    if through is None or start + LORA_A not in tensors:
        raise PhoenixError(f"merge: {name} has no adapter and mask beside it; it wasn't trained with MaskedLora")
    seen = modelzoo.real(through).bool()
    if bool((seen & ~mask).any()):
        raise PhoenixError(f"merge: {name} was trained through another mask than this run's")
    update = modelzoo.real(tensors[start + LORA_B]).float() @ modelzoo.real(tensors[start + LORA_A]).float()
    return weight.float() + update * scale * seen


if __name__ == "__main__":
    serve(work)
