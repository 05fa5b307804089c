"""y = x Wᵀ on the GPU with a layout of W, and W's expansion: checks, memory to work in, and launches."""

import ctypes

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.cuda.compiling import kernel
from phoenix_sparse.runtime.cuda.layout import PER_STREAM, TILE_COLUMNS, TILE_ROWS, TOGETHER, Layout

MOST = 32  # rows of x in one launch
SLOTS, ROW = 8, 128  # as in kernels.cu, where a slot is two rows
FLOATS = (torch.bfloat16, torch.float16)


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("rows", "columns", "batch", "tiles", "blocks", "groups", "slabs")]


def shape_of(layout: Layout, batch: int) -> _Shape:
    return _Shape(*layout.shape, batch, layout.tiles, layout.blocks, layout.groups, layout.slabs)


def macros(layout: Layout, eights: int) -> dict[str, int]:
    half = int(layout.values.dtype == torch.float16)
    return {"HALF": half, "NT": eights, "NW": layout.warps_per_block, "DEPTH": layout.depth, "RING": layout.ring}


def shared_bytes(warps: int, ring: int, batch: int = 0) -> int:
    """Shared memory that a block of threads needs: rings and bitmaps, and sums of so many rows of x (0: none)."""
    return warps * ((ring + PER_STREAM + 2 * SLOTS) * ROW + batch * TOGETHER * TILE_ROWS * 4)


def multiply(x: Tensor, layout: Layout, scales: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x (batch, in) · Wᵀ, summed in float32 in an order that never changes.

    Args:
        x: (batch, in) in the layout's dtype, batch at most `MOST`.
        layout: W (out, in).
        scales: float32 (out,), or None.
        bias: float32 (out,), or None.

    Returns:
        (batch, out) in x's dtype.

    Raises:
        PhoenixError: x doesn't fit the layout.
    """
    out, columns = layout.shape
    batch = x.shape[0]
    if x.dim() != 2 or x.shape[1] != columns or x.dtype != layout.values.dtype or x.device != layout.values.device:
        raise PhoenixError(
            f"sparse_linear: x is {x.dtype} {tuple(x.shape)} on {x.device}; the weight takes {layout.values.dtype} "
            f"(batch, {columns}) on {layout.values.device}"
        )
    if x.device.type != "cuda":
        raise PhoenixError(f"sparse_linear: this layout is a GPU's, and x is on {x.device}; load the model on the GPU")
    if not 1 <= batch <= MOST:
        raise PhoenixError(f"sparse_linear: {batch} rows in one launch; give 1 to {MOST}")
    padding = -columns % TILE_COLUMNS
    x = torch.nn.functional.pad(x, (0, padding)) if padding else x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    y = x.new_empty(batch, out)
    sums = None
    if layout.slabs > 1:
        sums = torch.empty(layout.slabs * batch * out, dtype=torch.float32, device=x.device)
    eights = -(-batch // 8)
    eights = 4 if eights == 3 else eights  # kernels for 8, 16 and 32 rows
    options = macros(layout, eights)
    shared = shared_bytes(layout.warps_per_block, layout.ring, eights * 8)
    run = kernel("phx_linear", x.device, tuple(options.items()), shared)
    run(
        layout.groups * layout.slabs,
        layout.values,
        layout.bitmaps,
        layout.headers,
        layout.warps,
        x,
        scales,
        bias,
        y,
        sums,
        layout.counters,
        shape_of(layout, batch),
    )
    return y


def expand(layout: Layout, dense: Tensor | None = None) -> Tensor:
    """W (out, in) itself.

    Args:
        layout: of W.
        dense: memory to write to, at least out · (in rounded up to 128) values of the layout's dtype; new unless given.
    """
    out, columns = layout.shape
    width = layout.blocks * TILE_COLUMNS
    if dense is None:
        dense = torch.empty(out * width, dtype=layout.values.dtype, device=layout.values.device)
    run = kernel(
        "phx_expand", dense.device, tuple(macros(layout, 1).items()), shared_bytes(layout.warps_per_block, layout.ring)
    )
    run(
        layout.groups * layout.slabs,
        layout.values,
        layout.bitmaps,
        layout.headers,
        layout.warps,
        dense,
        shape_of(layout, 1),
    )
    return dense.view(-1)[: out * width].view(out, width)[:, :columns]
