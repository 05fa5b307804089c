"""y = x Wᵀ on the GPU with a very sparse W in the layout of scattered.py, and W's expansion."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from phoenix_sparse.runtime.cuda.compiling import Kernel, kernel, most_shared
from phoenix_sparse.runtime.cuda.operands import check
from phoenix_sparse.runtime.cuda.scattered import Plan, Scattered

SOURCE = Path(__file__).with_name("scattered.cu")
TOGETHER = (1, 2, 4, 8, 16)  # rows of x that a launch can take
EVEN = 128  # an expanded matrix's rows are this many columns, or a multiple


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("rows", "columns", "batch", "pitch", "slabs", "pieces")]


@cache
def plan_for(device: torch.device) -> Plan:
    """The plan that fits a GPU."""
    return Plan(torch.cuda.get_device_properties(device).multi_processor_count, shared=most_shared(device))


def shape_of(layout: Scattered, batch: int, pitch: int) -> _Shape:
    return _Shape(*layout.shape, batch, pitch, layout.slabs, layout.pieces)


def macros(layout: Scattered, batch: int) -> dict[str, int]:
    """As scattered.cu lists them, for at least so many rows of x."""
    half = int(layout.values.dtype == torch.float16)
    together = next(rows for rows in TOGETHER if rows >= batch)
    return {"HALF": half, "NB": together, "NW": layout.warps_per_block, "WIDTH": layout.width}


def _kernel(name: str, layout: Scattered, batch: int = 0) -> Kernel:
    """The function for so many rows of x; 0: for none."""
    device = layout.values.device
    options = macros(layout, max(batch, 1))
    shared = layout.width * max(4, 2 * options["NB"]) if batch else 0
    return kernel(name, device, tuple(options.items()), layout.warps_per_block * 32, shared, SOURCE)


def multiply(x: Tensor, layout: Scattered, scales: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x (batch, in) · Wᵀ, summed in float32 in an order that never changes.

    Args:
        x: (batch, in) in the layout's dtype, batch at most `operands.MOST`.
        layout: W (out, in).
        scales: float32 (out,), or None.
        bias: float32 (out,), or None.

    Returns:
        (batch, out) in x's dtype.

    Raises:
        PhoenixError: x doesn't fit the layout.
    """
    out = layout.shape[0]
    check(x, layout.shape, layout.dtype, layout.values.device)
    x = padded(x)
    y = x.new_empty(len(x), out)
    parts = None
    if layout.slabs > 1:
        parts = torch.empty(layout.slabs * min(len(x), TOGETHER[-1]) * out, dtype=torch.float32, device=x.device)
    for first in range(0, len(x), TOGETHER[-1]):
        some = x[first : first + TOGETHER[-1]]
        run = _kernel("phx_scattered", layout, len(some))
        run(
            layout.grid,
            layout.values,
            layout.deltas,
            layout.starts,
            layout.rows,
            layout.lengths,
            layout.warps,
            some,
            scales,
            bias,
            y[first : first + TOGETHER[-1]],
            parts,
            layout.counters,
            shape_of(layout, len(some), x.shape[1]),
        )
    return y


def padded(x: Tensor) -> Tensor:
    """x with an even number of columns, its rows one after another, for pairs of columns to be read at once."""
    x = torch.nn.functional.pad(x, (0, 1)) if x.shape[1] % 2 else x.contiguous()
    return x.clone() if x.data_ptr() % 4 else x


def expand(layout: Scattered, dense: Tensor | None = None) -> Tensor:
    """W (out, in) itself.

    Args:
        layout: of W.
        dense: memory to write to, at least out · (in rounded up to 128) values of the layout's dtype; new unless given.
    """
    out, columns = layout.shape
    pitch = -(-columns // EVEN) * EVEN
    if dense is None:
        dense = torch.empty(out * pitch, dtype=layout.values.dtype, device=layout.values.device)
    memory = dense.view(-1)[: out * pitch]
    run = _kernel("phx_scattered_expand", layout)
    run(
        layout.grid,
        layout.values,
        layout.deltas,
        layout.starts,
        layout.rows,
        layout.lengths,
        layout.warps,
        memory,
        shape_of(layout, 1, pitch),
    )
    return memory.view(out, pitch)[:, :columns]
