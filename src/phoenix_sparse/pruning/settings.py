"""What a recipe says about pruning."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from phoenix_sparse.settings import Settings

Importance = Literal["wanda", "magnitude", "random"]
Group = Literal["row", "layer", "global"]


class CalibrationSettings(Settings):
    """The tokens on which activations are measured."""

    source: Literal["task", "text"] = Field(
        "task", description="the task's own prompts and completions, or a text file"
    )
    text: Path | None = Field(None, description="the text file (UTF-8), for source: text")
    samples: int = Field(128, ge=1, description="sequences")
    length: int = Field(512, ge=8, description="tokens in a sequence")

    @model_validator(mode="after")
    def _text_has_a_file(self) -> Self:
        if (self.source == "text") != (self.text is not None):
            raise ValueError("source: text needs text: FILE, and source: task takes none")
        return self


class SparsifySettings(Settings):
    """How the dense model is pruned."""

    sparsity: float = Field(0.5, ge=0, lt=1, description="share of zeros in the pruned linears; 1 would leave no model")
    importance: Importance = Field("wanda", description="how a weight's importance is scored")
    group: Group | None = Field(
        None,
        description="weights that compete with each other: those of an output row, of a layer, or of the whole model; "
        "row for wanda and layer for the others, unless given",
    )
    allocation: Literal["uniform"] = Field("uniform", description="how the sparsity is shared out among layers")
    calibration: CalibrationSettings = CalibrationSettings()

    @property
    def comparison_group(self) -> Group:
        return self.group or ("row" if self.importance == "wanda" else "layer")
