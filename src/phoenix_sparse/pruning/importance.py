"""Importance scores: the higher, the sooner a weight is kept.

An importance is a small function from a linear's weight and what was seen of it to scores of the weight's shape.
Users register their own:

    @register_importance("half_wanda", inputs=True)
    def half_wanda(weight, seen):
        return weight.abs() * seen.input_norm.sqrt()
"""

import hashlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import torch
from torch import Tensor, nn

from phoenix_sparse.errors import PhoenixError, first_line


@dataclass
class Seen:
    """What an importance may use beside the weight. Only what it asked for when registered is measured.

    Attributes:
        name: the linear's full name.
        seed: the recipe's.
        input_norm: (in,), float32: ‖X_j‖₂ over the calibration tokens, up to one factor per layer (`inputs=True`).
        gradient: (out, in), float32: mean over samples of the absolute gradient of the task's loss on a sample's
            completion tokens (`gradients=True`).
    """

    name: str = ""
    seed: int = 0
    input_norm: Tensor | None = None
    gradient: Tensor | None = None


ENTRY_POINTS = "phoenix_sparse.importances"

Score = Callable[[Tensor, Seen], Tensor]


@dataclass(frozen=True)
class Importance:
    """A registered importance: its function, what has to be measured for it, and its usual comparison group."""

    name: str
    score: Score
    inputs: bool = False
    gradients: bool = False
    per_row: bool = False


_REGISTRY: dict[str, Importance] = {}


def register_importance(
    name: str, *, inputs: bool = False, gradients: bool = False, per_row: bool = False
) -> Callable[[Score], Score]:
    """Make a function known as an importance, for recipes and commands in this process.

    Args:
        name: what recipes call it; another function of that name is replaced only by the same one loaded again.
        inputs: measure the norms of the linear's inputs.
        gradients: measure the gradients of the task's loss.
        per_row: weights of one output row compete with each other, unless the recipe says otherwise.

    Raises:
        PhoenixError: the name is taken or none, or what is registered can't be called.
    """
    if not isinstance(name, str) or not name.strip():
        raise PhoenixError(
            'register_importance: it takes a name first: @register_importance("half_wanda", inputs=True)'
        )

    def register(score: Score) -> Score:
        if not callable(score):
            raise PhoenixError(f"importance: {name!r} is {type(score).__name__}; register a function (weight, seen)")
        taken = _REGISTRY.get(name)
        if taken is not None and _origin(taken.score) != _origin(score):
            raise PhoenixError(f"importance: {name!r} is registered already; choose another name")
        _REGISTRY[name] = Importance(name, score, inputs, gradients, per_row)
        return score

    return register


def _origin(score: Score) -> tuple[object, ...]:
    """What stays the same when a function's module is loaded again, or its cell of a notebook run again.

    All lambdas of a module share a name; what tells them apart is where they stand.
    """
    name = getattr(score, "__qualname__", None)
    if name is None:  # an object with __call__: only itself
        return (id(score),)
    origin = (getattr(score, "__module__", None), name)
    code = getattr(score, "__code__", None)
    return (*origin, code.co_filename, code.co_firstlineno) if "<lambda>" in name and code else origin


def find_importance(name: str) -> Importance:
    """The importance of a name: registered in this process, or by an installed package.

    A package offers its own by an entry point of the group `phoenix_sparse.importances` that names the module.

    Raises:
        PhoenixError: there is none; the message lists those that there are. Or its package can't be imported.
    """
    if name not in _REGISTRY:
        for point in entry_points(group=ENTRY_POINTS):
            if point.name == name:
                _load(point)
                if name not in _REGISTRY:
                    raise PhoenixError(f"importance: {point.value} offers {name!r} and doesn't register it")
    if name not in _REGISTRY:
        raise PhoenixError(f"importance: {name!r} is not known; use one of {', '.join(importances())}")
    return _REGISTRY[name]


def _load(point: EntryPoint) -> None:
    try:
        point.load()  # registers it as it is imported
    except PhoenixError:
        raise
    except Exception as error:  # somebody else's code
        raise PhoenixError(
            f"importance: {point.name!r} is offered by {point.value}, which can't be loaded ({first_line(error)})"
        ) from error


def run_importance(importance: Importance, weight: Tensor, seen: Seen) -> Tensor:
    """The scores that an importance's function gives.

    Raises:
        PhoenixError: it failed; the message says how and at which linear, and the traceback hangs on it. What the GPU
            raises, as where its memory is full, is passed on.
    """
    try:
        return importance.score(weight, seen)
    except PhoenixError:
        raise
    except Exception as error:  # somebody else's code
        if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
            raise  # the GPU's trouble, and not the function's
        asks = {"inputs=True": importance.inputs, "gradients=True": importance.gradients}
        missing = " and ".join(what for what, asked in asks.items() if not asked)
        none = "NoneType" in str(error) and missing  # it took what wasn't measured for a tensor
        hint = f"; it was registered without {missing}: what that measures is None" if none else ""
        raise PhoenixError(
            f"importance {importance.name}: its function fails at {seen.name} "
            f"({type(error).__name__}: {first_line(error)}, {_place(error)}){hint}"
        ) from error


def _place(error: BaseException) -> str:
    """The file and line that an exception comes from."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def importances() -> list[str]:
    """The names of all importances: registered in this process, or offered by installed packages."""
    return sorted({*_REGISTRY, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def _weight_of(layer: Tensor | nn.Module) -> Tensor:
    weight = getattr(layer, "weight", None) if isinstance(layer, nn.Module) else layer
    if not isinstance(weight, Tensor):
        raise PhoenixError(f"importance: {type(layer).__name__} has no weight; give a linear layer, or its weight")
    return weight.detach()


def _gradient_of(layer: Tensor | nn.Module) -> Tensor:
    gradient = layer if isinstance(layer, Tensor) else getattr(getattr(layer, "weight", None), "grad", None)
    if gradient is None:
        raise PhoenixError(
            f"importance: {type(layer).__name__} has no gradient yet; call loss.backward() first, or give the gradient"
        )
    return gradient


def magnitude_importance(weight: Tensor | nn.Linear) -> Tensor:
    """|W|, (out, in) float32; of a weight, or of a linear layer.

    Raises:
        PhoenixError: it is neither.
    """
    return _weight_of(weight).abs().float()


def wanda_importance(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|W_ij| · ‖X_j‖₂ (Sun et al., arXiv 2306.11695, eq. 1). `input_norm`: (in,) float32."""
    return weight.detach().abs() * input_norm.reshape(1, -1)


def ria_importance(weight: Tensor, input_norm: Tensor, power: float = 0.5) -> Tensor:
    """(|W_ij| / Σ_i|W_ij| + |W_ij| / Σ_j|W_ij|) · ‖X_j‖₂^a, a = 0.5 (Zhang et al., RIA, ICLR 2024, eq. 3).

    It is relative to the row already, so that all weights of a layer compete, as in the published code.
    """
    absolute = weight.detach().abs().float()
    tiny = torch.finfo(torch.float32).tiny  # a row or column of zeros scores zero, not NaN
    relative = absolute / absolute.sum(0, keepdim=True).clamp_min(tiny)
    relative += absolute / absolute.sum(1, keepdim=True).clamp_min(tiny)
    return relative * input_norm.reshape(1, -1) ** power


def gradient_importance(gradient: Tensor | nn.Linear) -> Tensor:
    """|∂L/∂W|, averaged over samples, or as loss.backward() left it in a linear layer. (out, in) float32.

    Raises:
        PhoenixError: the layer has no gradient.
    """
    return _gradient_of(gradient).abs().float()


def taylor_importance(weight: Tensor | nn.Linear, gradient: Tensor | None = None) -> Tensor:
    """|W · ∂L/∂W|, the first-order change of the loss when a weight goes (Molchanov et al., arXiv 1906.10771, eq. 8).

    With the gradient's absolute values averaged over samples: the signed mean of a trained model is near zero. Without
    a gradient, the one that loss.backward() left in the linear layer. (out, in) float32.

    Raises:
        PhoenixError: the layer has no gradient, or a weight was given alone.
    """
    if gradient is None:
        if isinstance(weight, Tensor):
            raise PhoenixError("importance: taylor_importance(weight, gradient) needs the gradient too, or a layer")
        gradient = _gradient_of(weight)
    return _weight_of(weight).abs().float() * gradient.abs()


def gblm_importance(weight: Tensor, input_norm: Tensor, gradient: Tensor, scale: float = 100.0) -> Tensor:
    """|W_ij| · ‖X_j‖₂ + α · |W_ij| · |G_ij| (Das et al., arXiv 2311.04902, eq. 4), α = 100 as there."""
    absolute = weight.detach().abs().float()
    return absolute * input_norm.reshape(1, -1) + scale * absolute * gradient.abs()


def random_importance(weight: Tensor, seed: int, name: str) -> Tensor:
    """Uniform noise that depends on the seed and the layer's name alone, not on the device or the order of layers."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(key)
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def _need(value: Tensor | None) -> Tensor:
    assert value is not None, "the importance was registered without what it uses"
    return value


register_importance("magnitude")(lambda weight, _seen: magnitude_importance(weight))
register_importance("random")(lambda weight, seen: random_importance(weight, seen.seed, seen.name))
register_importance("wanda", inputs=True, per_row=True)(
    lambda weight, seen: wanda_importance(weight, _need(seen.input_norm))
)
register_importance("ria", inputs=True)(lambda weight, seen: ria_importance(weight, _need(seen.input_norm)))
register_importance("gradient", gradients=True)(lambda _weight, seen: gradient_importance(_need(seen.gradient)))
register_importance("taylor", gradients=True)(lambda weight, seen: taylor_importance(weight, _need(seen.gradient)))
register_importance("gblm", inputs=True, gradients=True, per_row=True)(
    lambda weight, seen: gblm_importance(weight, _need(seen.input_norm), _need(seen.gradient))
)
