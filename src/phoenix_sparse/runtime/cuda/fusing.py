"""Linears that read the same input as one: q, k and v of an attention, gate and up of an MLP, in one launch each.

transformers' forward stays as it is. The first of them to be called multiplies with all their weights, stacked; the
others, called with the very same tensor, hand out their rows of that product.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.packed import Packed
from phoenix_sparse.runtime.sparse_linear import SparseLinear

FAMILIES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of linears side by side that models of transformers call with one tensor."""


class Fused:
    """What the members of one stacked linear share: the product that some of them have yet to take their rows from.

    A tensor that is changed between two of them is not noticed: models don't do that.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        """For linears with so many rows each."""
        self.ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self.input: Tensor | None = None
        self.product: Tensor | None = None
        self.waiting: list[bool] = [False] * len(sizes)

    def part(self, number: int, x: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows of one linear: (…, in) -> (…, its rows), a view of the product with all of them.

        Args:
            number: of the linear.
            x: the input; if the product at hand is another tensor's, or this linear has had it, it is computed anew.
            multiply: (…, in) -> (…, all rows).
        """
        if x is not self.input or not self.waiting[number] or self.product is None:
            self.input, self.product = x, multiply(x)
            self.waiting = [True] * len(self.waiting)
        product = self.product
        self.waiting[number] = False
        if not any(self.waiting):
            self.input = self.product = None
        return product[..., self.ends[number] : self.ends[number + 1]]


class Member(nn.Module):
    """One of several linears whose weights are stacked; the first holds them, as `stacked`."""

    def __init__(self, fused: Fused, number: int, first: "Member | None", dtype: torch.dtype, device: Any) -> None:
        """A part of `fused`; without `first` it is the first, and gets its `stacked` linear assigned."""
        super().__init__()
        self.fused, self.number = fused, number
        self.out_features = fused.ends[number + 1] - fused.ends[number]
        self.register_buffer("weight", torch.empty(0, dtype=dtype, device=device), persistent=False)
        # In a tuple, which torch doesn't look into: the stacked weights are the first's, and counted once.
        self._first = (self if first is None else first,)

    @property
    def whole(self) -> Any:
        """The stacked linear."""
        return self._first[0].stacked

    @property
    def in_features(self) -> int:
        features: int = self.whole.in_features
        return features

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        return self.fused.part(self.number, x, self.whole)

    def extra_repr(self) -> str:
        start, end = self.fused.ends[self.number : self.number + 2]
        return f"out_features={self.out_features}, rows {start} to {end} of {self.fused.ends[-1]} together"


def members(stacked: nn.Module, sizes: Sequence[int], dtype: torch.dtype) -> list[Member]:
    """The linears that a stacked one replaces.

    Args:
        stacked: (…, in) -> (…, sum of sizes): a linear, dense or packed.
        sizes: rows of each.
        dtype: that they compute in.
    """
    fused, device = Fused(sizes), next(iter([*stacked.parameters(), *stacked.buffers()])).device
    first = Member(fused, 0, None, dtype, device)
    first.stacked = stacked
    return [first, *(Member(fused, number, first, dtype, device) for number in range(1, len(sizes)))]


def stack(layers: Sequence[SparseLinear]) -> SparseLinear:
    """Packed linears as one, their rows in order; a bias that only some have is 0 for the others.

    Raises:
        PhoenixError: they differ in width, dtype or device.
    """
    if not _alike(layers):
        raise PhoenixError("fuse: these linears differ in width, dtype or device, and can't be stacked")
    first, parts = layers[0], [layer.packed for layer in layers]
    starts = torch.tensor([0, *(part.nnz for part in parts)]).cumsum(0).tolist()
    offsets = [part.row_offsets[:-1] + start for part, start in zip(parts, starts, strict=False)]
    scales = [part.scales for part in parts if part.scales is not None]
    packed = Packed(
        (sum(layer.out_features for layer in layers), first.in_features),
        torch.cat([part.bitmask for part in parts]),
        torch.cat([part.compressed for part in parts]),
        torch.cat([*offsets, first.row_offsets.new_tensor(starts[-1:])]),
        torch.cat(scales) if scales else None,
    )
    bias = None
    found = [layer.bias for layer in layers if layer.bias is not None]
    if found:
        whole = [
            found[0].new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in layers
        ]
        bias = nn.Parameter(torch.cat(whole), requires_grad=False)
    return SparseLinear.of(packed, first.weight.dtype, bias)


def _alike(layers: Sequence[Any]) -> bool:
    """Whether all are packed linears of one width, dtype, kind of values and device."""
    if not all(isinstance(layer, SparseLinear) for layer in layers):
        return False
    facts = {(la.in_features, la.weight.dtype, la.compressed.dtype, la.bitmask.device) for la in layers}
    return len(facts) == 1


def fuse(model: nn.Module) -> int:
    """Stack the packed linears of every family that a model has whole and alike; the single ones are freed.

    Returns:
        How many families were stacked.
    """
    count = 0
    for parent in list(model.modules()):
        for names in FAMILIES:
            layers = [getattr(parent, name, None) for name in names]
            if _alike(layers):
                sparse: list[Any] = layers
                parts = members(stack(sparse), [layer.out_features for layer in sparse], sparse[0].weight.dtype)
                for name, part in zip(names, parts, strict=True):
                    setattr(parent, name, part)
                count += 1
    return count
