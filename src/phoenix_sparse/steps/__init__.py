"""The steps on files: each reads model directories and masks, writes its own files, and knows nothing of a run."""

from phoenix_sparse.masks import Masks
from phoenix_sparse.steps.evaluating import evaluate, flops, measure_perplexity, require_room
from phoenix_sparse.steps.machine import Common, Machine, read_masks
from phoenix_sparse.steps.merging import SAMPLE_TEXTS, merge, merge_dense
from phoenix_sparse.steps.sparsifying import calibrate, calibration_facts, open_blocks, sparsify
from phoenix_sparse.steps.tuning import (
    EVOLVED,
    OF_A_RUN,
    require_adapter,
    require_alike,
    require_targets,
    require_trackers,
    require_trainable,
    require_validation,
    search,
    tune,
)

__all__ = [
    "EVOLVED",
    "OF_A_RUN",
    "SAMPLE_TEXTS",
    "Common",
    "Machine",
    "Masks",
    "calibrate",
    "calibration_facts",
    "evaluate",
    "flops",
    "measure_perplexity",
    "merge",
    "merge_dense",
    "open_blocks",
    "read_masks",
    "require_adapter",
    "require_alike",
    "require_room",
    "require_targets",
    "require_trackers",
    "require_trainable",
    "require_validation",
    "search",
    "sparsify",
    "tune",
]
