"""The `task` section of a recipe."""

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from phoenix_sparse.settings import Settings


class SourceSettings(Settings):
    """More examples to train on, in the prompts and answers of a task of their own."""

    name: str = Field(min_length=1, description="a built-in task, or a folder that holds task.yaml")
    data: Path | None = Field(
        default=None, description="a folder with its training split; the task folder, or the hub, unless given"
    )
    max_train: int | None = Field(default=None, ge=1, description="a random sample of this many examples")

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        """`mixture: [mawps]` is short for `mixture: [{name: mawps}]`."""
        return {"name": value} if isinstance(value, str) else value


class TaskSettings(Settings):
    """Which task to fine-tune on and to evaluate with, and how much of its data to use."""

    name: str = Field(description="a built-in task, or a folder that holds task.yaml (and <split>.jsonl)")
    data: Path | None = Field(
        default=None,
        description="a folder of <split>.jsonl in the field names of the task's Hugging Face data set; "
        "none: the task folder's own files, or the data set on the hub that the task names",
    )
    max_train: int | None = Field(default=None, ge=1, description="train on a random sample of this many examples")
    max_test: int | None = Field(default=None, ge=1, description="evaluate on the first so many examples only")
    validation: int = Field(
        default=200,
        ge=0,
        description="examples that the search chooses by, at most: the first of the task's own validation split, "
        "or as many taken out of the training split where it has none",
    )
    num_fewshot: int = Field(default=0, ge=0, description="solved training examples shown before each question")
    drop_overlap: bool = Field(
        default=True, description="drop training examples whose question also stands in the evaluation split"
    )
    holdout: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of the training split that becomes the test split of a task that has none",
    )

    mixture: tuple[SourceSettings, ...] = Field(
        default=(),
        description="further sources to train on; their questions that stand in a test split, of this task or of "
        "evaluate.also, or among the validation examples, are dropped",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        """`task: gsm8k` is short for `task: {name: gsm8k}`."""
        return {"name": value} if isinstance(value, str | Path) else value

    @field_validator("name", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        text = str(value) if isinstance(value, Path) else value
        if isinstance(text, str) and not text.strip():
            raise ValueError("the task has no name; give a built-in task or a folder with a task.yaml")
        return text
