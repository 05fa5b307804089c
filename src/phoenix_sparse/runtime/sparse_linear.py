"""A linear layer whose weight stays packed."""

from typing import Any

import torch
from torch import Tensor, nn

from phoenix_sparse.runtime.kernels.linear import sparse_linear
from phoenix_sparse.runtime.kernels.placing import place
from phoenix_sparse.runtime.packed import Packed, unpack


class SparseLinear(nn.Module):
    """y = x Wᵀ + b with a packed W.

    Its state has the names of the packed format, so `state_dict` and `save_pretrained` write what was read. `weight`
    is empty: it tells the dtype to compute in, and stops loaders that don't know the format.
    """

    bitmask: Tensor
    compressed: Tensor
    row_offsets: Tensor
    shape: Tensor
    weight: Tensor
    scales: Tensor | None

    def __init__(
        self, shape: tuple[int, int], nnz: int, values: torch.dtype, dtype: torch.dtype, bias: nn.Parameter | None
    ) -> None:
        """An empty layer, to be filled from a state dict.

        Args:
            shape: (out, in).
            nnz: kept weights.
            values: their dtype.
            dtype: that the layer computes in.
            bias: (out,), or None.
        """
        super().__init__()
        self.out_features, self.in_features = shape
        self.register_buffer("weight", torch.empty(0, dtype=dtype))
        self.register_buffer("shape", torch.tensor(shape))
        self.register_buffer("bitmask", torch.zeros(shape[0], (shape[1] + 7) // 8, dtype=torch.uint8))
        self.register_buffer("compressed", torch.zeros(nnz, dtype=values))
        self.register_buffer("row_offsets", torch.zeros(shape[0] + 1, dtype=torch.int64))
        self.register_buffer("scales", torch.ones(shape[0], dtype=torch.bfloat16) if values == torch.int8 else None)
        self.bias = bias

    @classmethod
    def of(cls, packed: Packed, dtype: torch.dtype, bias: nn.Parameter | None = None) -> "SparseLinear":
        """A layer of a packed matrix."""
        layer = cls(packed.shape, 0, packed.compressed.dtype, dtype, bias)
        layer.bitmask, layer.compressed, layer.row_offsets = packed.bitmask, packed.compressed, packed.row_offsets
        layer.scales = packed.scales
        layer.place()
        return layer

    @property
    def packed(self) -> Packed:
        return Packed(
            (self.out_features, self.in_features), self.bitmask, self.compressed, self.row_offsets, self.scales
        )

    def dense(self) -> Tensor:
        """The weight (out, in) in the dtype that the layer computes in."""
        return unpack(self.packed, self.weight.dtype)

    def place(self) -> None:
        """Put the weights on huge pages, where a CPU reads them several times faster; once, when they are complete."""
        self.bitmask, self.compressed = place(self.bitmask), place(self.compressed)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out), in x's dtype, summed in float32."""
        return sparse_linear(x, self.bitmask, self.compressed, self.row_offsets, self.scales, self.bias)

    def extra_repr(self) -> str:
        density = self.compressed.numel() / (self.out_features * self.in_features)
        values: Any = str(self.compressed.dtype).removeprefix("torch.")
        return f"in_features={self.in_features}, out_features={self.out_features}, density={density:.3f}, {values}"
