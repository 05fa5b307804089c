"""What all steps share: their common options, the machine that they compute on, and what a model has room for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from phoenix_sparse.masks import Masks, load_mask
from phoenix_sparse.models import fit_tokenizer, load_config, load_model, load_tokenizer
from phoenix_sparse.progress import Progress
from phoenix_sparse.settings import Device, Dtype, Settings


class Common(Settings):
    """Options that every step has."""

    dtype: Dtype = "auto"
    device: Device = "auto"
    seed: int = Field(0, ge=0, lt=2**32)


@dataclass(frozen=True)
class Machine:
    """How models are loaded and where they compute."""

    dtype: Dtype = "auto"
    device: Device = "auto"
    seed: int = 0
    progress: Progress | None = None

    def load(self, directory: Path) -> Any:
        return load_model(directory, self.dtype, self.device)

    def open(self, directory: Path) -> tuple[Any, Any]:
        """A model with its tokenizer."""
        model, tokenizer = self.load(directory), load_tokenizer(directory)
        fit_tokenizer(model, tokenizer, directory)
        return model, tokenizer


def read_masks(path: Path) -> Masks:
    return load_mask(path)[0]


def longest(source: Path) -> int:
    """Tokens that the model has positions for."""
    return int(getattr(load_config(source), "max_position_embeddings", 2**30))
