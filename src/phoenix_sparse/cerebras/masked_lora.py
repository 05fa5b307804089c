"""Callbacks for ModelZoo's Trainer: masked LoRA, `delta = (B@A)·scale·mask`, and a check of what is loaded.

An export carries a copy of this file, which is why it imports nothing of Phoenix. Importing it is what registers them:
ModelZoo takes every subclass of `Callback` that it can see for a tag of its YAML.
"""

import fnmatch
from collections.abc import Callable
from functools import partial
from typing import Any, List  # noqa: UP035 (ModelZoo reads the annotation, and knows this form)

import cerebras.pytorch as cstorch
from cerebras.modelzoo.common.utils.model.lora import LoRA_Linear
from cerebras.modelzoo.trainer.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional

TRAINED = (".lora_A", ".lora_B")


class MaskedLoraLinear(LoRA_Linear):  # type: ignore[misc]
    """ModelZoo's LoRA linear with its update under the weight's mask: y = xWᵀ + x((B@A)·scale ⊙ M)ᵀ.

    The mask is the buffer `weight_mask` (out, in), which `cerebras.pytorch.sparse` keeps beside a sparse weight. The
    weight is read by a matmul of its own, so that the compiler meets it with its annotation.
    """

    def forward(self, x: Tensor) -> Tensor:
        delta = (self.lora_B @ self.lora_A) * self.scaling * self.weight_mask.to(self.lora_B.dtype)
        return functional.linear(x, self.weight, self.bias) + functional.linear(self.lora_dropout(x), delta)


def add_masked_lora(model: nn.Module, filters: List[str], r: int, alpha: float, dropout: float) -> nn.Module:  # noqa: UP006
    """Put masked LoRA on the linears whose weights the filters name, in place, and freeze everything else.

    Args:
        filters: names or patterns of weights, such as `*proj_q_dense_layer.weight`.
        r: the rank.
        alpha: the update is scaled by alpha / r.
        dropout: of the update's input.

    Raises:
        ValueError: a filter names no linear's weight.
    """
    found = set()
    for name, module in list(model.named_modules()):
        fitting = [pattern for pattern in filters if fnmatch.fnmatchcase(f"{name}.weight", pattern)]
        if not fitting or not isinstance(module, nn.Linear):
            continue
        found.update(fitting)
        layer = MaskedLoraLinear(
            module.in_features,
            module.out_features,
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            merge_weights=False,
            bias=module.bias is not None,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )
        layer.weight, layer.bias = module.weight, module.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    if missing := [pattern for pattern in filters if pattern not in found]:
        raise ValueError(f"MaskedLora: the model has no linear with a weight called {missing[0]}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith(TRAINED)
    return model


class MaskedLora(Callback):  # type: ignore[misc]
    """Puts masked LoRA on a pruned model and makes its base sparse for the compiler.

    Args:
        r: the rank.
        alpha: the update is scaled by alpha / r.
        dropout: of the update's input.
        sparsity: groups with `param_filter` (names that must each be found), `sparsity` (their true share of zeros),
            `algorithm` and `init_method`. The base is frozen: there is no optimizer state of it to prune.
    """

    def __init__(self, r: int, alpha: float, dropout: float, sparsity: List[dict]) -> None:  # noqa: UP006
        if not sparsity:
            raise ValueError("MaskedLora: sparsity has no groups; the compiler would see a dense model")
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.groups = [dict(group) for group in sparsity]
        self.filters = [pattern for group in self.groups for pattern in group["param_filter"]]

    def pre_setup(self, trainer: Any) -> None:
        given = trainer.callbacks["model"].model
        trainer.callbacks["model"].model = partial(self._masked, given)

    def _masked(self, given: Callable[[], nn.Module] | nn.Module) -> nn.Module:
        model = given if isinstance(given, nn.Module) else given()
        return add_masked_lora(model, self.filters, self.r, self.alpha, self.dropout)

    def setup(self, trainer: Any) -> None:
        trainer.model.apply(cstorch.sparse.configure(self.groups))

    def on_save_trainer_state(self, trainer: Any, state_dict: dict[str, Any]) -> None:
        """Nothing to keep: the mask is a buffer of the model."""

    def on_load_trainer_state(self, trainer: Any, state_dict: dict[str, Any]) -> None:
        """Nothing was kept."""


class CompleteCheckpoint(Callback):  # type: ignore[misc]
    """Refuses a checkpoint that leaves weights random.

    Strict loading has to be off, for the first checkpoint has neither masks nor an adapter; so names are checked here.
    """

    def on_load_checkpoint(self, trainer: Any, state_dict: dict[str, Any]) -> None:
        given = {name.removeprefix("model.") for name in state_dict["model"]}
        wanted = [name.removeprefix("model.") for name, _ in trainer.model.named_parameters()]
        missing = [name for name in wanted if name not in given and not name.endswith(TRAINED)]
        if missing:
            raise RuntimeError(f"the checkpoint has no {missing[0]} ({len(missing)} weights would stay random)")

    def on_save_trainer_state(self, trainer: Any, state_dict: dict[str, Any]) -> None:
        """Nothing to keep."""

    def on_load_trainer_state(self, trainer: Any, state_dict: dict[str, Any]) -> None:
        """Nothing was kept."""
