"""The YAML that ModelZoo's Trainer reads: model, sparsity, adapter, data, checkpoints."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.settings import Settings

Mode = Literal["static", "sparse_lora"]
PRECISION: dict[str, dict[str, Any]] = {
    "cbfloat16": {"enabled": True, "fp16_type": "cbfloat16", "loss_scaling_factor": "dynamic"},
    "bfloat16": {"enabled": True, "fp16_type": "bfloat16"},
    "float32": {"enabled": False},
}


class TrainingSettings(Settings):
    """How the job trains. There is no elastic adapter on a wafer: one rank, the recipe's largest."""

    mode: Mode = Field(description="static: all weights train, zeros stay; sparse_lora: a LoRA through the mask")
    steps: int = Field(ge=1, description="optimizer steps")
    batch_size: int = Field(ge=1, description="examples in an optimizer step")
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    warmup: int = Field(0, ge=0, description="steps over which the learning rate rises")
    checkpoint_every: int = Field(100, ge=1)
    rank: int = Field(32, ge=1, description="sparse_lora only")
    scale: float = Field(2.0, gt=0, description="of the update: alpha / rank; sparse_lora only")
    precision: Literal["cbfloat16", "bfloat16", "float32"] = "cbfloat16"
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> "TrainingSettings":
        if self.warmup >= self.steps:
            raise ValueError(f"warmup: {self.warmup} steps of {self.steps} leave none to train with")
        return self


def sparsity_groups(weights: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups of weights of one sparsity, each with its true one: `from_zeros` finds the mask, the compiler is told.

    Args:
        weights: `sparsity` by ModelZoo's name, as the converted checkpoint has it.

    Raises:
        PhoenixError: a weight with no zero, or with nothing else: no sparsity that the compiler could use.
    """
    groups: dict[float, list[str]] = {}
    for name, weight in weights.items():
        share = float(weight["sparsity"])
        if not 0 < share < 1:
            raise PhoenixError(f"cerebras: {name} has a sparsity of {share:g}; a mode without sparsity is not exported")
        groups.setdefault(share, []).append(f"*{name}")
    if not groups:
        raise PhoenixError("cerebras: no weight is pruned; a mode without sparsity is not exported")
    return [
        {"algorithm": "static", "init_method": "from_zeros", "sparsity": share, "param_filter": names}
        for share, names in sorted(groups.items())
    ]


def training_params(
    model: Mapping[str, Any],
    groups: list[dict[str, Any]],
    settings: TrainingSettings,
    *,
    evaluation_batch: int,
) -> dict[str, Any]:
    """The YAML of both training (`fit`) and evaluation (`validate`); paths are relative to the export's directory.

    Args:
        model: the `model` section.
        groups: from `sparsity_groups`.
        settings: of the job.
        evaluation_batch: examples at once; those that don't fill a batch are left out by ModelZoo.
    """
    rate, rest = settings.learning_rate, settings.steps - settings.warmup
    schedule: list[dict[str, Any]] = [
        {"CosineDecayLR": {"initial_learning_rate": rate, "end_learning_rate": 0.0, "total_iters": rest}}
    ]
    if settings.warmup:
        rising = {"initial_learning_rate": 0.0, "end_learning_rate": rate, "total_iters": settings.warmup}
        schedule = [{"SequentialLR": {"schedulers": [{"LinearLR": rising}, *schedule]}}]
    adamw = {"betas": [0.9, 0.999], "eps": 1.0e-8, "correct_bias": True, "weight_decay": settings.weight_decay}
    init: dict[str, Any] = {
        "backend": {"backend_type": "CSX"},
        "model_dir": "./model_dir",
        "seed": settings.seed,
        "model": dict(model),
        "optimizer": {"AdamW": adamw},
        "schedulers": schedule,
        "precision": PRECISION[settings.precision] | {"max_gradient_norm": settings.max_grad_norm},
        "loop": {"max_steps": settings.steps},
        # Not strict, for neither the masks nor the adapter are in the first checkpoint: the runner checks its names.
        "checkpoint": {"steps": min(settings.checkpoint_every, settings.steps)}
        | {"disable_strict_checkpoint_loading": True},
        "logging": {"log_steps": max(1, min(10, settings.steps // 4))},
    }
    check: dict[str, Any] = {"CompleteCheckpoint": {}}
    if settings.mode == "static":
        init["sparsity"] = groups
        init["callbacks"] = [check]
    else:
        adapter = {"r": settings.rank, "alpha": settings.scale * settings.rank, "dropout": 0.0}
        init["callbacks"] = [check, {"MaskedLora": adapter | {"sparsity": groups}}]
    loader = {"data_processor": "GptHDF5MapDataProcessor", "num_workers": 0}
    fit = loader | {"data_dir": "./data/train", "batch_size": settings.batch_size, "shuffle": True}
    fit["shuffle_seed"] = settings.seed
    held_out = loader | {"data_dir": "./data/validation", "batch_size": evaluation_batch, "shuffle": False}
    return {
        "trainer": {
            "init": init,
            "fit": {"train_dataloader": fit, "ckpt_path": "./checkpoint.mdl"},
            "validate": {"val_dataloader": held_out},
        }
    }
