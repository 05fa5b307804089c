"""What the task.yaml of a user's folder may say: a part of lm-eval's keys, none of which runs or fetches code.

One default is not lm-eval's: where a generated answer has no filter, the blanks around it are removed before it is
compared. Completions begin with the delimiter, and with tokenizers that keep blanks (all but SentencePiece's) every
right answer would count as wrong.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.settings import Settings
from phoenix_sparse.tasks.templates import check_template


def _check_regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression ({error})") from error
    return pattern


def _check_template(template: str) -> str:
    try:
        check_template(template)
    except PhoenixError as error:
        raise ValueError(str(error)) from error
    return template


Regex = Annotated[str, AfterValidator(_check_regex)]
Template = Annotated[str, AfterValidator(_check_template)]
SplitName = Annotated[str, Field(pattern=r"^\w[\w-]*$")]  # it becomes a file name


class Filter(Settings):
    function: Literal["regex", "take_first", "remove_whitespace", "lowercase", "uppercase"]
    regex_pattern: Regex | None = None
    group_select: int | None = None
    fallback: str | None = None


class FilterList(Settings):
    name: str = Field(pattern=r"^[\w-]+$")
    filter: list[Filter]


class Metric(Settings):
    """The mean of zeros and ones."""

    metric: Literal["acc", "acc_norm", "exact_match"]
    aggregation: Literal["mean"] = "mean"
    higher_is_better: Literal[True] = True
    ignore_case: bool | None = None
    ignore_punctuation: bool | None = None
    ignore_numbers: bool | None = None
    regexes_to_ignore: list[Regex] | None = None


class Generation(Settings):
    """Greedy decoding up to a stop text or a number of tokens."""

    until: list[str] = Field(min_length=1)
    max_gen_toks: int = Field(default=256, ge=1)
    do_sample: Literal[False] = False
    temperature: Literal[0] = 0


PLAIN_ANSWER = FilterList(
    name="none", filter=[Filter(function="remove_whitespace"), Filter(function="take_first")]
)  # lm-eval's name for the filter of a task without one


class FolderTask(Settings):
    """A task.yaml."""

    task: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    output_type: Literal["generate_until", "multiple_choice"]
    doc_to_text: Template
    doc_to_target: Template
    doc_to_choice: Template | list[str] | None = None
    description: Template | None = None
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"
    dataset_path: str | None = None
    dataset_name: str | None = None
    training_split: SplitName | None = None
    validation_split: SplitName | None = None
    test_split: SplitName | None = None
    generation_kwargs: Generation | None = None
    filter_list: list[FilterList] | None = Field(default=None, min_length=1)
    metric_list: list[Metric] = Field(min_length=1)
    metadata: dict[str, Any] = Field(default_factory=dict)

    @field_validator("dataset_path")
    @classmethod
    def _is_on_the_hub(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
            raise ValueError(
                f"{value!r} is no data set on the hub, such as openai/gsm8k; for files of your own leave dataset_path "
                "out and put train.jsonl and test.jsonl beside task.yaml"
            )
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> "FolderTask":
        choice = self.output_type == "multiple_choice"
        if choice and not self.doc_to_choice:
            raise ValueError("a multiple_choice task needs doc_to_choice")
        if not choice and self.generation_kwargs is None:
            raise ValueError("a generate_until task needs generation_kwargs with until and max_gen_toks")
        if choice and self.generation_kwargs is not None:
            raise ValueError("a multiple_choice task generates nothing; remove generation_kwargs")
        for entry in self.metric_list:
            if (entry.metric == "exact_match") == choice:
                raise ValueError(f"the metric {entry.metric} doesn't fit the output_type {self.output_type}")
        for key, kind in (("phoenix_metric", str), ("phoenix_fields", list), ("phoenix_rename", dict)):
            if not isinstance(self.metadata.get(key, kind()), kind):
                raise ValueError(f"metadata.{key} should be a {kind.__name__}")
        return self


def check_folder_task(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Check a task.yaml and give it back with its defaults.

    Raises:
        PhoenixError: a key is unknown, missing or wrong; the first such.
    """
    try:
        task = FolderTask(**config)
        if task.output_type == "generate_until" and task.filter_list is None:
            task = task.model_copy(update={"filter_list": [PLAIN_ANSWER]})
        return task.model_dump(exclude_none=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "list[")))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
            message = f"not a key of a task folder ({', '.join(FolderTask.model_fields)})"
        raise PhoenixError(f"{path}: {place + ': ' if place else ''}{message}") from error
