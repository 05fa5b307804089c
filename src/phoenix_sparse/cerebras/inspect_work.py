"""Worker: counts of a Cerebras checkpoint's pruned weights against their masks. Needs no ModelZoo."""

import math
from pathlib import Path
from typing import Any

from phoenix_sparse.cerebras import modelzoo
from phoenix_sparse.cerebras.worker import serve
from phoenix_sparse.errors import PhoenixError


def work(checkpoint: str, masks: str) -> dict[str, Any]:
    """Count zeros, and non-zeros off the mask.

    Args:
        checkpoint: an .mdl file.
        masks: an .npz file with the bits of each mask by ModelZoo's name, 8 a byte, in the checkpoint's layout.

    Returns:
        `weights`: shape, zeros, off_mask_nonzeros and sparsity (zeros / weights) by name; `adapters`: how many weights
        have a LoRA beside them; `beyond`: linears of decoder blocks that no mask is for.
    """
    import numpy as np
    import torch

    tensors = modelzoo.load(Path(checkpoint))
    found: dict[str, dict[str, Any]] = {}
    with np.load(masks, allow_pickle=False) as packed:
        for name in packed.files:
            if name not in tensors:
                raise PhoenixError(f"checkpoint: it has no {name}; are these the masks of this model?")
            weight = modelzoo.real(tensors[name])
            count = math.prod(weight.shape)
            if packed[name].size != math.ceil(count / 8):
                raise PhoenixError(f"checkpoint: {name} is {tuple(weight.shape)}, and its mask has another size")
            kept = torch.from_numpy(np.unpackbits(packed[name], count=count)).view(weight.shape).bool()
            zeros = int((weight == 0).sum())
            found[name] = {
                "shape": list(weight.shape),
                "zeros": zeros,
                "sparsity": zeros / count,
                "off_mask_nonzeros": int((weight[~kept] != 0).sum()),
            }
    return {"weights": found, "adapters": sum(name.endswith(".lora_A") for name in tensors)}


if __name__ == "__main__":
    serve(work)
