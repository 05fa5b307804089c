"""y = x Wᵀ on the GPU with a layout of W, and W's expansion: checks, memory to work in, and launches."""

import ctypes

import torch
from torch import Tensor

from phoenix_sparse.runtime.cuda.compiling import Kernel, kernel
from phoenix_sparse.runtime.cuda.layout import TAIL, TILE_COLUMNS, TILE_ROWS, Layout
from phoenix_sparse.runtime.cuda.operands import check

ROW, SLOTS = 128, 8  # as in tiles.cu: bytes of a row; bitmaps, two rows each, and one row of headers

AREA = {0: 0, 1: 6144, 2: 8192, 4: 8192}
"""Bytes of shared memory that a warp needs for x and sums, by eights of rows of x: X_BYTES and SUMS_BYTES of tiles.cu,
the larger of them where they share their place."""


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("rows", "columns", "batch", "tiles", "blocks", "groups", "slabs")]


def shape_of(layout: Layout, batch: int) -> _Shape:
    return _Shape(*layout.shape, batch, layout.tiles, layout.blocks, layout.groups, layout.slabs)


def macros(layout: Layout, eights: int) -> dict[str, int]:
    return {
        "HALF": layout.half,
        "INT8": int(layout.int8),
        "NT": eights,
        "NW": layout.warps_per_block,
        "DEPTH": layout.depth,
        "RING": layout.ring,
    }


def shared_bytes(warps: int, ring: int, batch: int = 0, tail: int = max(TAIL.values())) -> int:
    """Shared memory that a block of threads needs: rings and so many rows of them twice, bitmaps, and sums of so many
    rows of x (0: none)."""
    return warps * ((ring + tail + 2 * SLOTS + 1) * ROW + AREA[-(-batch // 8)])


def _kernel(name: str, layout: Layout, eights: int, batch: int) -> Kernel:
    device, warps = layout.values.device, layout.warps_per_block
    options = tuple(macros(layout, eights).items())
    return kernel(name, device, options, warps * 32, shared_bytes(warps, layout.ring, batch, layout.tail))


def multiply(x: Tensor, layout: Layout, scales: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x (batch, in) · Wᵀ, summed in float32 in an order that never changes.

    Args:
        x: (batch, in) in the dtype of the layout's products, batch at most `operands.MOST`.
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
    check(x, layout.shape, layout.dtype, layout.values.device)
    padding = -columns % TILE_COLUMNS
    x = torch.nn.functional.pad(x, (0, padding)) if padding else x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    y = x.new_empty(batch, out)
    sums = None
    if layout.slabs > 1:
        sums = torch.empty(layout.slabs * batch * layout.tiles * TILE_ROWS, dtype=torch.float32, device=x.device)
    eights = -(-batch // 8)
    eights = 4 if eights == 3 else eights  # kernels for 8, 16 and 32 rows
    run = _kernel("phx_linear", layout, eights, eights * 8)
    run(
        layout.groups * layout.slabs,
        layout.values,
        layout.bitmaps,
        layout.headers,
        layout.warps,
        layout.offsets,
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
        dense: memory to write to, at least out · (in rounded up to 128) values of `layout.dtype`; new unless given.
    """
    out, columns = layout.shape
    width = layout.blocks * TILE_COLUMNS
    if dense is None:
        dense = torch.empty(out * width, dtype=layout.dtype, device=layout.values.device)
    run = _kernel("phx_expand", layout, 1, 0)
    run(
        layout.groups * layout.slabs,
        layout.values,
        layout.bitmaps,
        layout.headers,
        layout.warps,
        layout.offsets,
        dense,
        shape_of(layout, 1),
    )
    return dense.view(-1)[: out * width].view(out, width)[:, :columns]
