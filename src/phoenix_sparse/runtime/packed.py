"""One sparse matrix in packed form: a bit for every weight, and the values of those that are kept.

A bfloat16 matrix of density d takes 2d + 1/8 bytes a weight, and 8 bytes a row for offsets. The names are those of
compressed-tensors' former sparse-bitmask format: shape, bitmask, compressed, row_offsets.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from phoenix_sparse.checkpoint import is_finite
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.kernels import checking, portable

BITS: dict[torch.dtype, torch.dtype] = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
}
"""The integers by which floats are compared to the last bit: -0.0 is kept as a value of its own."""


@dataclass
class Packed:
    """A matrix (out, in).

    Attributes:
        shape: (out, in).
        bitmask: uint8 (out, ⌈in/8⌉); bit j of byte b says whether column 8b + j is kept, bits beyond `in` are 0.
        compressed: (nnz,), the kept values row by row: bfloat16, float16, float32, or int8.
        row_offsets: int64 (out + 1), where each row's values begin, and at last nnz.
        scales: bfloat16 (out,) for int8: the weight is scale · value. None otherwise. Powers of precision above
            bfloat16 would be lost wherever a loader casts floats to the model's dtype.
    """

    shape: tuple[int, int]
    bitmask: Tensor
    compressed: Tensor
    row_offsets: Tensor
    scales: Tensor | None = None

    @property
    def nnz(self) -> int:
        return self.compressed.numel()

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the names that it is stored under."""
        found = {
            "shape": torch.tensor(self.shape),
            "bitmask": self.bitmask,
            "compressed": self.compressed,
            "row_offsets": self.row_offsets,
        }
        return found | ({} if self.scales is None else {"scales": self.scales})


def pack(weight: Tensor) -> Packed:
    """Pack a matrix (out, in) of bfloat16, float16 or float32; every bit of it is kept, negative zeros' signs too."""
    if weight.dim() != 2 or weight.dtype not in BITS:
        raise PhoenixError(
            f"pack: a {weight.dim()}-dimensional {weight.dtype} can't be packed; give a matrix of float32, bfloat16 or "
            "float16"
        )
    weight = weight.detach().cpu().contiguous()
    kept = weight.view(BITS[weight.dtype]) != 0
    offsets = torch.zeros(weight.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(kept.sum(1), 0, out=offsets[1:])
    bitmask = torch.from_numpy(np.packbits(kept.numpy(), axis=1, bitorder="little"))
    return Packed((weight.shape[0], weight.shape[1]), bitmask, weight[kept], offsets)


def negative_zeros(weight: Tensor) -> int:
    """How many weights are -0.0: those of W · mask where W was negative, and hardly any in a model without a mask."""
    return int(((weight == 0) & torch.signbit(weight)).sum())


def quantize(packed: Packed) -> Packed:
    """Round the values to int8, symmetrically, with one scale a row: the largest magnitude of a row becomes ±127."""
    values, rows = packed.compressed.float(), row_numbers(packed)
    largest = torch.zeros(packed.shape[0], device=values.device).scatter_reduce_(0, rows, values.abs(), "amax")
    # Rounded up, so that no value passes 127; a row of nothing gets 1.
    scales = (largest / 127 * (1 + 2**-7)).bfloat16()
    scales[scales == 0] = 1.0
    whole = (values / scales.float()[rows]).round().clamp(-127, 127).to(torch.int8)
    return Packed(packed.shape, packed.bitmask, whole, packed.row_offsets, scales)


def row_numbers(packed: Packed) -> Tensor:
    """Each value's row, (nnz,) int64."""
    counts = packed.row_offsets.diff()
    return torch.repeat_interleave(torch.arange(packed.shape[0], device=counts.device), counts)


def unpack(packed: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix (out, in) again.

    Args:
        packed: a valid one (`check`).
        dtype: of the result; the values' own, and float32 for int8, unless given.
    """
    dense = portable.unpack(packed.bitmask, packed.compressed, packed.row_offsets, packed.shape[1])
    if packed.scales is not None:
        dense = dense.float() * packed.scales.float()[:, None]
    return dense if dtype is None else dense.to(dtype)


def check(packed: Packed, name: str) -> None:
    """Refuse anything that isn't a packed matrix to the last bit: kernels trust what passed here.

    Raises:
        PhoenixError: naming the layer and what is wrong.
    """
    out, inner = packed.shape
    if out < 1 or inner < 1 or packed.bitmask.shape[:1] != (out,):
        raise PhoenixError(f"{name}: a bitmask {tuple(packed.bitmask.shape)} is none of {out}x{inner}; pack it again")
    checking.check(packed.bitmask, packed.compressed, packed.row_offsets, inner, packed.scales, name)
    if not is_finite(packed.compressed):
        raise PhoenixError(f"{name}: values that are NaN or infinite; a model must be finite")
    if packed.scales is not None and not (is_finite(packed.scales) and bool((packed.scales > 0).all())):
        raise PhoenixError(f"{name}: scales that are not all positive and finite; pack the model again")
