"""Which is faster for many rows of x: the sparse kernels, or unpacking and torch's dense product. Measured, once."""

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from phoenix_sparse.runtime.kernels.library import Library

VARIABLE = "PHOENIX_TIMING"
FEWEST = 9  # rows of x below which unpacking can't pay
MOST = 256  # rows of x beyond which the comparison no longer changes

SHAPE = (1024, 2048)  # of the weight that is timed, half of it kept
ROUNDS = 3

Key = tuple[str, int, torch.dtype, torch.dtype, int]
Product = Callable[[Library, Tensor, Tensor, Tensor, Tensor], object]

table: dict[Key, bool] = {}
"""By instruction set, threads, dtypes of x and values, and rows of x (a power of two): whether dense was faster."""


def dense_is_faster(library: Library, x: Tensor, values: torch.dtype, sparse: Product, dense: Product) -> bool:
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
    """
    batch = x.shape[0]
    if batch < FEWEST:
        return False
    if os.environ.get(VARIABLE) == "off" or torch.are_deterministic_algorithms_enabled():
        return not library.has_dense and batch >= 32
    rows = min(MOST, 1 << (batch - 1).bit_length())
    key = (library.path, torch.get_num_threads(), x.dtype, values, rows)
    if key not in table:
        table[key] = _measure(library, x.dtype, values, rows, sparse, dense)
    return table[key]


def _measure(
    library: Library, dtype: torch.dtype, values: torch.dtype, rows: int, sparse: Product, dense: Product
) -> bool:
    # A generator of its own: whoever seeded torch gets the numbers that they would have got.
    generator = torch.Generator().manual_seed(0)
    out, columns = SHAPE
    bitmask = torch.randint(0, 256, (out, columns // 8), dtype=torch.uint8, generator=generator)
    ones = torch.tensor([byte.bit_count() for byte in range(256)])
    offsets = torch.zeros(out + 1, dtype=torch.int64)
    torch.cumsum(ones[bitmask.int()].sum(1), 0, out=offsets[1:])
    kept = torch.randint(-127, 128, (int(offsets[-1]),), dtype=torch.int8, generator=generator).to(values)
    x = torch.randn(rows, columns, generator=generator).to(dtype)
    best = {"sparse": float("inf"), "dense": float("inf")}
    for _ in range(ROUNDS + 1):  # the first, with its set-up, is seldom the best
        for name, product in (("sparse", sparse), ("dense", dense)):
            start = time.perf_counter()
            product(library, x, bitmask, kept, offsets)
            best[name] = min(best[name], time.perf_counter() - start)
        if max(best.values()) > 4 * min(best.values()):
            break
    return best["dense"] < best["sparse"]
