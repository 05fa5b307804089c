"""A packed linear on the GPU by Phoenix's kernels: the operator for torch, the layer, and when they are used."""

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.cuda.compiling import most_shared
from phoenix_sparse.runtime.cuda.fusing import fuse
from phoenix_sparse.runtime.cuda.layout import Layout, Plan, build
from phoenix_sparse.runtime.cuda.product import FLOATS, MOST, expand, multiply, shared_bytes
from phoenix_sparse.runtime.kernels import portable
from phoenix_sparse.runtime.sparse_linear import SparseLinear

VARIABLE = "PHOENIX_CUDA"
TOLERANCE = 1e-2  # of a product's relative error when the kernels are tried; rounding to bfloat16 gives 2e-3
SIZES = ((8, 96), (6, 96), (4, 72))
"""Warps, and rows of their rings: for 228, 164 and 100 KiB of shared memory a multiprocessor."""
CROSSOVER = 2 * MOST
"""Rows of x beyond which W is expanded: projected from bytes moved (twice the packed ones against once the packed and
twice the dense ones), not measured."""


@torch.library.custom_op("phoenix_sparse::cuda_linear", mutates_args=())  # counters end as they began
def cuda_linear(
    x: Tensor,
    values: Tensor,
    bitmaps: Tensor,
    headers: Tensor,
    warps: Tensor,
    counters: Tensor,
    numbers: list[int],
    scales: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """x (…, in) · Wᵀ · scales + bias, W given by its layout's arrays and numbers (`numbers_of`).

    Up to `CROSSOVER` rows of x the kernels multiply. Beyond, W is expanded into memory that the next layer uses again,
    and torch's dense product does the work.

    Returns:
        (…, out) in x's dtype.
    """
    layout = _layout(numbers, [values, bitmaps, headers, warps, counters])
    out, columns = layout.shape
    flat = x.reshape(-1, columns)
    if len(flat) == 0:
        y = flat.new_empty(0, out)
    elif len(flat) <= CROSSOVER:
        parts = [multiply(some, layout, scales, bias) for some in flat.split(MOST)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
    else:
        y = portable.finish(torch.nn.functional.linear(flat, expand(layout)), scales, bias, x.dtype)
    return y.view(*x.shape[:-1], out)


@cuda_linear.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    numbers: list[int] = rest[5]
    return x.new_empty((*x.shape[:-1], numbers[0]))


def numbers_of(layout: Layout) -> list[int]:
    """A layout's numbers, in the order of its fields."""
    return [*layout.shape, layout.warps_per_block, layout.groups, layout.slabs, layout.depth, layout.ring]


def _layout(numbers: list[int], tensors: list[Tensor]) -> Layout:
    out, columns, warps_per_block, groups, slabs, depth, ring = numbers
    return Layout((out, columns), warps_per_block, groups, slabs, depth, ring, *tensors)


class CudaLinear(nn.Module):
    """A packed linear whose only copy is the GPU's layout: for inference, never to be saved."""

    values: Tensor
    bitmaps: Tensor
    headers: Tensor
    warps: Tensor
    counters: Tensor
    scales: Tensor | None
    offset: Tensor | None

    def __init__(self, layout: Layout, scales: Tensor | None, bias: Tensor | None) -> None:
        """A layer of a layout.

        Args:
            layout: W (out, in).
            scales: (out,) for values that were int8, or None.
            bias: (out,), or None.
        """
        super().__init__()
        self.out_features, self.in_features = layout.shape
        self.numbers = numbers_of(layout)
        self.register_buffer("weight", layout.values.new_empty(0), persistent=False)  # models ask it for its dtype
        names = ("values", "bitmaps", "headers", "warps", "counters")
        for name, part in zip(names, layout.tensors(), strict=True):
            self.register_buffer(name, part, persistent=False)
        self.register_buffer("scales", None if scales is None else scales.float(), persistent=False)
        self.register_buffer("offset", None if bias is None else bias.detach().float(), persistent=False)

    @classmethod
    def of(cls, layer: SparseLinear) -> "CudaLinear":
        """A layer's layout on its GPU; int8 values become bfloat16, which holds them exactly.

        Raises:
            PhoenixError: its dtype isn't bfloat16 or float16.
        """
        dtype, device = layer.weight.dtype, layer.bitmask.device
        if dtype not in FLOATS:
            raise PhoenixError(
                f"sparse kernels: they compute in bfloat16 or float16, not {dtype}; give --dtype bfloat16"
            )
        packed = layer.packed
        values = packed.compressed.to(dtype)
        layout = build(packed.bitmask, values, packed.row_offsets, layer.in_features, plan_for(device))
        return cls(layout, layer.scales, layer.bias)

    @property
    def layout(self) -> Layout:
        return _layout(self.numbers, [self.values, self.bitmaps, self.headers, self.warps, self.counters])

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    def dense(self) -> Tensor:
        """The weight (out, in)."""
        return portable.finish(expand(self.layout).t(), self.scales, None, self.values.dtype).t()

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out), in x's dtype, summed in float32."""
        return cuda_linear(
            x,
            self.values,
            self.bitmaps,
            self.headers,
            self.warps,
            self.counters,
            self.numbers,
            self.scales,
            self.offset,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "CudaLinear":
        if fn(torch.empty(1, dtype=self.values.dtype, device=self.values.device)).dtype != self.values.dtype:
            raise PhoenixError("sparse kernels: a layer in the GPU's layout keeps its dtype; load the model in another")
        super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, *_: Any, **__: Any) -> None:
        raise PhoenixError(
            "sparse kernels: a model in the GPU's layout can't be saved; its packed directory is the model"
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.nbytes} bytes"


@cache
def plan_for(device: torch.device) -> Plan:
    """The plan for a GPU: as many warps as its shared memory holds.

    Raises:
        PhoenixError: it holds too little.
    """
    facts, most = torch.cuda.get_device_properties(device), most_shared(device)
    plans = [Plan(facts.multi_processor_count, warps=warps, ring=ring) for warps, ring in SIZES]
    for plan in plans:
        if shared_bytes(plan.warps, plan.ring, MOST) <= most:
            return plan
    raise PhoenixError(f"sparse kernels: {facts.name} has too little shared memory for them; set {VARIABLE}=torch")


def wanted(device: torch.device) -> bool:
    """Whether sparse layers on this device are to be put in the GPU's layout: `PHOENIX_CUDA=kernels`.

    Raises:
        PhoenixError: the variable has another value than kernels or torch.
    """
    choice = os.environ.get(VARIABLE) or "torch"
    if choice not in ("kernels", "torch"):
        raise PhoenixError(f"{VARIABLE}: {choice!r} is no way to multiply on a GPU; give kernels or torch")
    return choice == "kernels" and device.type == "cuda"


@cache
def prove(device: torch.device, dtype: torch.dtype) -> None:
    """Compare the kernels with torch on this GPU, once.

    Raises:
        PhoenixError: they can't be compiled, or give other results.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 700, generator=generator)
    kept = torch.rand(weight.shape, generator=generator) < 0.5
    weight = torch.where(kept, weight, 0.0).to(dtype)
    places = 2 ** torch.arange(8)
    bytes_ = torch.nn.functional.pad(kept.long(), (0, -700 % 8)).view(200, -1, 8) @ places
    offsets = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    parts = [part.to(device) for part in (bytes_.to(torch.uint8), weight[kept], offsets)]
    layout = build(parts[0], parts[1], parts[2], 700, plan_for(device))
    if not torch.equal(expand(layout).cpu(), weight):
        raise PhoenixError(f"sparse kernels: they unpack wrongly on this GPU; set {VARIABLE}=torch, and report it")
    for batch in (1, 16):
        x = torch.randn(batch, 700, generator=generator).to(dtype)
        y, exact = multiply(x.to(device), layout).cpu().double(), x.double() @ weight.double().t()
        if not bool((y - exact).norm() <= TOLERANCE * exact.norm()):
            raise PhoenixError(f"sparse kernels: wrong products on this GPU; set {VARIABLE}=torch, and report it")


def prepare(model: nn.Module, device: torch.device) -> None:
    """Put every packed linear of a model on this GPU into its layout, if that is wanted; the packed arrays are freed.

    Those that read the same input become one (see `fusing`).

    Raises:
        PhoenixError: see `wanted`, `prove` and `CudaLinear.of`.
    """
    if not wanted(device):
        return
    fuse(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    for name, layer in layers.items():
        prove(device, layer.weight.dtype)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, CudaLinear.of(layer))
