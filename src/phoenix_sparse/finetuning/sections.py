"""Sections within a recipe's fine-tuning: distillation, and a mask that evolves."""

from typing import Literal, Self

from pydantic import Field, model_validator

from phoenix_sparse.settings import Settings


class DistillSettings(Settings):
    """What the sparse model learns from a dense one that computes beside it."""

    teacher: str = Field(
        "dense_lora",
        min_length=1,
        description="dense_lora: the dense baseline, trained before; dense: the recipe's model as it is; or a model's "
        "directory",
    )
    logits: float = Field(1.0, ge=0, description="weight of the KL divergence on the completions' tokens, times T²")
    temperature: float = Field(1.0, gt=0, description="T, by which both models' logits are divided")
    hidden: float = Field(0.0, ge=0, description="weight of the blocks' squared errors, each over the teacher's square")
    task: float = Field(1.0, ge=0, description="weight of the completions' own cross-entropy")

    @model_validator(mode="after")
    def _learns_from_it(self) -> Self:
        if not self.logits and not self.hidden:
            raise ValueError("logits: neither logits nor hidden has a weight; give one of them some, or leave distill")
        if self.temperature != 1 and not self.logits:
            raise ValueError("temperature: it divides logits, which have no weight; give logits some, or leave it out")
        return self


class EvolveSettings(Settings):
    """How the mask changes while its weights train; every layer keeps as many weights as it had."""

    every: int = Field(100, ge=1, description="optimizer steps between two changes of the mask")
    fraction: float = Field(
        0.1, gt=0, le=0.5, description="share of a layer's kept weights that the first change replaces"
    )
    until: float = Field(
        0.75, gt=0, le=1, description="share of the steps after which the mask stays; the replaced share falls to it"
    )
    drop: Literal["sensitivity", "magnitude"] = Field(
        "sensitivity", description="drop the smallest |weight·gradient| or the smallest |weight|"
    )
