"""Masks of a dense model at several sparsities from one scoring. The model itself stays as it is.

All scores are of the dense model. `steps.sparsify` goes further: it prunes block by block and measures each block's
inputs behind the pruned ones before it, so its masks of the same importance differ where inputs count.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from phoenix_sparse.files import write_json
from phoenix_sparse.masks import compute_sparsity_stats, plot_sparsity_histogram, save_mask
from phoenix_sparse.pruning.gradients import measure_gradients
from phoenix_sparse.pruning.linear import Method
from phoenix_sparse.pruning.selection import keep, keep_globally
from phoenix_sparse.pruning.sequential import score_blocks
from phoenix_sparse.pruning.settings import SparsifySettings
from phoenix_sparse.pruning.structured import require_reachable, structured_masks
from phoenix_sparse.settings import Settings
from phoenix_sparse.steps import Machine, calibrate, calibration_facts, open_blocks
from phoenix_sparse.tasks import Task


class LevelSettings(Settings):
    """What is written at each level, beside the settings of the scores."""

    method: Literal["unstructured", "structured", "random"] = "unstructured"
    format: Literal["pt", "npz", "safetensors"] = "pt"
    plot: bool = False


class PackedMasks(Mapping[str, Tensor]):
    """A mask set at one bit a weight, unpacked a layer at a time: several of a large model lie in memory at once."""

    def __init__(self) -> None:
        self._bits: dict[str, np.ndarray] = {}
        self._shapes: dict[str, torch.Size] = {}

    def add(self, name: str, mask: Tensor) -> None:
        """Take in a boolean mask (out, in)."""
        self._bits[name], self._shapes[name] = np.packbits(mask.cpu().numpy()), mask.shape

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        bits = np.unpackbits(self._bits[name], count=shape.numel())
        return torch.from_numpy(bits.view(bool)).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)


def level_files(levels: Sequence[float], settings: LevelSettings) -> dict[float, dict[str, str]]:
    """The names of each level's files by kind: `masks_sparsity50_unstructured.pt`, `stats_….json`, `histogram_….png`.

    An uneven level keeps its decimals: 0.333 is sparsity33.3.
    """
    endings = {"masks": settings.format, "stats": "json"} | ({"histogram": "png"} if settings.plot else {})
    return {
        level: {kind: f"{kind}_sparsity{100 * level:.10g}_{settings.method}.{end}" for kind, end in endings.items()}
        for level in levels
    }


def write_levels(
    source: Path,
    task: Task | None,
    scoring: SparsifySettings,
    levels: Sequence[float],
    settings: LevelSettings,
    out: Path,
    machine: Machine,
    *,
    work: Path | None = None,
) -> dict[float, dict[str, Any]]:
    """Score a dense model once and write its masks at every level.

    Args:
        source: the model's directory; its blocks are streamed where its files allow it.
        task: gives calibration text and, to importances that need them, gradients.
        scoring: importance, comparison group and calibration; its pattern is `structured` where the method is.
        levels: sparsities, all different.
        settings: method, format, plot.
        out: the directory to write to, under the names of `level_files`.
        machine: how the model is loaded.
        work: keeps gradients, which a stopped attempt need not measure again; in memory without it.

    Returns:
        What the stats file of each level holds: settings, calibration, and `compute_sparsity_stats` of its masks.

    Raises:
        PhoenixError: as `steps.sparsify`; or the method is structured, and the model's blocks have no such units or
            can't reach a level.
    """
    blocks, tokenizer = open_blocks(source, scoring, machine)
    if settings.method == "structured":
        # Told before the scores are measured.
        require_reachable(blocks.model, max(levels))
    calibration = calibrate(source, task, scoring, tokenizer, machine)
    facts = {
        "method": settings.method,
        "importance": scoring.importance,
        "group": scoring.comparison_group,
        "seed": machine.seed,
    } | calibration_facts(calibration)
    written = {}
    chosen = _choose(blocks, scoring, levels, calibration, machine, work)
    for level, files in level_files(levels, settings).items():
        masks, stated = chosen[level], facts | {"target_sparsity": level}
        written[level] = stated | compute_sparsity_stats(masks)
        write_json(out / files["stats"], written[level])
        if "histogram" in files:
            plot_sparsity_histogram(masks, out / files["histogram"])
        save_mask(masks, out / files["masks"], stated)
    return written


def _choose(
    blocks: Any,
    scoring: SparsifySettings,
    levels: Sequence[float],
    calibration: Any,
    machine: Machine,
    work: Path | None,
) -> dict[float, Mapping[str, Tensor]]:
    """The masks of every level. Only structured masks and global thresholds need the scores of all layers at once."""
    method, gradients = Method.of(scoring, machine.seed), None
    if scoring.reads_gradients:
        directory = work / "gradients" if work else None
        gradients = measure_gradients(blocks, calibration.rows, directory=directory, progress=machine.progress)
    found = {level: PackedMasks() for level in levels}
    held: dict[str, Tensor] = {}
    hold = method.group == "global" or method.pattern.kind == "structured"

    def visit(name: str, _weight: Tensor, scores: Tensor) -> None:
        if hold:
            held[name] = scores.cpu()
            return
        for level, masks in found.items():
            masks.add(name, keep(scores, level, method.group))

    score_blocks(blocks, method, tokens=calibration.tokens, gradients=gradients, progress=machine.progress, visit=visit)
    for level, masks in found.items() if hold else ():
        whole = keep_globally(held, level) if method.group == "global" else structured_masks(blocks.model, held, level)
        for name, mask in whole.items():
            masks.add(name, mask)
    return dict(found)
