"""Phoenix: sparse fine-tuning of language models whose zeros survive the merge.

Public names load when they are first used, so that `import phoenix_sparse` stays light.
"""

import importlib
from typing import Any

from phoenix_sparse.runtime.registration import register

__version__ = "0.1.0"

_PUBLIC = {
    "PhoenixError": "phoenix_sparse.errors",
    "CheckFailed": "phoenix_sparse.errors",
    "Recipe": "phoenix_sparse.recipe",
    "load_recipe": "phoenix_sparse.recipe",
    "run": "phoenix_sparse.pipeline",
    "load_model": "phoenix_sparse.models",
    "load_tokenizer": "phoenix_sparse.models",
    "prunable_linears": "phoenix_sparse.models",
    "load_task": "phoenix_sparse.tasks",
    "TaskSettings": "phoenix_sparse.tasks.settings",
    "prune": "phoenix_sparse.pruning.initialise",
    "register_importance": "phoenix_sparse.pruning.importance",
    "magnitude_importance": "phoenix_sparse.pruning.importance",
    "taylor_importance": "phoenix_sparse.pruning.importance",
    "gradient_importance": "phoenix_sparse.pruning.importance",
    "wanda_importance": "phoenix_sparse.pruning.importance",
    "compute_unstructured_mask": "phoenix_sparse.pruning.mask_generator",
    "compute_structured_mask": "phoenix_sparse.pruning.mask_generator",
    "compute_random_mask": "phoenix_sparse.pruning.mask_generator",
    "compute_masks_for_state_dict": "phoenix_sparse.pruning.mask_generator",
    "MaskGenerator": "phoenix_sparse.pruning.mask_generator",
    "shrink": "phoenix_sparse.pruning.structured",
    "sparsegpt": "phoenix_sparse.pruning.reconstruction.sparsegpt",
    "alps": "phoenix_sparse.pruning.reconstruction.alps",
    "dsnot": "phoenix_sparse.pruning.reconstruction.dsnot",
    "SparsifySettings": "phoenix_sparse.pruning.settings",
    "calibration_tokens": "phoenix_sparse.pruning.calibration",
    "save_mask": "phoenix_sparse.masks",
    "load_mask": "phoenix_sparse.masks",
    "apply_masks": "phoenix_sparse.masks",
    "validate_mask": "phoenix_sparse.masks",
    "compute_sparsity_stats": "phoenix_sparse.masks",
    "plot_sparsity_histogram": "phoenix_sparse.masks",
    "add_adapter": "phoenix_sparse.finetuning.adapter",
    "load_adapter": "phoenix_sparse.finetuning.adapter",
    "save_adapter": "phoenix_sparse.finetuning.adapter",
    "set_ranks": "phoenix_sparse.finetuning.adapter",
    "FinetuneSettings": "phoenix_sparse.finetuning.settings",
    "SearchSettings": "phoenix_sparse.finetuning.settings",
    "train": "phoenix_sparse.finetuning.trainer",
    "tokenize": "phoenix_sparse.finetuning.examples",
    "search": "phoenix_sparse.finetuning.search",
    "SparseLoRAConfig": "phoenix_sparse.finetuning.sparse_lora",
    "apply_sparse_lora": "phoenix_sparse.finetuning.sparse_lora",
    "add_super_adapter": "phoenix_sparse.finetuning.adapter",
    "merge_all_lora_weights": "phoenix_sparse.merging",
    "validate_sparsity_preserved": "phoenix_sparse.merging",
    "merge": "phoenix_sparse.merging",
    "certify": "phoenix_sparse.merging",
    "evaluate": "phoenix_sparse.evaluation.harness",
    "perplexity": "phoenix_sparse.evaluation.perplexity",
    "count_flops": "phoenix_sparse.evaluation.flops",
    "build_report": "phoenix_sparse.report",
    "pack_model": "phoenix_sparse.runtime.packing",
    "unpack_model": "phoenix_sparse.runtime.packing",
    "load": "phoenix_sparse.runtime.loading",
    "SparseLinear": "phoenix_sparse.runtime.sparse_linear",
}

__all__ = [*sorted(_PUBLIC), "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'phoenix_sparse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


register()  # packed models open through transformers wherever Phoenix is imported
