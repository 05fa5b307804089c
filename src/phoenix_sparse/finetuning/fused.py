"""Triton kernels of the masked linear: what lies between its three matrix products, in as few passes over memory.

`write_effective` reads W and a bit for every weight and writes W + M⊙(s·BA): 4 1/8 bytes a weight in bfloat16, and
neither BA nor a mask of bytes ever lies in memory. `factor_gradients` reads the weight's gradient once for each factor.
On an H200 a weight of 14336x4096 takes about 60 µs for each pass; a product of 8,192 tokens with it takes 1,300 µs.

Imported only where Triton is, and where there is a GPU to run it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DENSE, BITS, WEIGHT = 0, 1, 2  # what the update is multiplied with: nothing, packed mask, W itself
LARGEST_RANK = 256
# Programs that keep the memory of the largest GPUs busy; a fixed number, so that sums are split the same everywhere.
PROGRAMS = 1024
WRITE_TILE, WRITE_WARPS = (64, 128), 8  # rows and columns
GRADIENT_TILE, GRADIENT_WARPS = (64, 64), 4  # along the side that stays, and along the side that is summed


def write_effective(weight: Tensor, gate: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + G⊙(s·BA) in W's dtype; the product is summed in float32 and rounded once.

    Args:
        weight: W, (out, in), contiguous: bfloat16, float16 or float32.
        gate: the packed mask (`masked_linear.pack_mask`), uint8 (out, ⌈in/8⌉); W itself; or None.
        a: A, (rank, in), rows contiguous.
        b: B, (out, rank), the elements of a row side by side.
        scale: s.
    """
    out = torch.empty_like(weight)
    rows, columns = weight.shape
    m, n = WRITE_TILE
    grid = (triton.cdiv(rows, m) * triton.cdiv(columns, n),)
    _write[grid](
        out,
        weight,
        weight if gate is None else gate,
        a,
        b,
        rows,
        columns,
        a.shape[0],
        0 if gate is None else gate.stride(0),
        a.stride(0),
        b.stride(0),
        scale,
        GATE=_kind(gate),
        R=_padded(a.shape[0]),
        M=m,
        N=n,
        num_warps=WRITE_WARPS,
    )
    return out


def factor_gradients(
    grad_weight: Tensor, gate: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The gradients of A and B from that of the effective weight: s·Bᵀ(G⊙∇) and s·(G⊙∇)Aᵀ, summed in float32.

    Sums are split among programs in the same way every time and added in order: the results are deterministic.

    Args:
        grad_weight: ∇, (out, in), contiguous.
        gate, a, b, scale: as in `write_effective`.

    Returns:
        float32 (rank, in) and (out, rank).
    """
    return (
        _gradient(grad_weight, gate, a, b, scale, over_rows=True),
        _gradient(grad_weight, gate, a, b, scale, over_rows=False),
    )


def _gradient(
    grad_weight: Tensor, gate: Tensor | None, a: Tensor, b: Tensor, scale: float, *, over_rows: bool
) -> Tensor:
    """s·Bᵀ(G⊙∇), a sum over the rows of ∇, or s·(G⊙∇)Aᵀ, one over its columns."""
    rows, columns = grad_weight.shape
    rank, padded = a.shape[0], _padded(a.shape[0])
    summed, left = (rows, columns) if over_rows else (columns, rows)
    # Smaller where a tile would not fit the shared memory of small GPUs.
    kept_tile, summed_tile = GRADIENT_TILE if padded <= 64 and grad_weight.itemsize == 2 else (32, 32)
    programs = triton.cdiv(left, kept_tile)
    parts, steps = _split(summed, summed_tile, programs)
    shape = (parts, rank, columns) if over_rows else (parts, rows, rank)
    partial = grad_weight.new_empty(shape, dtype=torch.float32)
    _reduce[(programs, parts)](
        partial,
        grad_weight,
        grad_weight if gate is None else gate,
        b if over_rows else a,
        rows,
        columns,
        rank,
        0 if gate is None else gate.stride(0),
        b.stride(0) if over_rows else 1,
        1 if over_rows else a.stride(0),
        scale,
        GATE=_kind(gate),
        OVER_ROWS=over_rows,
        R=padded,
        STEPS=steps,
        KEPT=kept_tile,
        SUMMED=summed_tile,
        num_warps=GRADIENT_WARPS,
    )
    return partial.sum(0) if parts > 1 else partial[0]


def _kind(gate: Tensor | None) -> int:
    if gate is None:
        return DENSE
    return BITS if gate.dtype == torch.uint8 else WEIGHT


def _padded(rank: int) -> int:
    """The tensor cores take no fewer than 16."""
    return max(16, triton.next_power_of_2(rank))


def _split(length: int, tile: int, others: int) -> tuple[int, int]:
    """Into how many parts a sum over `length` goes, and of how many tiles each."""
    tiles = triton.cdiv(length, tile)
    steps = triton.cdiv(tiles, max(1, min(triton.cdiv(PROGRAMS, others), tiles // 4)))
    return triton.cdiv(tiles, steps), steps


@triton.jit
def _gated(values, gate, m, first, inside, rows, columns, stride, GATE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values of rows m and of columns from `first` on, a multiple of 8, times the gate: a mask's bit, or the weight."""
    if GATE == 1:
        M: tl.constexpr = values.shape[0]
        N: tl.constexpr = values.shape[1]
        # Each byte is read once, and its bits are spread in registers: a load for every bit is five times as slow.
        place = first // 8 + tl.arange(0, N // 8)
        there = (m < rows)[:, None] & (place < stride)[None, :]
        byte = tl.load(gate + m[:, None] * stride + place[None, :], mask=there, other=0)
        bits = (byte[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]) & 1
        values = tl.where(tl.reshape(bits, (M, N)) != 0, values, tl.zeros_like(values))
    elif GATE == 2:
        n = first + tl.arange(0, values.shape[1])
        weight = tl.load(gate + m[:, None] * columns + n[None, :], mask=inside, other=0)
        values = (values.to(tl.float32) * weight.to(tl.float32)).to(values.dtype)
    return values


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    out,
    weight,
    gate,
    a,
    b,
    rows,
    columns,
    rank,
    stride_gate,
    stride_a,
    stride_b,
    scale,
    GATE: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    tiles = tl.cdiv(columns, N)
    m = (tl.program_id(0) // tiles).to(tl.int64) * M + tl.arange(0, M)
    first = (tl.program_id(0) % tiles) * N
    n = first + tl.arange(0, N)
    r = tl.arange(0, R)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    place = m[:, None] * columns + n[None, :]
    kept = tl.load(weight + place, mask=inside, other=0)
    left = tl.load(b + m[:, None] * stride_b + r[None, :], mask=(m < rows)[:, None] & (r < rank)[None, :], other=0)
    right = tl.load(a + r[:, None] * stride_a + n[None, :], mask=(r < rank)[:, None] & (n < columns)[None, :], other=0)
    left = (left.to(tl.float32) * scale).to(kept.dtype)
    update = tl.dot(left, right.to(kept.dtype), input_precision="ieee").to(kept.dtype)
    update = _gated(update, gate, m, first, inside, rows, columns, stride_gate, GATE)
    tl.store(out + place, (kept.to(tl.float32) + update.to(tl.float32)).to(kept.dtype), mask=inside)


@triton.jit
def _reduce(  # type: ignore[no-untyped-def]
    out,
    grad,
    gate,
    factor,
    rows,
    columns,
    rank,
    stride_gate,
    stride_summed,
    stride_rank,
    scale,
    GATE: tl.constexpr,
    OVER_ROWS: tl.constexpr,
    R: tl.constexpr,
    STEPS: tl.constexpr,
    KEPT: tl.constexpr,
    SUMMED: tl.constexpr,
):
    r = tl.arange(0, R)
    first_kept = tl.program_id(0) * KEPT
    kept = first_kept + tl.arange(0, KEPT)
    length = rows if OVER_ROWS else columns
    others = columns if OVER_ROWS else rows
    first = tl.program_id(1) * (STEPS * SUMMED)
    total = tl.zeros((KEPT, R), dtype=tl.float32)
    for step in range(STEPS):
        first_summed = first + step * SUMMED
        summed = first_summed + tl.arange(0, SUMMED)
        m = (summed if OVER_ROWS else kept).to(tl.int64)
        n = kept if OVER_ROWS else summed
        inside = (m < rows)[:, None] & (n < columns)[None, :]
        values = tl.load(grad + m[:, None] * columns + n[None, :], mask=inside, other=0)
        first_column = first_kept if OVER_ROWS else first_summed
        values = _gated(values, gate, m, first_column, inside, rows, columns, stride_gate, GATE)
        if OVER_ROWS:
            values = tl.trans(values)
        right = tl.load(
            factor + summed[:, None] * stride_summed + r[None, :] * stride_rank,
            mask=(summed < length)[:, None] & (r < rank)[None, :],
            other=0,
        )
        total += tl.dot(values, right.to(values.dtype), input_precision="ieee")
    part = tl.program_id(1).to(tl.int64)
    if OVER_ROWS:
        place = (part * rank + r[None, :]) * columns + kept[:, None]
    else:
        place = (part * rows + kept[:, None]) * rank + r[None, :]
    tl.store(out + place, total * scale, mask=(kept < others)[:, None] & (r < rank)[None, :])
