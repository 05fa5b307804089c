"""The smaller model that structured masks leave, as an ordinary directory."""

from pathlib import Path
from typing import Any

from phoenix_sparse import merging
from phoenix_sparse.masks import Masks, apply_masks, inspect
from phoenix_sparse.models import load_config, prunable_linears, save_model
from phoenix_sparse.pruning.structured import shrink
from phoenix_sparse.steps import SAMPLE_TEXTS, Machine


def write_smaller(source: Path, masks: Masks, out: Path, machine: Machine) -> dict[str, Any]:
    """Leave out what structured masks drop, write the model, and compare what was written with the masked one.

    Args:
        source: the model's directory; what the masks drop may still be there.
        masks: of all its prunable linears, as `pattern: structured` makes them.
        out: the directory to write.
        machine: how the model is loaded. It lies in memory whole, and the smaller one beside it.

    Returns:
        `parameters_before` and `parameters`; `dropped_nonzeros`, the weights off the masks that weren't zero in the
        source; `max_abs_logit_difference` on some sentences, the masked model against the directory read back.

    Raises:
        PhoenixError: the masks are another model's or not structured.
    """
    model, tokenizer = machine.open(source)
    small, layers = shrink(model, masks), prunable_linears(model)
    found = {
        "parameters_before": sum(parameter.numel() for parameter in model.parameters()),
        "parameters": sum(parameter.numel() for parameter in small.parameters()),
        "dropped_nonzeros": sum(layer["off_mask_nonzeros"] for layer in inspect(masks, layers).values()),
    }
    apply_masks(masks, layers)
    longest = int(getattr(load_config(source), "max_position_embeddings", 2**30))
    rows = [tokenizer(text).input_ids[:longest] for text in SAMPLE_TEXTS]
    masked = merging.sample_logits(model, rows, tokenizer.pad_token_id)
    del model, layers
    save_model(small, tokenizer, out)
    del small
    written = merging.sample_logits(machine.load(out), rows, tokenizer.pad_token_id)
    found["max_abs_logit_difference"] = max(
        float((one - two).abs().max()) for one, two in zip(masked, written, strict=True)
    )
    return found
