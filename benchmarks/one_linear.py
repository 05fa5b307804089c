"""One linear, forward and backward: its ways to be computed, the check of their results, their times and memory."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from measuring import (
    FLOOR,
    LORA,
    RANK,
    SCALE,
    SEED,
    SPARSITY,
    Context,
    mixed,
    peak_bytes,
    saved_bytes,
    summary,
    time_in_turn,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from phoenix_sparse.errors import CheckFailed
from phoenix_sparse.finetuning.adapter import ADAPTER, ElasticLinear

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
WARMUP = {"cuda": 10, "cpu": 2}


class Variant(NamedTuple):
    """A way to compute one linear: `wanted` are the leaves whose gradients it gives."""

    forward: Callable[[Tensor], Tensor]
    wanted: list[Tensor]
    context: Context = nullcontext

    def run(self, x: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        """Give y and the gradients of x and of `wanted`."""
        with self.context():
            y = self.forward(x)
        return (y, *torch.autograd.grad(y, [x, *self.wanted], upstream))


class Setting(NamedTuple):
    """One linear with random data: a weight of half zeros and an update about as large."""

    x: Tensor  # (tokens, in)
    upstream: Tensor  # (tokens, out), the gradient that comes to y
    weight: Tensor  # (out, in)
    mask: Tensor  # (out, in)
    a: Tensor  # (rank, in), float32
    b: Tensor  # (out, rank), float32


def make_setting(shape: tuple[int, int], tokens: int, device: torch.device, dtype: torch.dtype) -> Setting:
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    out, inner = shape
    mask = torch.rand(out, inner, generator=generator, device=device) >= SPARSITY
    return Setting(
        x=normal(tokens, inner).to(dtype).requires_grad_(),
        upstream=normal(tokens, out).to(dtype),
        weight=(normal(out, inner) * inner**-0.5 * mask).to(dtype),
        mask=mask,
        a=normal(RANK, inner) * inner**-0.5,
        b=normal(out, RANK) * RANK**-0.5 / SCALE,
    )


def linear_variants(setting: Setting) -> dict[str, Variant]:
    weight = setting.weight
    trained = nn.Parameter(weight)
    stock, ours = _adapted(setting, elastic=False), _adapted(setting, elastic=True)
    ours.set_mask(setting.mask)
    a, b = nn.Parameter(setting.a), nn.Parameter(setting.b)

    def two_products(x: Tensor) -> Tensor:
        """As SQFT writes it, given its mask ready made."""
        update = (b.to(weight.dtype) @ a.to(weight.dtype)) * SCALE * setting.mask
        return functional.linear(x, weight) + functional.linear(x, update)

    variants = {
        "frozen": Variant(lambda x: functional.linear(x, weight), []),
        LORA: Variant(stock, _factors(stock), mixed(weight.device)),
        "lora_plain": Variant(stock, _factors(stock)),
        "ours": Variant(ours, _factors(ours)),
        "two_products": Variant(two_products, [a, b]),
        FLOOR: Variant(lambda x: functional.linear(x, trained), [trained]),
    }
    if weight.device.type == "cpu":  # float32: there is nothing to cast
        del variants["lora_plain"]
    return variants


def _adapted(setting: Setting, *, elastic: bool) -> Any:
    """A linear with an adapter, as PEFT makes it: its own layer, or Phoenix's in its place."""
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = nn.Parameter(setting.weight, requires_grad=False)
    linear.out_features, linear.in_features = setting.weight.shape
    config = LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules=["linear"])
    if elastic:
        config._register_custom_module({nn.Linear: ElasticLinear})
    layer: Any = get_peft_model(nn.ModuleDict({"linear": linear}), config).get_submodule("base_model.model.linear")
    with torch.no_grad():
        for parameter, value in zip(_factors(layer), (setting.a, setting.b), strict=True):
            parameter.copy_(value)
    return layer


def _factors(layer: Any) -> list[Tensor]:
    return [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]


def check(setting: Setting, variants: dict[str, Variant]) -> dict[str, float]:
    """Compare with float64, and ours with the two products; give the relative errors of y and all gradients.

    Raises:
        CheckFailed: an error is over the limit of the dtype.
    """
    x, upstream, weight, a, b = (t.detach().double() for t in setting if t.dtype != torch.bool)
    effective = weight + setting.mask * (SCALE * (b @ a))
    full = (upstream.t() @ x) * setting.mask
    exact = (x @ effective.t(), upstream @ effective, SCALE * (b.t() @ full), SCALE * (full @ a.t()))
    ours, two = (variants[name].run(setting.x, setting.upstream) for name in ("ours", "two_products"))
    errors = {}
    for label, results, references in (
        ("ours against float64", ours, exact),
        ("two products against float64", two, exact),
        ("ours against two products", ours, two),
    ):
        for name, result, reference in zip(("y", "grad x", "grad A", "grad B"), results, references, strict=True):
            error = _relative_error(result, reference)
            errors[f"{label}, {name}"] = error
            if not error <= LIMIT[setting.weight.dtype]:
                raise CheckFailed(f"masked linear {tuple(weight.shape)}: {label}, {name}: relative error {error:.1e}")
    return errors


def _relative_error(result: Tensor, reference: Tensor) -> float:
    exact = reference.detach().double()
    return float((result.detach().double() - exact).norm() / exact.norm())


def measure_linear(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int], tokens: int, repeats: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One linear, forward and backward with the gradient of its input: relative errors, and a row a variant."""
    setting = make_setting(shape, tokens, device, dtype)
    variants = linear_variants(setting)
    errors = check(setting, variants)
    steps = {name: _bind(variant.run, setting.x, setting.upstream) for name, variant in variants.items()}
    seconds = time_in_turn(steps, device, repeats, WARMUP[device.type])
    rows = []
    for name, variant in variants.items():
        memory = (
            peak_bytes(steps[name])
            if device.type == "cuda"
            else saved_bytes(_bind(variant.forward, setting.x), [*setting, *variant.wanted])
        )
        figures = summary(seconds[name], {"floor": seconds[FLOOR], "lora": seconds[LORA]})
        rows.append({"variant": name, "shape": list(shape), "tokens": tokens, "memory_bytes": memory} | figures)
    return errors, rows


def _bind(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)
