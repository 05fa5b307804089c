"""The two layouts of a matrix on a GPU: which one a matrix gets, and the product with either."""

from dataclasses import fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.cuda import layout, product, scattered, scattered_product
from phoenix_sparse.runtime.cuda.compiling import most_shared
from phoenix_sparse.runtime.cuda.layout import Layout, Plan
from phoenix_sparse.runtime.cuda.operands import MOST
from phoenix_sparse.runtime.cuda.scattered import Scattered

Form = Layout | Scattered
KINDS = (Layout, Scattered)
FEW = 0.15
"""Of weights kept, up to which a matrix goes value by value. On an H200 with 14336x4096 that takes 8.7 µs at 10% with
one row of x and 16.6 with 16, where the other layout takes 16.9 and 19.6; at 30% it takes 17.8 and 31.5, for 17.8 and
20.3."""
CROSSOVER = {Layout: 64, Scattered: 256}
"""Rows of x beyond which W is expanded for cuBLAS: on an H200 expanding 14336x4096 takes 55 µs from bits and 248 µs
value by value (10% kept), a product with 32 rows 27 µs and 33 µs, and cuBLAS 31 µs."""
BESIDE_DENSE = {Layout: 32, Scattered: 16}
"""Rows of x beyond which a dense copy of W serves, where there is one: 16 rows take 17 µs value by value."""
SIZES = ((8, 112), (6, 96), (4, 80))
"""Warps, and rows of their rings: for 227, 163 and 99 KiB of shared memory in a block."""


def build(bitmask: Tensor, values: Tensor, row_offsets: Tensor, columns: int, dtype: torch.dtype) -> Form:
    """The layout of a packed matrix, on its device. int8 values stay what they are, but where few are kept: see
    `scattered`.

    Args:
        bitmask: uint8 (out, ⌈columns/8⌉), as in `packed.Packed`.
        values: (nnz,) floats or int8.
        row_offsets: int64 (out + 1).
        columns: of the matrix.
        dtype: bfloat16 or float16, that products are in; it holds int8 values exactly, others are rounded to it.
    """
    if values.numel() <= FEW * bitmask.shape[0] * columns:
        plan = scattered_product.plan_for(bitmask.device)
        return scattered.build(bitmask, values.to(dtype), row_offsets, columns, plan)
    if values.dtype != torch.int8:
        values = values.to(dtype)
    return layout.build(bitmask, values, row_offsets, columns, plan_for(bitmask.device), dtype)


def multiply(x: Tensor, form: Form, scales: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x (batch, in) · Wᵀ · scales + bias for at most `operands.MOST` rows of x: see `product.multiply`."""
    if isinstance(form, Layout):
        return product.multiply(x, form, scales, bias)
    return scattered_product.multiply(x, form, scales, bias)


def expand(form: Form) -> Tensor:
    """W (out, in) itself, in memory of its own."""
    return product.expand(form) if isinstance(form, Layout) else scattered_product.expand(form)


def parts_of(kind: type[Form]) -> list[str]:
    """The fields of a layout that are tensors: the last ones."""
    return [field.name for field in fields(kind) if field.type in (Tensor, "Tensor")]


def numbers_of(form: Form) -> list[int]:
    """What isn't a tensor of a layout: its kind, then its fields in order."""
    rest = [field.name for field in fields(form) if field.name not in ("shape", *parts_of(type(form)))]
    return [KINDS.index(type(form)), *form.shape, *(getattr(form, name) for name in rest)]


def form_of(numbers: list[int], parts: list[Tensor]) -> Form:
    """The layout of such numbers and tensors."""
    number, out, columns, *rest = numbers
    kind: Any = KINDS[number]
    form: Form = kind((out, columns), *rest, *parts)
    return form


@cache
def plan_for(device: torch.device) -> Plan:
    """The plan of `layout.build` for a GPU: as many warps as its shared memory holds.

    Raises:
        PhoenixError: it holds too little.
    """
    facts, most = torch.cuda.get_device_properties(device), most_shared(device)
    plans = [Plan(facts.multi_processor_count, warps=warps, ring=ring) for warps, ring in SIZES]
    for plan in plans:
        if product.shared_bytes(plan.warps, plan.ring, MOST) <= most:
            return plan
    raise PhoenixError(f"sparse kernels: {facts.name} has too little shared memory for them; set PHOENIX_CUDA=torch")
