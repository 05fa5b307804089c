"""A linear layer whose weight stays packed."""

from typing import Any

import torch
from torch import Tensor, nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.kernels.linear import FLOATS, sparse_linear
from phoenix_sparse.runtime.kernels.placing import place
from phoenix_sparse.runtime.kernels.sliced import sliced_linear
from phoenix_sparse.runtime.kernels.slices import Slices
from phoenix_sparse.runtime.kernels.slicing import slice_if_faster, unslice
from phoenix_sparse.runtime.packed import Packed, check, unpack

PACKED = ("bitmask", "compressed", "row_offsets")
SLICED = ("steps", "windows", "starts", "order")


class SparseLinear(nn.Module):
    """y = x Wᵀ + b with a packed W.

    Its state has the names of the packed format, so `state_dict` and `save_pretrained` write what was read. `weight`
    is empty: it tells the dtype to compute in, and stops loaders that don't know the format.

    W is held once: as it was read, or on a CPU, with few values, in slices (`kernels.slices`). Then bitmask,
    compressed and row_offsets are empty, and made again for whoever asks for `packed` or for the state.
    """

    bitmask: Tensor
    compressed: Tensor
    row_offsets: Tensor
    shape: Tensor
    weight: Tensor
    scales: Tensor | None
    steps: Tensor | None
    windows: Tensor
    starts: Tensor
    order: Tensor

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
        for name in SLICED:
            self.register_buffer(name, None, persistent=False)
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
    def slices(self) -> Slices | None:
        """W in slices, if it is held so."""
        if self.steps is None:
            return None
        return Slices(self.steps, self.windows, self.starts, self.order, self.in_features)

    @property
    def packed(self) -> Packed:
        slices = self.slices
        parts = (self.bitmask, self.compressed, self.row_offsets) if slices is None else unslice(slices)
        return Packed((self.out_features, self.in_features), *parts, self.scales)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of W as it is held."""
        parts = (getattr(self, name) for name in (*PACKED, *SLICED, "scales"))
        return sum(part.nbytes for part in parts if part is not None)

    def dense(self) -> Tensor:
        """The weight (out, in) in the dtype that the layer computes in."""
        return unpack(self.packed, self.weight.dtype)

    def place(self) -> None:
        """Lay the weights out as a CPU reads them fastest; once, when they are complete and checked."""
        slices = None
        if self.steps is None and self.weight.dtype in FLOATS:
            slices = slice_if_faster(self.bitmask, self.compressed, self.row_offsets, self.in_features)
        if slices is None:
            self.bitmask, self.compressed = place(self.bitmask), place(self.compressed)
            return
        self._hold(slices)

    def _hold(self, slices: Slices) -> None:
        for name in SLICED:
            setattr(self, name, getattr(slices, name))
        for name in PACKED:
            setattr(self, name, getattr(self, name).new_empty(0))

    def unplace(self) -> bool:
        """Hold W as it was read again. Returns whether it was held otherwise."""
        slices = self.slices
        if slices is None:
            return False
        for name, part in zip(PACKED, unslice(slices), strict=True):
            setattr(self, name, part)
        for name in SLICED:
            setattr(self, name, None)
        return True

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out), in x's dtype, summed in float32."""
        slices = self.slices
        if slices is not None:
            return sliced_linear(x, slices, self.scales, self.bias)
        return sparse_linear(x, self.bitmask, self.compressed, self.row_offsets, self.scales, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> "SparseLinear":
        """Move or convert as modules do, but for W's arrays: they stay as they were packed, whatever is computed in.

        No dtype is refused here: a model's modules are converted one after the other, and those before this one have
        been by now. What there is no product in is refused by the product.
        """
        probe = torch.empty(1, dtype=self.weight.dtype)
        # Slices are for a CPU, and not for every dtype: what moves or converts gets the packed arrays.
        sliced = fn(probe) is not probe and self.unplace()
        held = {id(getattr(self, name)) for name in (*PACKED, *SLICED, "shape", "scales")}
        before = [getattr(self, name) for name in PACKED]

        def change(part: Tensor) -> Tensor:
            changed: Tensor = fn(part)
            return part.to(changed.device) if id(part) in held and changed.dtype != part.dtype else changed

        super()._apply(change, recurse)
        # `to_empty` leaves anything in the arrays, which slicing would rely on.
        if sliced and all(_same(getattr(self, name), part) for name, part in zip(PACKED, before, strict=True)):
            self.place()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.steps is not None:
            packed = self.packed
            destination.update({prefix + name: getattr(packed, name) for name in PACKED})

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        before, slices = len(errors), self.slices
        self.unplace()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if slices is None:
            return
        # What was read in part, or is none of the matrices that slicing relies on, is not kept.
        if len(errors) > before:
            self._hold(slices)
            return
        try:
            check(self.packed, prefix.rstrip(".") or "state_dict")
        except PhoenixError:
            self._hold(slices)
            raise
        self.place()

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles hold the packed arrays, which any machine can work with.
        state = self.__dict__.copy()
        if self.steps is not None:
            packed = self.packed
            parts = {name: getattr(packed, name) for name in PACKED}
            state["_buffers"] = self._buffers | parts | dict.fromkeys(SLICED)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.place()

    def extra_repr(self) -> str:
        values: Any = str(self.compressed.dtype).removeprefix("torch.")
        held = f"density={self.compressed.numel() / (self.out_features * self.in_features):.3f}"
        held = held if self.steps is None else "sliced"
        return f"in_features={self.in_features}, out_features={self.out_features}, {held}, {values}"


def _same(part: Tensor, other: Tensor) -> bool:
    """Whether an array on the CPU still holds what it held there."""
    return part.device == other.device and torch.equal(part, other)
