"""What a sliced matrix is made of: the layout for matrices with few values."""

from dataclasses import dataclass

import torch
from torch import Tensor

PLACES, ROWS, UNIT = 64, 16, 16  # of a step; of a slice; columns that windows move by (csrc/sliced.h)
VALUES = (torch.bfloat16, torch.int8)
MOST_COLUMNS = UNIT * 2**16


@dataclass
class Slices:
    """A matrix (out, in) whose rows are walked along sixteen at a time, a slice (csrc/sliced.h).

    Attributes:
        steps: uint8 (steps, 64 + 64 · bytes of a value): positions, then values, which are bfloat16,
            or int8 but not -128.
        windows: int16 (steps,), read as unsigned: where a step's window of columns begins, in sixteens.
        starts: int64 (slices + 1): the first step of each slice, and at last their number.
        order: int32 (out,): the rows, sixteen to a slice.
        columns: in.
    """

    steps: Tensor
    windows: Tensor
    starts: Tensor
    order: Tensor
    columns: int

    @property
    def values(self) -> torch.dtype:
        return torch.int8 if self.steps.shape[1] == 2 * PLACES else torch.bfloat16

    @property
    def places(self) -> int:
        """For values; those that stay empty count."""
        return len(self.windows) * PLACES
