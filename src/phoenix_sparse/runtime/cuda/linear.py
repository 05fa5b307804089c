"""A packed linear on the GPU by Phoenix's kernels: the operator for torch, the layer, and when they are used."""

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.cuda import many_rows
from phoenix_sparse.runtime.cuda.compiling import OLDEST
from phoenix_sparse.runtime.cuda.forms import (
    BESIDE_DENSE,
    CROSSOVER,
    FEW,
    Form,
    build,
    expand,
    form_of,
    multiply,
    numbers_of,
    parts_of,
)
from phoenix_sparse.runtime.cuda.fusing import fuse
from phoenix_sparse.runtime.cuda.layout import Layout
from phoenix_sparse.runtime.cuda.operands import FLOATS, MOST
from phoenix_sparse.runtime.cuda.scattered import Scattered
from phoenix_sparse.runtime.kernels import portable
from phoenix_sparse.runtime.packed import Packed
from phoenix_sparse.runtime.sparse_linear import SparseLinear

VARIABLE = "PHOENIX_CUDA"
TOLERANCE = 1e-2  # of a product's relative error when the kernels are tried; rounding to bfloat16 gives 2e-3


@torch.library.custom_op("phoenix_sparse::cuda_linear", mutates_args=())  # counters end as they began
def cuda_linear(
    x: Tensor, parts: list[Tensor], numbers: list[int], scales: Tensor | None, bias: Tensor | None
) -> Tensor:
    """x (…, in) · Wᵀ · scales + bias, W given by its layout's tensors and numbers (`forms.numbers_of`).

    Up to `CROSSOVER` rows of x the kernels multiply. Beyond, and where x has another dtype than the layout, W is
    expanded into memory that the next layer uses again, and torch's dense product does the work.

    Returns:
        (…, out) in x's dtype.
    """
    form = form_of(numbers, parts)
    out, columns = form.shape
    flat = x.reshape(-1, columns)
    if len(flat) == 0:
        y = flat.new_empty(0, out)
    elif x.dtype != form.dtype:
        wide = portable.wide_dtype(x.dtype)
        product = torch.nn.functional.linear(flat.to(wide), expand(form).to(wide))
        y = portable.finish(product, scales, bias, x.dtype)
    elif len(flat) <= CROSSOVER[type(form)]:
        products = [multiply(some, form, scales, bias) for some in flat.split(MOST)]
        y = products[0] if len(products) == 1 else torch.cat(products)
    else:
        y = portable.finish(torch.nn.functional.linear(flat, expand(form)), scales, bias, x.dtype)
    return y.view(*x.shape[:-1], out)


@cuda_linear.register_fake
def _(x: Tensor, parts: list[Tensor], numbers: list[int], *rest: Any) -> Tensor:  # noqa: ARG001
    return x.new_empty((*x.shape[:-1], numbers[1]))


class CudaLinear(nn.Module):
    """A packed linear in the GPU's layout, perhaps with a copy for many rows of x: for inference, never to be saved."""

    weight: Tensor
    values: Tensor
    scales: Tensor | None
    offset: Tensor | None
    dense_copy: Tensor | None
    semi_structured: Tensor | None
    offset_copy: Tensor | None

    def __init__(self, form: Form, scales: Tensor | None, bias: Tensor | None) -> None:
        """A layer of a layout.

        Args:
            form: W (out, in).
            scales: (out,) for values that were int8, or None.
            bias: (out,), or None.
        """
        super().__init__()
        self.out_features, self.in_features = form.shape
        self.numbers, self.names = numbers_of(form), parts_of(type(form))
        self.register_buffer("weight", form.values.new_empty(0, dtype=form.dtype), persistent=False)  # for models
        for name in self.names:
            self.register_buffer(name, getattr(form, name), persistent=False)
        self.register_buffer("scales", None if scales is None else scales.float(), persistent=False)
        self.register_buffer("offset", None if bias is None else bias.detach().float(), persistent=False)
        self.register_buffer("dense_copy", None, persistent=False)  # these three are `many_rows.keep`'s
        self.register_buffer("semi_structured", None, persistent=False)
        self.register_buffer("offset_copy", None, persistent=False)  # in W's dtype
        self.crossovers, self.dtype = (CROSSOVER[type(form)], BESIDE_DENSE[type(form)]), form.dtype

    @classmethod
    def of(cls, layer: SparseLinear) -> "CudaLinear":
        """A layer's layout on its GPU.

        Raises:
            PhoenixError: its dtype isn't bfloat16 or float16.
        """
        dtype, packed = layer.weight.dtype, layer.packed
        if dtype not in FLOATS:
            raise PhoenixError(
                f"sparse kernels: they compute in bfloat16 or float16, not {dtype}; give --dtype bfloat16"
            )
        form = build(packed.bitmask, packed.compressed, packed.row_offsets, layer.in_features, dtype)
        made = cls(form, layer.scales, layer.bias)
        made._settle()
        return made

    @property
    def parts(self) -> list[Tensor]:
        """The layout's tensors."""
        return [getattr(self, name) for name in self.names]

    @property
    def form(self) -> Form:
        return form_of(self.numbers, self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of W as it is held."""
        return self.form.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def dense(self) -> Tensor:
        """The weight (out, in)."""
        return portable.finish(expand(self.form).t(), self.scales, None, self.weight.dtype).t()

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out), in x's dtype, summed in float32."""
        dense, semi = self.dense_copy, self.semi_structured
        shape = (self.out_features, self.in_features)
        rows = x.numel() // self.in_features
        if x.dtype == self.dtype and many_rows.serve(rows, *self.crossovers, shape, dense, semi):
            return many_rows.multiply(x, self.out_features, self.offset_copy, dense, semi)
        return cuda_linear(x, self.parts, self.numbers, self.scales, self.offset)

    def _apply(self, fn: Any, recurse: bool = True) -> "CudaLinear":
        """Move or convert as modules do, but for W: it keeps its layout, and x in another dtype gets it expanded."""
        weight = self.weight

        def change(part: Tensor) -> Tensor:
            changed: Tensor = fn(part)
            # Nor does who casts a model mean scales, which the kernels read in float32.
            return changed if part is weight or changed.dtype == part.dtype else part.to(changed.device)

        super()._apply(change, recurse)
        self._settle()
        return self

    def _settle(self) -> None:
        """Wait until W lies where it is read: a kernel reads it before what runs ahead of it has ended."""
        if self.weight.is_cuda:
            torch.cuda.synchronize(self.weight.device)

    def _save_to_state_dict(self, *_: Any, **__: Any) -> None:
        raise PhoenixError(
            "sparse kernels: a model in the GPU's layout can't be saved; its packed directory is the model"
        )

    def extra_repr(self) -> str:
        copies = {"a dense copy": self.dense_copy, "cuSPARSELt's form": self.semi_structured}
        beside = [f"{name} of {copy.nbytes}" for name, copy in copies.items() if copy is not None]
        sizes = ", beside it ".join([f"{self.nbytes} bytes", *beside])
        return f"in_features={self.in_features}, out_features={self.out_features}, {sizes}"


def wanted(device: torch.device) -> str | None:
    """Whether sparse layers on this device are to be put in the GPU's layout, and by whose wish.

    Returns:
        `asked` where `PHOENIX_CUDA=kernels` says so, `usual` where a GPU can run them and nobody said otherwise, or
        None: on another device, on an older GPU, and with `PHOENIX_CUDA=torch`.

    Raises:
        PhoenixError: the variable has another value than kernels or torch.
    """
    choice = os.environ.get(VARIABLE) or None
    if choice not in ("kernels", "torch", None):
        raise PhoenixError(f"{VARIABLE}: {choice!r} is no way to multiply on a GPU; give kernels or torch")
    if device.type != "cuda" or choice == "torch":
        return None
    if choice == "kernels":
        return "asked"
    able = torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= OLDEST
    return "usual" if able else None


@cache
def prove(device: torch.device, dtype: torch.dtype, few: bool, int8: bool = False) -> None:
    """Compare the kernels of one layout with torch on this GPU, once.

    Args:
        device: the GPU.
        dtype: of x, and of values unless they are int8.
        few: whether few weights are kept.
        int8: whether values are, and stay so in the layout.

    Raises:
        PhoenixError: they can't be compiled, or give other results.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 700, generator=generator)
    if int8:
        weight = torch.randint(-128, 128, (200, 700), generator=generator).float()
    kept = torch.rand(weight.shape, generator=generator) < (FEW / 2 if few else 0.5)
    weight = torch.where(kept, weight, 0.0).to(dtype)
    places = 2 ** torch.arange(8)
    bytes_ = torch.nn.functional.pad(kept.long(), (0, -700 % 8)).view(200, -1, 8) @ places
    offsets = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    values, scales = (weight[kept].to(torch.int8), torch.ones(200)) if int8 else (weight[kept], None)
    packed = Packed((200, 700), bytes_.to(torch.uint8), values, offsets, scales)
    layer = CudaLinear.of(SparseLinear.of(packed, dtype).to(device))
    if not torch.equal(expand(layer.form).cpu(), weight):
        raise PhoenixError(f"sparse kernels: they unpack wrongly on this GPU; set {VARIABLE}=torch, and report it")
    for batch in (1, 16):
        x = torch.randn(batch, 700, generator=generator).to(dtype)
        y, exact = multiply(x.to(device), layer.form).cpu().double(), x.double() @ weight.double().t()
        if not bool((y - exact).norm() <= TOLERANCE * exact.norm()):
            raise PhoenixError(f"sparse kernels: wrong products on this GPU; set {VARIABLE}=torch, and report it")


def prepare(model: nn.Module, device: torch.device, prefill: many_rows.Prefill = "packed") -> None:
    """Put every packed linear of a model on this GPU into its layout, if that is wanted; the packed arrays are freed.

    Those that read the same input become one (see `fusing`). A model in float32 is left as it is, unless the kernels
    were asked for.

    Args:
        model: with packed linears; those that are in the layout already stay so.
        device: where it is.
        prefill: what they get beside it for many rows of x (`many_rows.Prefill`); `packed` leaves what is there.

    Raises:
        PhoenixError: see `wanted`, `prove`, `CudaLinear.of` and `many_rows.keep`; or copies are asked for where the
            kernels don't multiply.
    """
    wish = wanted(device)
    if wish is None or (wish == "usual" and any(layer.weight.dtype not in FLOATS for _, layer in _packed(model))):
        kernels = "copies are for GPUs" if device.type != "cuda" else "copies go with Phoenix's kernels, not torch's"
        many_rows.refuse(prefill, f"{kernels}, and this is {device}")
        return
    fuse(model)
    for name, layer in _packed(model):
        placed = CudaLinear.of(layer)
        form = placed.form
        prove(device, layer.weight.dtype, isinstance(form, Scattered), isinstance(form, Layout) and form.int8)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, placed)
    if prefill != "packed":
        many_rows.keep([part for part in model.modules() if isinstance(part, CudaLinear)], prefill, device)


def _packed(model: nn.Module) -> list[tuple[str, SparseLinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, SparseLinear)]
