"""Matrices with few values: slices made of packed ones and taken apart again."""

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.kernels.choice import slices_pay
from phoenix_sparse.runtime.kernels.library import Library, library
from phoenix_sparse.runtime.kernels.placing import reserve
from phoenix_sparse.runtime.kernels.slices import MOST_COLUMNS, PLACES, ROWS, VALUES, Slices


def slice_if_faster(bitmask: Tensor, values: Tensor, row_offsets: Tensor, columns: int) -> Slices | None:
    """The slices of a packed matrix where products are faster with them (`choice.slices_pay`), else None.

    Args:
        bitmask: uint8 (out, ⌈in/8⌉) of a matrix that `checking.check` has passed.
        values: (nnz,) of any dtype that can be packed.
        row_offsets: int64 (out + 1).
        columns: in.
    """
    if bitmask.device.type != "cpu" or values.dtype not in VALUES or not 0 < columns <= MOST_COLUMNS:
        return None
    compiled, weights = library(), bitmask.shape[0] * columns
    # Places are never fewer than values: most matrices need not be counted through.
    if compiled is None or not compiled.has_sliced or not slices_pay(values.dtype, weights, values.numel()):
        return None
    counted = count_steps(compiled, bitmask, values, row_offsets, columns)
    if not slices_pay(values.dtype, weights, int(counted.starts[-1]) * PLACES):
        return None
    # Slices have no code for it. Phoenix packs no such value, others may.
    if values.dtype == torch.int8 and bool((values == -128).any()):
        return None
    return fill(compiled, bitmask, values, row_offsets, counted)


def count_steps(compiled: Library, bitmask: Tensor, values: Tensor, row_offsets: Tensor, columns: int) -> Slices:
    """Slices of which only `starts` and `order` are filled; `fill` does the rest."""
    # Rows of like counts beside each other: a slice takes as many steps as its longest row.
    order = row_offsets.diff().argsort(stable=True).int()
    starts = torch.zeros((len(order) + ROWS - 1) // ROWS + 1, dtype=torch.int64)
    steps = torch.empty(0, PLACES * (1 + values.element_size()), dtype=torch.uint8)
    slices = Slices(steps, torch.empty(0, dtype=torch.int16), starts, order, columns)
    compiled.slice(bitmask, values, row_offsets, slices, count=True)
    slices.starts = starts.cumsum(0)
    return slices


def fill(compiled: Library, bitmask: Tensor, values: Tensor, row_offsets: Tensor, counted: Slices) -> Slices:
    """The slices of a packed matrix, as `count_steps` counted them, on huge pages."""
    steps = reserve((int(counted.starts[-1]), counted.steps.shape[1]), torch.uint8)
    windows = torch.empty(len(steps), dtype=torch.int16)
    slices = Slices(steps, windows, counted.starts, counted.order, counted.columns)
    compiled.slice(bitmask, values, row_offsets, slices)
    return slices


def unslice(slices: Slices) -> tuple[Tensor, Tensor, Tensor]:
    """Bitmask, values and row offsets, as they were before.

    Raises:
        PhoenixError: the compiled kernels aren't here.
    """
    compiled = library()
    if compiled is None:
        raise PhoenixError("sparse_linear: this weight's layout needs the compiled kernels; load the model again")
    rows = slices.order.numel()
    counts = torch.zeros(rows + 1, dtype=torch.int64)
    compiled.unslice(slices, counts)
    offsets = counts.cumsum(0)
    bitmask = torch.zeros(rows, (slices.columns + 7) // 8, dtype=torch.uint8)
    values = torch.empty(int(offsets[-1]), dtype=slices.values)
    compiled.unslice(slices, offsets, bitmask, values)
    return bitmask, values, offsets
