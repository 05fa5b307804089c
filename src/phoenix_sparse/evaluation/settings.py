"""What a recipe says about the evidence."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from phoenix_sparse.settings import Settings
from phoenix_sparse.tasks.settings import TaskSettings

Baseline = Literal["dense", "pruned", "dense_lora"]


class PerplexitySettings(Settings):
    """Perplexity on a text, in windows that don't overlap."""

    text: Path = Field(description="a text file (UTF-8)")
    context_length: int = Field(512, ge=2, description="tokens in a window")
    max_tokens: int | None = Field(None, ge=2, description="read no more than this")


class EvaluateSettings(Settings):
    """Which models are compared, and how."""

    split: Literal["test", "validation"] = Field(
        "test", description="validation: to choose between runs by, so that the test split stays unseen"
    )
    batch_size: int = Field(32, ge=1, description="prompts at once")
    baselines: tuple[Baseline, ...] = Field(
        ("dense", "pruned", "dense_lora"), description="models that stand beside the result"
    )
    dense_lora_learning_rate: float | None = Field(
        None, gt=0, description="the dense baseline's own learning rate, where the sparse one's does not suit it"
    )
    certificate_examples: int = Field(8, ge=1, description="examples whose logits the certificate compares")
    perplexity: PerplexitySettings | None = Field(None, description="of a text, too")
    also: tuple[TaskSettings, ...] = Field(
        (),
        description="further tasks that every model is evaluated on, written as the task is; see eval_all.json",
    )
    prompt_length: int = Field(512, ge=1, description="tokens of the prompt in the FLOPs count")
    context_length: int = Field(
        1024, ge=1, description="positions that a decoded token attends to in the FLOPs count, itself included"
    )

    @field_validator("baselines")
    @classmethod
    def _each_once(cls, names: tuple[Baseline, ...]) -> tuple[Baseline, ...]:
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} stands twice; give each baseline once")
        return names
