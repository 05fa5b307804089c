"""What a recipe says about fine-tuning and about the search."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from phoenix_sparse.settings import Settings

Mode = Literal["sparse_to_sparse", "sparse_to_dense"]


class FinetuneSettings(Settings):
    """How the adapter is trained."""

    mode: Mode = Field("sparse_to_sparse", description="mask in the forward pass, or a plain LoRA on the sparse base")
    dense_merge: Literal["dense", "remask"] = Field(
        "dense", description="sparse_to_dense only: merge and fill the zeros, or mask the merged weights again"
    )
    ranks: tuple[int, ...] = Field((32, 24, 16), description="ranks that a layer may have; one rank is a fixed adapter")
    scale: float = Field(2.0, gt=0, description="s in W + M⊙(s·BA), the same at every rank (alpha = scale · rank)")
    targets: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="last names of the linears to adapt, such as [q_proj, v_proj]; all of a block unless given",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input; sparse_to_dense only")
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps over which the learning rate rises")
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(None, ge=1, description="optimizer steps, instead of epochs")
    batch_size: int = Field(32, ge=1, description="examples in an optimizer step")
    micro_batch_size: int | None = Field(
        None, ge=1, description="examples on the device at once; batch_size unless given"
    )
    max_length: int = Field(512, ge=8, description="tokens; longer prompts lose their beginning, completions never do")
    max_grad_norm: float = Field(1.0, gt=0)
    gradient_checkpointing: bool = False
    checkpoint_every: int = Field(
        100, ge=1, description="optimizer steps between checkpoints that --resume goes on from"
    )
    log_every: int = Field(10, ge=1, description="optimizer steps between entries of the training log")

    @field_validator("ranks")
    @classmethod
    def _largest_first(cls, ranks: tuple[int, ...]) -> tuple[int, ...]:
        if not ranks or min(ranks) < 1 or len(set(ranks)) != len(ranks):
            raise ValueError("needs one or more different whole numbers from 1 up, such as [32, 24, 16]")
        return tuple(sorted(ranks, reverse=True))

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.mode == "sparse_to_sparse" and self.dropout:
            raise ValueError(
                "dropout: the masked update has one product with the input and none to drop; use dropout=0"
            )
        if self.mode == "sparse_to_sparse" and self.dense_merge != "dense":
            raise ValueError("dense_merge: belongs to mode: sparse_to_dense; a sparse_to_sparse merge keeps every zero")
        if self.batch_size % self.micro_batch:
            raise ValueError(f"micro_batch_size: {self.micro_batch} does not divide batch_size {self.batch_size}")
        return self

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
