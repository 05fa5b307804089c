"""What is faster. For many rows of x: the sparse kernels, or unpacking and torch's dense product; measured, once. For
few values: slices instead of a bitmap; measured beforehand. For a dense matrix: torch or our kernel; measured, once.
"""

import math
import os
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from phoenix_sparse.runtime.kernels.library import Library

VARIABLE = "PHOENIX_TIMING"
FEWEST = 9  # rows of x below which unpacking can't pay
MOST = 256  # rows of x beyond which the comparison no longer changes

SHAPE = (1024, 2048)  # of the weight that is timed
ROUNDS = 3

SLICED = {torch.bfloat16: 0.22, torch.int8: 0.26}
"""Places of the slices for each weight up to which a product from memory with one row of x is no slower than by bitmap,
on one thread and on two (benchmarks/sparse_linear_cpu.py on Zen 4; docs/results.md). With more rows, or from the cache,
slices win beyond; where many threads share the memory, a bitmap's fewer bytes may win below."""

Key = tuple[str, int, torch.dtype, torch.dtype, int, int]
Product = Callable[..., object]

table: dict[Key, bool] = {}
"""By instruction set, threads, dtypes of x and values, rows of x (a power of two), and layout (0, or the power of two
that slices have weights for a place): whether dense was faster."""

PART = 2**26  # bytes of a dense weight that are timed: more than most caches hold

dense_table: dict[tuple[str, int, int, int], bool] = {}
"""By instruction set, threads, rows of x and columns: whether our dense kernel was faster than torch's product."""


def slices_pay(values: torch.dtype, weights: int, places: int) -> bool:
    """Whether products are faster with slices of so many places than by a bitmap of so many weights."""
    return places <= SLICED[values] * weights


def dense_is_faster(
    library: Library,
    x: Tensor,
    values: torch.dtype,
    sparse: Product,
    dense: Product,
    layout: Callable[[Tensor, Tensor, Tensor, int], tuple[object, ...]] | None = None,
    density: float = 0.5,
) -> bool:
    """Whether to unpack for this x (batch, in).

    The first call with a new key times both on a small random weight, which takes some hundredths of a second. With
    `PHOENIX_TIMING=off`, and under `torch.use_deterministic_algorithms`, nothing is timed: the kernels are taken where
    they have bfloat16 dot products, and else dense products from 32 rows on. The two round differently, so only then
    are results the same from run to run.

    Args:
        library: the kernels.
        x: float32 or bfloat16.
        values: dtype of the packed values.
        sparse: called as (library, x, bitmask, values, row_offsets).
        dense: likewise.
        layout: makes of (bitmask, values, row_offsets, columns) what both are called with instead.
        density: of the weight with that layout. A higher one, at most twice as high, is timed.
    """
    batch = x.shape[0]
    if batch < FEWEST:
        return False
    if os.environ.get(VARIABLE) == "off" or torch.are_deterministic_algorithms_enabled():
        return not library.has_dense and batch >= 32
    rows = min(MOST, 1 << (batch - 1).bit_length())
    halvings = min(6, max(1, int(-math.log2(density))))
    key = (library.path, torch.get_num_threads(), x.dtype, values, rows, halvings if layout else 0)
    if key not in table:
        table[key] = _measure(library, x.dtype, values, rows, sparse, dense, layout, 2.0**-halvings)
    return table[key]


def own_dense_is_faster(library: Library, x: Tensor, weight: Tensor) -> bool:
    """Whether to multiply x (batch, in) with a dense weight (out, in) by `library.dense`, and not by torch.

    The first call with a new key times both on some rows of the weight, which takes some hundredths of a second. What
    is said of `dense_is_faster` holds here: where nothing is timed, our kernel is taken.

    Args:
        library: the kernels, with a dense one.
        x: bfloat16, contiguous, of 1 to 8 rows.
        weight: bfloat16, contiguous.
    """
    if os.environ.get(VARIABLE) == "off" or torch.are_deterministic_algorithms_enabled():
        return True
    key = (library.path, torch.get_num_threads(), x.shape[0], x.shape[1])
    if key not in dense_table:
        some = weight[: max(1, PART // (2 * x.shape[1]))]
        own, other = (_best(product, x, some) for product in (library.dense, torch.nn.functional.linear))
        dense_table[key] = own < other
    return dense_table[key]


def _best(product: Callable[[Tensor, Tensor], object], x: Tensor, weight: Tensor) -> float:
    best = float("inf")
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        product(x, weight)
        best = min(best, time.perf_counter() - start)
    return best


def _measure(
    library: Library,
    dtype: torch.dtype,
    values: torch.dtype,
    rows: int,
    sparse: Product,
    dense: Product,
    layout: Callable[[Tensor, Tensor, Tensor, int], tuple[object, ...]] | None,
    density: float,
) -> bool:
    # A generator of its own: whoever seeded torch gets the numbers that they would have got.
    generator = torch.Generator().manual_seed(0)
    out, columns = SHAPE
    mask = torch.rand(out, columns, generator=generator) < density
    bitmask = torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))
    offsets = torch.zeros(out + 1, dtype=torch.int64)
    torch.cumsum(mask.sum(1), 0, out=offsets[1:])
    kept = torch.randint(-127, 128, (int(offsets[-1]),), dtype=torch.int8, generator=generator).to(values)
    x = torch.randn(rows, columns, generator=generator).to(dtype)
    weight = (bitmask, kept, offsets) if layout is None else layout(bitmask, kept, offsets, columns)
    best = {"sparse": float("inf"), "dense": float("inf")}
    for _ in range(ROUNDS + 1):  # the first, with its set-up, is seldom the best
        for name, product in (("sparse", sparse), ("dense", dense)):
            start = time.perf_counter()
            product(library, x, *weight)
            best[name] = min(best[name], time.perf_counter() - start)
        if max(best.values()) > 4 * min(best.values()):
            break
    return best["dense"] < best["sparse"]
