"""The base of every settings section: unknown keys are refused, values never change once checked."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Dtype = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]


class Settings(BaseModel):
    """A section of a recipe. It lives beside the code that it configures."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
