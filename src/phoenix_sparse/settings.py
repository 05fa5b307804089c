"""The base of every settings section: unknown keys are refused, values never change once checked."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator


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

    @model_validator(mode="before")
    @classmethod
    def _a_number_is_no_truth(cls, values: Any) -> Any:
        """YAML reads yes, no, on and off as true and false, which pydantic would take for 1 and 0."""
        for name, value in values.items() if isinstance(values, Mapping) else ():
            field = cls.model_fields.get(name) if isinstance(value, bool) else None
            kinds = (field.annotation, *get_args(field.annotation)) if field is not None else ()
            if bool not in kinds and (int in kinds or float in kinds):
                raise ValueError(f"{name}: {str(value).lower()} is no number; give one")
        return values
