"""Measured speed of training: a step of a LoRA through the mask beside one that fills the zeros, in turns."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.finetuning.adapter import add_adapter, elastic_layers
from phoenix_sparse.models import load_model, prunable_linears
from phoenix_sparse.progress import Progress
from phoenix_sparse.runtime.bench import Spread, in_turns
from phoenix_sparse.settings import Device, Dtype

RANK, SCALE = 32, 2.0
WAYS = ("dense", "masked")


def measure_training(
    directory: Path,
    *,
    batches: Sequence[int],
    length: int,
    repeats: int,
    dtype: Dtype,
    device: Device,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Time forward, backward and AdamW of adapters of rank 32 on all linears, dense against masked.

    Both are the same adapter on the same weights, with its mask taken off and put on. Its mask is where the model has
    no zero.

    Args:
        directory: an ordinary model, pruned.
        batches: sequences in a step, on the device at once.
        length: tokens of a sequence (random ones: the speed doesn't depend on them).
        repeats: timed steps.
        dtype: as `load_model` takes it.
        device: likewise.
        seed: of tokens and adapter.
        progress: called with (what, done, all).

    Returns:
        A row for each batch: for each way (`dense`, `masked`) `samples_per_second` and `tokens_per_second` with their
        quartiles, on a GPU the peak memory in bytes, model and optimizer included; and the ratio masked / dense, the
        median over repeats.

    Raises:
        PhoenixError: the model can't be loaded, or has no zeros.
    """
    model = load_model(directory, dtype, device)
    linears = prunable_linears(model)
    masks = {name: linear.weight != 0 for name, linear in linears.items()}
    if all(bool(mask.all()) for mask in masks.values()):
        raise PhoenixError(f"bench: {directory} has no zeros to train through; prune it first")
    adapted = add_adapter(model, rank=RANK, scale=SCALE, masks=masks, seed=seed).train()
    layers = list(elastic_layers(adapted).values())
    kept = [layer.kept for layer in layers]
    optimizer = torch.optim.AdamW([one for one in adapted.parameters() if one.requires_grad], lr=1e-5)
    place, generator = next(adapted.parameters()).device, torch.Generator().manual_seed(seed)
    peaks: dict[str, int | None] = dict.fromkeys(WAYS)

    def step(way: str, tokens: torch.Tensor) -> None:
        for layer, mask in zip(layers, kept, strict=True):
            layer.kept = mask if way == "masked" else None
        if place.type == "cuda":
            torch.cuda.reset_peak_memory_stats(place)
        adapted(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if place.type == "cuda":
            peaks[way] = torch.cuda.max_memory_allocated(place)

    rows = []
    for number, batch in enumerate(batches):
        tokens = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator).to(place)
        seconds = in_turns({way: partial(step, way, tokens) for way in WAYS}, repeats, place)
        spreads = {way: Spread.of(times) for way, times in seconds.items()}
        ratios = [dense / masked for dense, masked in zip(seconds["dense"], seconds["masked"], strict=True)]
        rows.append(
            {
                "batch": batch,
                "length": length,
                "rank": RANK,
                "samples_per_second": {way: asdict(spread.rate(batch)) for way, spread in spreads.items()},
                "tokens_per_second": {way: asdict(spread.rate(batch * length)) for way, spread in spreads.items()},
                "peak_bytes": dict(peaks),
                "ratio": Spread.of(ratios).median,
            }
        )
        if progress is not None:
            progress("training batch", number + 1, len(batches))
    return rows
