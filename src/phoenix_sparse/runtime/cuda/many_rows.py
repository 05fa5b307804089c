"""Products with many rows of x, as in prefill: what packed linears keep beside their packed form to be fast there.

Beyond some rows a product is bound by arithmetic, of which sparse kernels save nothing. What then serves:

- nothing more (`packed`): W is expanded for each product (`forms.expand`), into memory that the next layer uses again.
  That takes 55 µs for 14336x4096 on an H200, where cuBLAS takes 34 µs with 128 rows of x, 161 with 1024 and 736 with
  4096.
- a dense copy of W (`dense`): torch's dense product, at its speed. Packed form and copy take about 1.6 times the dense
  memory at 50%.
- cuSPARSELt's form of W if it is 2:4 (`semi`), in 0.56 of the dense memory: faster than dense with many rows, slower
  with few (see `semi_structured`).
"""

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.cuda import semi_structured

Prefill = Literal["packed", "dense", "semi", "auto"]
"""What packed linears keep for products with many rows of x, in prefill and in large batches:

- `packed`, the default everywhere: nothing but the packed form, so at 50% a linear takes 0.59 of its dense memory. With
  few hundred rows such a product takes up to three times as long as a dense one.
- `dense`: a dense copy of every packed linear too; prefill is as fast as with a dense model.
- `semi`: cuSPARSELt's form of every 2:4 linear too; the others stay packed alone.
- `auto`: what is fastest and fits: dense copies, and cuSPARSELt's forms of 2:4 linears beside them, if all of that
  takes at most half (`SHARE`) of the GPU's memory that is free once the packed model lies there; the other half is left
  to the cache of keys and values. If both are too large it is the copies alone, then the forms alone, then nothing.

The default is not `auto`, since what a model takes and, to the last bit, what it answers would then hang on what else
lies on the GPU; and a small model is what packing is for.
"""

SHARE = 0.5  # of the memory that is free after loading, for all that `auto` keeps beside the packed form
SEMI_FROM = 512
"""Rows of x from which cuSPARSELt serves any 2:4 linear. Measured on an H200 with the algorithm that is searched for
with 2048 rows, as many times as fast as cuBLAS: 1.07 to 1.39 with 512 rows, 1.15 to 1.50 with 1024, 1.41 to 1.66 with
more; with 256 it is 0.70 to 1.40 where W is taller than wide, 0.28 where not. Below it W's expansion takes 1.0 to 3.1
times as long as cuSPARSELt where W is taller than wide, and a third of its time where not."""


class Linear(Protocol):
    """What is given copies here: `linear.CudaLinear`."""

    weight: Tensor
    in_features: int
    out_features: int
    offset: Tensor | None
    dense_copy: Tensor | None
    semi_structured: Tensor | None
    offset_copy: Tensor | None

    def dense(self) -> Tensor: ...


def check_prefill(text: str) -> Prefill:
    """One of `Prefill`, or a PhoenixError."""
    if text not in get_args(Prefill):
        raise PhoenixError(f"prefill: {text!r} is none of {', '.join(get_args(Prefill))}")
    return text  # type: ignore[return-value]


def refuse(prefill: Prefill, why: str) -> None:
    """Raise a PhoenixError if something is asked for by name that can't be had; `auto` and `packed` ask for nothing."""
    if prefill not in ("packed", "auto"):
        raise PhoenixError(f"prefill={prefill}: {why}; give packed or auto")


def serve(
    rows: int, crossover: int, beside_dense: int, shape: tuple[int, int], dense: Tensor | None, semi: Tensor | None
) -> bool:
    """Whether copies of W (out, in) serve so many rows of x: beside a dense one more than `beside_dense`; without any W
    is expanded beyond `crossover`."""
    if dense is not None:
        return rows > beside_dense
    return semi is not None and rows > crossover and (rows >= SEMI_FROM or shape[0] > shape[1])


def multiply(x: Tensor, out: int, bias: Tensor | None, dense: Tensor | None, semi: Tensor | None) -> Tensor:
    """x · Wᵀ + bias by a copy of W, of those that are there by the one that is faster.

    Args:
        x: (…, in), as many rows as `serve` says.
        out: W's rows.
        bias: (out,) in x's dtype, or None.
        dense: W (out, in) with its scales, in x's dtype, or None.
        semi: likewise, as `semi_structured.compress` gives it; one of the two is there.

    Returns:
        (…, out) in x's dtype.
    """
    if semi is None or (dense is not None and x.numel() // x.shape[-1] < SEMI_FROM):
        assert dense is not None
        return torch.nn.functional.linear(x, dense, bias)
    y = semi_structured.multiply(x.reshape(-1, x.shape[-1]), semi, out, bias)
    return y.view(*x.shape[:-1], -1)


def keep(layers: Sequence[Linear], prefill: Prefill, device: torch.device) -> None:
    """Give packed linears on a GPU what `prefill` says beside their packed form; what they had is freed.

    A copy holds W · scales in the linear's dtype, as `phx unpack` writes it: scales of int8 values are rounded into it.

    Raises:
        PhoenixError: copies asked for by name don't fit the free memory; or `semi` is asked for where no linear is 2:4,
            or cuSPARSELt can't be had; or it gives wrong products.
    """
    for layer in layers:
        layer.dense_copy = layer.semi_structured = layer.offset_copy = None
    if prefill == "packed" or not layers:
        return
    two_four = set() if prefill == "dense" else {id(layer) for layer in _two_four(layers, prefill, device)}
    sizes = {id(layer): layer.out_features * layer.in_features * layer.weight.itemsize for layer in layers}
    whole = sum(sizes.values())
    compressed = int(sum(sizes[which] for which in two_four) * semi_structured.COMPRESSED)
    dense, semi = choose(prefill, whole, compressed, free_bytes(device))
    try:
        for layer in layers:
            if dense or (semi and id(layer) in two_four):
                weight = layer.dense().contiguous()
                layer.dense_copy = weight if dense else None
                layer.offset_copy = None if layer.offset is None else layer.offset.to(weight.dtype)
            if semi and id(layer) in two_four:
                layer.semi_structured = semi_structured.compress(weight)
                semi_structured.settle(weight, layer.semi_structured, layer.offset_copy)
    except torch.OutOfMemoryError as error:  # unpacking needs some memory too, and others may have taken it meanwhile
        for layer in layers:
            layer.dense_copy = layer.semi_structured = layer.offset_copy = None
        raise PhoenixError(f"prefill={prefill}: the GPU's memory is full; give packed") from error


def choose(prefill: Prefill, dense: int, semi: int, free: int) -> tuple[bool, bool]:
    """Whether dense copies, and whether cuSPARSELt's forms are kept.

    Args:
        prefill: the choice.
        dense: bytes of all dense copies.
        semi: bytes of all of cuSPARSELt's forms; 0 if no linear can have one.
        free: bytes of the GPU's memory.

    Raises:
        PhoenixError: what is asked for by name doesn't fit.
    """
    if prefill == "auto":
        for dense_too, semi_too in ((True, True), (True, False), (False, True)):
            if dense_too * dense + semi_too * semi <= SHARE * free and (semi or not semi_too):
                return dense_too, semi_too
        return False, False
    needed = {"packed": 0, "dense": dense, "semi": semi}[prefill]
    if needed > free:
        gib = 2**30
        refuse(prefill, f"the copies take {needed / gib:.1f} GiB, and {free / gib:.1f} GiB of the GPU are free")
    return prefill == "dense", prefill == "semi"


def _two_four(layers: Sequence[Linear], prefill: Prefill, device: torch.device) -> list[Linear]:
    """The linears that cuSPARSELt can multiply, which is tried once.

    Raises:
        PhoenixError: there are none, and `semi` is asked for; or cuSPARSELt fails or is wrong.
    """
    why = semi_structured.why_not(device)
    if why is not None:
        refuse(prefill, why)
        return []
    fitting = [
        layer
        for layer in layers
        if semi_structured.fits((layer.out_features, layer.in_features), layer.weight.dtype)
        and semi_structured.is_two_four(layer.dense())
    ]
    if not fitting:
        refuse(prefill, "no packed linear of this model is 2:4, in bfloat16, of sizes in sixteens (see pattern=2:4)")
    for dtype in {layer.weight.dtype for layer in fitting}:
        semi_structured.prove(device, dtype)
    found = [
        layer
        for layer in fitting
        if semi_structured.takes((layer.out_features, layer.in_features), layer.weight.dtype, layer.weight.device)
    ]
    if fitting and not found:
        sizes = ", ".join(sorted({f"{layer.out_features}x{layer.in_features}" for layer in fitting}))
        refuse(prefill, f"cuSPARSELt has no kernel for the sizes of this model's 2:4 linears ({sizes})")
    return found


def free_bytes(device: torch.device) -> int:
    """The GPU's memory that can be allocated: what no process has, and what torch holds without using it."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
