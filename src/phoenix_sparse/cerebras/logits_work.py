"""Worker: the logits of a trained Cerebras checkpoint, computed by ModelZoo's own model on the CPU."""

import importlib
from pathlib import Path
from typing import Any

from phoenix_sparse.cerebras import modelzoo
from phoenix_sparse.cerebras.merge_work import MASK
from phoenix_sparse.cerebras.worker import serve


def work(
    checkpoint: str, block: dict[str, Any], lora: dict[str, Any] | None, rows: list[list[int]], out: str
) -> dict[str, Any]:
    """Run the model, with its adapter unmerged, on each row alone.

    Args:
        checkpoint: an .mdl file of the Trainer.
        block: the `model` section.
        lora: r, alpha, dropout and filters of the masked LoRA; None where there is none.
        rows: token numbers.
        out: the .npz file to write, float32 (tokens, vocabulary) by the row's number.
    """
    import cerebras.pytorch as cstorch
    import numpy as np
    import torch

    cstorch.backend("CPU")
    # A model with experts logs their use, which it can do inside a Trainer only.
    decoder: Any = importlib.import_module("cerebras.modelzoo.layers.TransformerDecoder")
    decoder.summarize_scalar = _nothing
    model = modelzoo.build(block).model
    if lora is not None:
        from phoenix_sparse.cerebras.masked_lora import add_masked_lora

        add_masked_lora(model, **lora)
    tensors = modelzoo.load(Path(checkpoint))
    values = {name: modelzoo.real(tensor) for name, tensor in tensors.items() if not name.endswith(MASK)}
    seen = {name: modelzoo.real(tensor) for name, tensor in tensors.items() if name.endswith(MASK)}
    model.load_state_dict(values)
    for name, mask in seen.items() if lora is not None else ():
        model.get_submodule(name.removesuffix(MASK)).register_buffer("weight_mask", mask.bool())
    model.eval()
    found = {}
    with torch.no_grad():
        for number, row in enumerate(rows):
            ids = torch.tensor([row], dtype=torch.int32)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids))
            found[str(number)] = (logits[0] if isinstance(logits, tuple) else logits)[0].float().numpy()
    np.savez(out, **found)
    return {"rows": len(rows)}


def _nothing(*_: Any, **__: Any) -> None:
    return None


if __name__ == "__main__":
    serve(work)
