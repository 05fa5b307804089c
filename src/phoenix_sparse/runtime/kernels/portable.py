"""Packed weights with nothing but torch: unpack, then multiply. For GPUs, for want of kernels, and to compare with."""

import torch
from torch import Tensor

PLACES = tuple(range(8))


def unpack(bitmask: Tensor, values: Tensor, row_offsets: Tensor, columns: int) -> Tensor:
    """The dense matrix (out, columns), in the values' dtype, without scales.

    Args:
        bitmask: uint8 (out, ⌈columns/8⌉).
        values: (nnz,).
        row_offsets: int64 (out + 1); the bitmask alone says where values go.
        columns: of the matrix.
    """
    del row_offsets
    places = torch.tensor(PLACES, dtype=torch.uint8, device=bitmask.device)
    kept = ((bitmask[:, :, None] >> places) & 1).flatten(1)[:, :columns].bool()
    dense = torch.zeros(kept.shape, dtype=values.dtype, device=values.device)
    return dense.masked_scatter_(kept, values)


def product_dtype(x: torch.dtype, values: torch.dtype) -> torch.dtype:
    """What activations and weights are multiplied in: bfloat16 where it holds both exactly, else float32 or float64."""
    exact = x == torch.bfloat16 and values in (torch.bfloat16, torch.int8)
    return torch.bfloat16 if exact else wide_dtype(x)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are taken in: float32, and float64 where that is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear(
    x: Tensor,
    bitmask: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`sparse_linear`, on any device."""
    dtype = product_dtype(x.dtype, values.dtype)
    dense = unpack(bitmask, values, row_offsets, x.shape[-1]).to(dtype)
    return finish(torch.nn.functional.linear(x.to(dtype), dense), scales, bias, x.dtype)


def finish(y: Tensor, scales: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y · scales + bias, in float32 (float64 for a y in it), rounded to `dtype`."""
    wide = wide_dtype(y.dtype)
    if scales is not None:
        y = y.to(wide) * scales.to(wide)
    if bias is not None:
        y = y.to(wide) + bias.to(wide)
    return y.to(dtype)


def check(bitmask: Tensor, row_offsets: Tensor, columns: int, count: int) -> tuple[int, int]:
    """What `Library.check` tells, in torch: (wrong, row)."""
    if int(row_offsets[0]) != 0:
        return 1, 0
    if int(row_offsets[-1]) != count:
        return 5, 0
    ones = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8, device=bitmask.device)
    found = torch.stack([ones[row.int()].sum() for row in bitmask]) if len(bitmask) else row_offsets[:0]
    falls = row_offsets[1:] < row_offsets[:-1]
    beyond = torch.zeros_like(falls)
    if columns % 8:
        beyond = (bitmask[:, -1].int() >> (columns % 8)) != 0
    # Offsets of a hostile file may lie further apart than int64 holds; then they fall somewhere, or aren't `found`.
    differs = row_offsets.diff() != found
    wrong = torch.where(falls, 2, torch.where(beyond, 4, torch.where(differs, 3, 0)))
    rows = wrong.nonzero()
    return (int(wrong[rows[0]]), int(rows[0])) if len(rows) else (0, 0)
