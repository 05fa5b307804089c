"""Whether an instruction set computes what the portable one does, on this processor."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError

if TYPE_CHECKING:
    from phoenix_sparse.runtime.kernels.library import Library

SHAPE = (75, 700)  # of the weight, multiples of nothing
BATCHES = (1, 5, 16, 70)


def prove(one: "Library", other: "Library") -> None:
    """Compare two instruction sets' products with a small random weight, in bfloat16 and int8.

    Args:
        one: the one to be used.
        other: the one that is known to be right.

    Raises:
        PhoenixError: they differ by more than the rounding to bfloat16.
    """
    generator = torch.Generator().manual_seed(0)
    rows, columns = SHAPE
    kept = torch.rand(SHAPE, generator=generator) < torch.linspace(0, 1, rows)[:, None]  # from empty rows to full ones
    bitmask = torch.from_numpy(np.packbits(kept.numpy(), axis=1, bitorder="little"))
    offsets = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    whole = torch.randint(-128, 128, (int(offsets[-1]),), dtype=torch.int8, generator=generator)
    for values, scales in ((whole.bfloat16() / 64, None), (whole, torch.linspace(0.01, 0.02, rows))):
        for batch in BATCHES:
            x = torch.randn(batch, columns, generator=generator).bfloat16()
            found, known = (_product(each, x, (bitmask, values, offsets, scales)) for each in (one, other))
            if not bool(((found - known).abs() <= 2**-7 * known.abs() + 1e-4 * known.abs().mean()).all()):
                raise PhoenixError(
                    f"CPU kernels: {one.path!r} gives wrong products on this processor ({values.dtype}, {batch} rows); "
                    f"please report it"
                )


def _product(library: "Library", x: Tensor, parts: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> Tensor:
    y = x.new_empty(x.shape[0], len(parts[0]))
    library.linear(x, *parts, None, y, x.shape[1])
    return y.double()
