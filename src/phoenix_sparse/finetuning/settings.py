"""What a recipe says about fine-tuning and about the search."""

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from phoenix_sparse.finetuning.sections import DistillSettings, EvolveSettings
from phoenix_sparse.settings import Settings

Mode = Literal["sparse_to_sparse", "sparse_to_dense"]
Method = Literal["lora", "hira"]
ScaleRule = Literal["fixed", "alpha_over_rank"]
Batching = Literal["padded", "grouped", "packed"]


class FinetuneSettings(Settings):
    """How the adapter is trained."""

    mode: Mode = Field("sparse_to_sparse", description="mask in the forward pass, or a plain LoRA on the sparse base")
    dense_merge: Literal["dense", "remask"] = Field(
        "dense", description="sparse_to_dense only: merge and fill the zeros, or mask the merged weights again"
    )
    method: Method | Literal["full"] = Field(
        "lora",
        description="lora: the update is s·BA through the mask; hira: it is W⊙(s·BA), zero where W is; full: no "
        "adapter, the kept weights themselves train (ranks, scale and the search of them don't apply)",
    )
    ranks: tuple[int, ...] | dict[str, tuple[int, ...]] = Field(
        (32, 24, 16),
        description="ranks that a layer may have, one for a fixed adapter; or ranks by last names or patterns of "
        'layers, the first that fits: {q_proj: [32, 16], "mlp.*": [24, 12], "*": [16]}',
    )
    sampling: Literal["uniform", "sandwich"] = Field(
        "uniform",
        description="uniform: one random sub-adapter a step; sandwich: the largest, the smallest and a random one, "
        "their gradients averaged, for three forward and backward passes a step",
    )
    scale: float = Field(2.0, gt=0, description="s in W + M⊙(s·BA), at a layer's largest rank")
    scale_rule: ScaleRule = Field(
        "fixed",
        description="fixed: s at every rank; alpha_over_rank: alpha/r, alpha being scale times a layer's largest rank",
    )
    targets: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="last names of the linears to adapt, such as [q_proj, v_proj]; all of a block unless given",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input; sparse_to_dense only")
    learning_rate: float = Field(1e-3, gt=0, description="the highest; with method: full some 1e-5")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps over which the learning rate rises")
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        "cosine", description="how the learning rate falls: cosine, linear, or not at all (constant_with_warmup)"
    )
    epochs: float = Field(3.0, gt=0, description="passes over the training examples")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps, instead of epochs")
    batch_size: int = Field(32, ge=1, description="examples in an optimizer step")
    micro_batch_size: int | None = Field(
        None, ge=1, description="examples on the device at once; batch_size unless given"
    )
    batching: Batching = Field(
        "padded",
        description="padded: examples in random order; grouped: batches of like lengths; packed: the batches of "
        "padded, their examples in rows of max_length tokens one after the other, seeing only themselves",
    )
    max_length: int = Field(512, ge=8, description="tokens; longer prompts lose their beginning, completions never do")
    max_grad_norm: float = Field(1.0, gt=0, description="a larger gradient is scaled down to this norm")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, more time")
    checkpoint_every: int = Field(
        100, ge=1, description="optimizer steps between checkpoints that --resume goes on from"
    )
    log_every: int = Field(10, ge=1, description="optimizer steps between entries of the training log")
    validate_every: int | None = Field(
        None,
        ge=1,
        description="optimizer steps between measurements of the loss on the completions of the validation examples; "
        "the weights that were best by it are kept. None: the last weights are",
    )
    patience: int | None = Field(
        None, ge=1, description="stop after so many validations in a row without a new best; needs validate_every"
    )
    trackers: tuple[str, ...] | None = Field(
        None,
        description="where the training log goes besides tune.json: tensorboard (files in logs/), wandb, mlflow or "
        "another that accelerate knows; TensorBoard where it is installed unless given, [] for none",
    )
    distill: DistillSettings | None = Field(None, description="learn from a dense model, too")
    evolve: EvolveSettings | None = Field(None, description="let the mask change at constant sparsity")

    @field_validator("ranks", mode="before")
    @classmethod
    def _list_or_mapping(cls, value: Any) -> Any:
        """Say at once what is wrong, instead of once for each kind of value."""
        if not isinstance(value, Mapping):
            return _largest_first(value)
        if not value or not all(isinstance(name, str) and name for name in value):
            raise ValueError('needs ranks by last names or patterns of layers, such as {q_proj: [32, 16], "*": [16]}')
        return {name: _largest_first(ranks, f"{name} ") for name, ranks in value.items()}

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.method == "hira" and self.mode == "sparse_to_dense":
            raise ValueError("method: hira multiplies W and keeps its zeros; it goes with mode: sparse_to_sparse")
        if self.sampling == "sandwich" and self.ranks == self.largest_ranks:
            raise ValueError("sampling: sandwich needs a largest and a smallest rank; give ranks more than one")
        if self.mode == "sparse_to_sparse" and self.dropout:
            raise ValueError(
                "dropout: the masked update has one product with the input and none to drop; use dropout=0"
            )
        if self.mode == "sparse_to_sparse" and self.dense_merge != "dense":
            raise ValueError("dense_merge: belongs to mode: sparse_to_dense; a sparse_to_sparse merge keeps every zero")
        if self.method == "full" and self.mode == "sparse_to_dense":
            raise ValueError("method: full trains the kept weights and no others; it goes with mode: sparse_to_sparse")
        if self.method == "full" and self.sampling == "sandwich":
            raise ValueError("sampling: sandwich draws ranks, and method: full has none; use sampling=uniform")
        if self.evolve is not None and (self.method == "hira" or self.mode == "sparse_to_dense"):
            raise ValueError(
                "evolve: the update has to be zero off the mask and free on it; it goes with mode: sparse_to_sparse, "
                "and with method: lora or full"
            )
        if self.patience is not None and self.validate_every is None:
            raise ValueError("patience: nothing is validated; set validate_every too, or leave patience out")
        if self.batch_size % self.micro_batch:
            raise ValueError(f"micro_batch_size: {self.micro_batch} does not divide batch_size {self.batch_size}")
        return self

    @property
    def largest_ranks(self) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
        """The ranks of the fixed adapter that is as large as the super-adapter."""
        if isinstance(self.ranks, Mapping):
            return {name: ranks[:1] for name, ranks in self.ranks.items()}
        return self.ranks[:1]

    def count_examples(self, examples: int) -> int:
        """Examples that a training on so many takes in all its steps."""
        return math.ceil(self.epochs * examples) if self.max_steps is None else self.max_steps * self.batch_size

    def count_steps(self, examples: int) -> int:
        """Optimizer steps of a training on so many examples."""
        return math.ceil(self.count_examples(examples) / self.batch_size)

    @property
    def is_searchable(self) -> bool:
        """Whether some layer has more than one rank, so that there are sub-adapters to choose from."""
        return self.method != "full" and self.ranks != self.largest_ranks

    @property
    def passes(self) -> int:
        """Forward and backward passes over a step's examples."""
        return 3 if self.sampling == "sandwich" else 1

    @property
    def micro_batch(self) -> int:
        return self.micro_batch_size or self.batch_size


class SearchSettings(Settings):
    """Which sub-adapters are evaluated on the validation split. The median is always tried first."""

    bounds: bool = Field(True, description="evaluate the largest and the smallest sub-adapter too")
    hill_climb: int = Field(8, ge=0, description="evaluations for hill climbing, from the best so far")
    nsga2: int = Field(0, ge=0, description="evaluations for Optuna's NSGA-II over (accuracy, adapter parameters)")
    population: int = Field(8, ge=2, description="NSGA-II's population")
    examples: int = Field(200, ge=1, description="validation examples to evaluate on, at most")
    margin: float = Field(
        1.0,
        ge=0,
        description="standard errors of the validation accuracy by which a sub-adapter must lead the median to be "
        "chosen; 0 takes the most accurate",
    )
    neighbours: int = Field(
        1, ge=1, description="evaluated before hill climbing moves to the best of them; several processes share them"
    )
    pool: int = Field(
        1,
        ge=1,
        description="neighbours drawn for each that is evaluated: those with the lowest loss on the validation "
        "examples' completions, which one forward pass tells, are",
    )

    @model_validator(mode="after")
    def _nothing_idle(self) -> Self:
        for name, of in (("population", "nsga2"), ("neighbours", "hill_climb"), ("pool", "hill_climb")):
            if getattr(self, name) != type(self).model_fields[name].default and not getattr(self, of):
                raise ValueError(
                    f"{name}: it is a setting of {of}, which evaluates nothing; set {of}, or leave {name} out"
                )
        return self


def _largest_first(ranks: Any, where: str = "") -> tuple[int, ...]:
    whole = isinstance(ranks, list | tuple) and all(type(rank) is int and rank > 0 for rank in ranks)
    if not whole or not ranks or len(set(ranks)) != len(ranks):
        raise ValueError(f"{where}needs one or more different whole numbers from 1 up, such as [32, 24, 16]")
    return tuple(sorted(ranks, reverse=True))
