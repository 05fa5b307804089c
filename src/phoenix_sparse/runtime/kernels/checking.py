"""Whether arrays are a packed matrix: kernels follow offsets and bits wherever they lead."""

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.kernels import portable
from phoenix_sparse.runtime.kernels.library import library

VALUES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
SCALES = (torch.float32, torch.bfloat16)


def check(
    bitmask: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    columns: int,
    scales: Tensor | None = None,
    where: str = "packed weight",
) -> None:
    """Refuse anything but a packed matrix. What passed is safe with `sparse_linear`, as long as nobody writes to it.

    Args:
        bitmask: uint8 (out, ⌈columns/8⌉).
        values: (nnz,) float32, bfloat16, float16 or int8.
        row_offsets: int64 (out + 1).
        columns: of the matrix.
        scales: (out,) float32 or bfloat16 for int8 values, else None.
        where: what the message begins with, a layer's name for example.

    Raises:
        PhoenixError: saying what is wrong.
    """
    form = wrong_form(bitmask, values, row_offsets, columns, scales)
    if form:
        raise PhoenixError(f"{where}: {form}; pack the model again")
    compiled = library() if bitmask.device.type == "cpu" else None
    wrong, row = (compiled or portable).check(bitmask, row_offsets, columns, values.numel())
    if wrong:
        message = {
            1: f"row_offsets begin with {int(row_offsets[0])} instead of 0",
            2: f"row_offsets fall at row {row}",
            3: f"row {row} has another number of bits than its row_offsets say",
            4: f"row {row} of the bitmask has bits beyond column {columns - 1}",
            5: f"row_offsets end at {int(row_offsets[-1])}, but there are {values.numel()} values",
        }[wrong]
        raise PhoenixError(f"{where}: {message}; pack the model again")


def wrong_form(bitmask: Tensor, values: Tensor, row_offsets: Tensor, columns: int, scales: Tensor | None) -> str | None:
    """What is wrong with dtypes, shapes, places and order in memory, or None. It reads no element."""
    if bitmask.dtype != torch.uint8 or bitmask.dim() != 2 or bitmask.shape[1] != (columns + 7) // 8:
        return f"the bitmask of {columns} columns is {_is(bitmask)}, not uint8 (out, {(columns + 7) // 8})"
    rows = bitmask.shape[0]
    if row_offsets.dtype != torch.int64 or row_offsets.shape != (rows + 1,):
        return f"row_offsets are {_is(row_offsets)}, not int64 ({rows + 1},)"
    if values.dtype not in VALUES or values.dim() != 1:
        return f"values are {_is(values)}, not float32, bfloat16, float16 or int8 in one dimension"
    if (values.dtype == torch.int8) != (scales is not None):
        return "scales belong to int8 values, and only to them"
    if scales is not None and (scales.dtype not in SCALES or scales.shape != (rows,)):
        return f"scales are {_is(scales)}, not float32 or bfloat16 ({rows},)"
    for part in (values, row_offsets, scales):
        if part is not None and part.device != bitmask.device:
            return f"parts of it are on {bitmask.device} and {part.device}"
    parts = (bitmask, values, row_offsets, scales)
    if not all(part is None or part.is_contiguous() for part in parts):
        return "parts of it are not contiguous"
    return None


def _is(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
