"""What a recipe says about pruning."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.patterns import Pattern, parse_pattern
from phoenix_sparse.settings import Settings

Group = Literal["row", "layer", "global"]
Update = Literal["none", "dsnot", "sparsegpt", "alps"]
CHOOSING = ("sparsegpt", "alps")  # updates that choose the weights themselves, by scores of their own
ADJUSTED = ("unstructured", "n:m")  # kinds of patterns that updates work with
Method = Literal["uniform", "owl", "alphapruning", "evolutionary"]
LayerSparsity = Annotated[float, Field(ge=0, lt=1)]


def _adjustable(pattern: Any) -> bool:
    """Whether updates work with a pattern. One that can't be read is told by the check of its own field."""
    try:
        return pattern is None or not isinstance(pattern, str) or parse_pattern(pattern).kind in ADJUSTED
    except PhoenixError:
        return True


class CalibrationSettings(Settings):
    """The tokens on which activations are measured."""

    source: Literal["task", "text"] = Field(
        "task", description="the task's own prompts and completions, or a text file"
    )
    text: Path | None = Field(None, description="the text file (UTF-8), for source: text")
    samples: int = Field(128, ge=1, description="sequences; for gradients, examples of the task")
    length: int = Field(512, ge=8, description="tokens in a sequence")

    @model_validator(mode="after")
    def _text_has_a_file(self) -> Self:
        if (self.source == "text") != (self.text is not None):
            raise ValueError("source: text needs text: FILE, and source: task takes none")
        return self


class EvolutionSettings(Settings):
    """The search of allocation: evolutionary."""

    budget: int = Field(1000, ge=1, description="evaluations, on however few sequences")
    offspring: int = Field(32, ge=1, description="allocations tried in a generation")
    fitness: Literal["kl", "loss"] = Field("kl", description="divergence from the dense model, or the task's own loss")
    sequences: tuple[int, int, int] = Field(
        (4, 16, 64), description="calibration sequences on which all, the better and the best of them are judged"
    )
    moves: int = Field(3, ge=1, description="levels that a child moves at most")

    @field_validator("sequences", mode="before")
    @classmethod
    def _rising(cls, sequences: Any) -> Any:
        numbers = sequences if isinstance(sequences, list | tuple) else ()
        whole = len(numbers) == 3 and all(type(number) is int for number in numbers)
        if not whole or not 0 < numbers[0] <= numbers[1] <= numbers[2]:
            raise ValueError("needs three rising numbers from 1 up, such as [4, 16, 64]")
        return sequences


class SparsifySettings(Settings):
    """How the dense model is pruned."""

    sparsity: float = Field(0.5, ge=0, lt=1, description="share of zeros in the pruned linears; 1 would leave no model")
    importance: str = Field(
        "wanda",
        description="how a weight's importance is scored: magnitude, random, wanda, ria, gradient, taylor, gblm, or a "
        "registered name; the updates sparsegpt and alps have scores of their own (with allocation: evolutionary, the "
        "search scores by this one)",
    )
    update: Update = Field(
        "sparsegpt",
        description="dsnot swaps kept weights, sparsegpt and alps choose them and adjust those that stay; where it "
        "isn't given, it is none if an importance, a group, blocks or structured are, and else sparsegpt",
    )
    pattern: str = Field("unstructured", description="unstructured, N:M (2:4 keeps 2 of 4), 16x1 blocks, or structured")
    group: Group | None = Field(
        None,
        description="weights that compete with each other: those of an output row, of a layer, or of the whole model; "
        "row for wanda and gblm (and what was registered per_row), layer for the others, unless given",
    )
    allocation: Method | dict[str, LayerSparsity] | tuple[LayerSparsity, ...] = Field(
        "uniform",
        description="how the sparsity is shared out: uniform, owl, alphapruning, evolutionary, a sparsity by pattern "
        'of layer names ({"*.o_proj": 0.4}; the others share what is left), or one for each decoder block',
    )
    evolution: EvolutionSettings = EvolutionSettings()
    calibration: CalibrationSettings = CalibrationSettings()

    @model_validator(mode="before")
    @classmethod
    def _update_where_none_is_named(cls, values: Any) -> Any:
        """Leave the default where the weights are to be chosen by scores, or by a pattern that it can't prune to."""
        if not isinstance(values, Mapping) or "update" in values:
            return values
        by_scores = "importance" in values or values.get("group") is not None
        return {**values, "update": "none"} if by_scores or not _adjustable(values.get("pattern")) else values

    @field_validator("importance")
    @classmethod
    def _known(cls, name: str) -> str:
        from phoenix_sparse.pruning.importance import find_importance

        try:
            find_importance(name)
        except PhoenixError as error:  # told with the field, like all that pydantic finds
            raise ValueError(str(error).removeprefix("importance: ")) from error
        return name

    @field_validator("pattern")
    @classmethod
    def _readable(cls, text: str) -> str:
        try:
            parse_pattern(text)
        except PhoenixError as error:
            raise ValueError(str(error).removeprefix("sparsify.pattern: ")) from error
        return text

    @field_validator("allocation", mode="before")
    @classmethod
    def _one_of_three(cls, value: Any) -> Any:
        """Say at once what is wrong, instead of once for each kind of value."""
        kinds = (
            f"{', '.join(get_args(Method))}, a sparsity by pattern of layer names such as {{'*.o_proj': 0.4}}, or one "
            "for each decoder block such as [0.4, 0.6]"
        )
        if isinstance(value, str) and value in get_args(Method):
            return value
        if isinstance(value, Mapping) and value:
            given = dict(value)
        elif isinstance(value, list | tuple):
            given = {f"block {index}": one for index, one in enumerate(value)}
        else:
            raise ValueError(f"use {kinds}")
        for name, one in given.items():
            if not isinstance(name, str) or isinstance(one, bool) or not isinstance(one, int | float):
                raise ValueError(f"{name!r} is given {one!r}; use {kinds}")
            if not 0 <= one < 1:
                raise ValueError(f"{name!r} is given {one!r}; a sparsity is from 0 to below 1")
        return value

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        # What mends it is told by the word to leave out: a value to set instead could not be set for a comparison.
        kind = self.parsed_pattern.kind
        allocation = self.allocation if isinstance(self.allocation, str) else "allocation"
        if kind == "n:m" and abs(self.sparsity - self.parsed_pattern.sparsity) > 0.005:
            raise ValueError(
                f"pattern: {self.pattern} is sparsity {self.parsed_pattern.sparsity:.4g}; set sparsity to that"
            )
        if kind != "unstructured" and self.group is not None:
            raise ValueError(f"group: the pattern {self.pattern} has its own; leave group out")
        if kind in ("n:m", "structured") and self.allocation != "uniform":
            raise ValueError(
                f"allocation: the pattern {self.pattern} gives each layer its share; leave {allocation} out"
            )
        if self.update != "none" and kind not in ADJUSTED:
            raise ValueError(f"update: {self.update} works with unstructured and N:M patterns; leave {self.update} out")
        if self.group == "global":
            others = [name for name in (self.update, allocation) if name not in ("none", "uniform")]
            if others:
                raise ValueError(
                    f"group: global shares out by one threshold; leave group out, or {' and '.join(others)}"
                )
        if self.group is not None and self.update in CHOOSING:
            raise ValueError(f"group: {self.update} compares in its own way; leave group out, or {self.update}")
        return self

    @property
    def idle(self) -> dict[str, str]:
        """The sections that were changed and that nothing looks at, each with what is wrong and what would be right.

        Not a check of the settings themselves: a sweep's base and a comparison have them for whichever run uses them.
        """
        found = {}
        if self.evolution != EvolutionSettings() and not self.uses("evolution"):
            found["evolution"] = (
                f"it is for allocation=evolutionary, and this one is {self.allocation}; set that, or "
                "leave evolution out"
            )
        if self.calibration != CalibrationSettings() and not self.uses("calibration"):
            found["calibration"] = (
                f"{self.importance} measures nothing on it; leave calibration out, or prune by what does, such as wanda"
            )
        elif self.calibration.text is not None and not self.reads_tokens:
            found["calibration"] = (
                f"the gradients of {self.importance} are of the task's examples, not of a text; leave source and "
                "text out"
            )
        return found

    def uses(self, section: str) -> bool:
        """Whether anything of it looks at `evolution` or `calibration`."""
        if section == "evolution":
            return self.allocation == "evolutionary"
        return self.reads_tokens or self.reads_gradients

    def require_used(self, where: str) -> None:
        """Refuse settings that do nothing.

        Raises:
            PhoenixError: naming the first section that is idle.
        """
        for section, why in self.idle.items():
            raise PhoenixError(f"{where}{section}: {why}")

    @property
    def parsed_pattern(self) -> Pattern:
        return parse_pattern(self.pattern)

    @property
    def comparison_group(self) -> Group:
        if self.parsed_pattern.kind != "unstructured":
            return "layer"
        if self.group is not None:
            return self.group
        from phoenix_sparse.pruning.importance import find_importance

        by_row = find_importance(self.importance).per_row and self.update not in CHOOSING
        return "row" if by_row else "layer"

    @property
    def scored_by(self) -> str | None:
        """The importance that counts; None where the update has scores of its own, and nothing else asks for one."""
        return None if self.update in CHOOSING and self.allocation != "evolutionary" else self.importance

    @property
    def reads_tokens(self) -> bool:
        """Whether anything of it is measured on calibration tokens."""
        from phoenix_sparse.pruning.importance import find_importance

        return (
            find_importance(self.importance).inputs
            or self.update != "none"
            or self.allocation in ("owl", "evolutionary")
        )

    @property
    def reads_gradients(self) -> bool:
        """Whether the task's loss has to be differentiated."""
        from phoenix_sparse.pruning.importance import find_importance

        return find_importance(self.importance).gradients and self.scored_by is not None
