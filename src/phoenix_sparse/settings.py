"""The base of every settings section: unknown keys are refused, values never change once checked."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict


def _names_a_directory(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError("use letters, digits, dots, dashes and underscores, such as llama-gsm8k-50")
    return name


DirectoryName = Annotated[str, AfterValidator(_names_a_directory)]
Dtype = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]


class Settings(BaseModel):
    """A section of a recipe. It lives beside the code that it configures."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
