"""Random packed matrices, and what a product with them must be."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from phoenix_sparse.runtime.kernels.library import Library

DTYPES = (torch.bfloat16, torch.float32)
VALUES = (torch.bfloat16, torch.float32, torch.int8)


def libraries() -> list[Library]:
    """The compiled kernels with each instruction set that this machine has; none if they aren't built."""
    try:
        first = Library()
    except OSError:
        return []
    return [Library(path=path) for path in first.paths]


@dataclass
class Matrix:
    bitmask: Tensor
    values: Tensor
    row_offsets: Tensor
    scales: Tensor | None
    dense: Tensor  # float64, with scales

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.bitmask, self.values, self.row_offsets, self.scales


def matrix(
    rows: int,
    columns: int,
    density: float,
    values: torch.dtype,
    seed: int,
    scales: torch.dtype = torch.float32,
    least: int = -128,
) -> Matrix:
    """One whose rows are of that density, but for some empty and some full ones; int8 values are `least` or more."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    kept[torch.rand(rows, generator=generator) < 0.1] = False
    kept[torch.rand(rows, generator=generator) < 0.1] = True
    factor = None
    if values == torch.int8:
        weight = torch.randint(least, 128, (rows, columns), generator=generator).to(values)
        factor = (torch.rand(rows, generator=generator) / 100 + 0.001).to(scales)
    else:
        weight = torch.randn(rows, columns, generator=generator).to(values)
    return packed(weight, kept, factor)


def packed(weight: Tensor, kept: Tensor, scales: Tensor | None = None) -> Matrix:
    """The kept ones of some weights (out, in)."""
    offsets = torch.zeros(len(weight) + 1, dtype=torch.int64)
    torch.cumsum(kept.sum(1), 0, out=offsets[1:])
    bitmask = torch.from_numpy(np.packbits(kept.numpy(), axis=1, bitorder="little"))
    dense = weight.double() * kept * (1 if scales is None else scales.double()[:, None])
    return Matrix(bitmask, weight[kept], offsets, scales, dense)


def tolerance(m: Matrix, x: Tensor, bias: Tensor | None, by_torch: bool = False) -> Tensor:
    """How far a product in x's dtype may be from the exact one, (batch, out).

    Args:
        m: the weight.
        x: (batch, in).
        bias: (out,).
        by_torch: whether torch takes the product: rounded to x's dtype before scales, bias and another rounding.
    """
    exact, product = expected(m, x, bias).abs(), expected(m, x).abs()
    terms = x.double().abs() @ m.dense.abs().T + (0 if bias is None else bias.double().abs())
    slack = 2e-6 * terms + 1e-30
    if x.dtype == torch.float32:
        return slack
    return slack + 2**-8 * (exact + slack) + (2**-8 * (product + slack) if by_torch else 0)


def expected(m: Matrix, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """In float64."""
    return x.double() @ m.dense.T + (0 if bias is None else bias.double())


def multiply(library: Library, m: Matrix, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """With the kernels of one instruction set."""
    y = torch.full((x.shape[0], m.bitmask.shape[0]), float("nan"), dtype=x.dtype)
    library.linear(x, *m.parts, bias, y, x.shape[1])
    return y
