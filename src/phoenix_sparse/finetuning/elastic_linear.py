"""A linear with an elastic low-rank update, as PEFT's LoRA holds it: masked, dense, or multiplied with the weight."""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional

from phoenix_sparse.finetuning.masked_linear import (
    effective_weight,
    masked_linear,
    pack_mask,
    unpack_mask,
    uses_kernels,
)
from phoenix_sparse.finetuning.settings import Method, ScaleRule

ADAPTER = "default"


class ElasticLinear(lora.Linear):
    """A LoRA layer with a mask (or none, for a dense update) and a rank that can be lowered to a prefix.

    With `method = "hira"` the update is W⊙(s·BA) in place of M⊙(s·BA) (HiRA, Huang et al., ICLR 2025): a zero of W
    stays zero whatever the mask, which is therefore not kept.
    """

    kept: Tensor | None  # the mask, boolean (out, in), or as bits where the fused kernels read it

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.register_buffer("kept", None, persistent=False)
        self.rank = self.r[adapter_name]
        self.method: Method = "lora"
        self.scale_rule: ScaleRule = "fixed"
        self.written_out: Tensor | None = None
        # Of a mask that evolves (`evolve.MovingMask`): what it is, and who sees the weight's gradient.
        self.moving: Any = None
        self.collect: Callable[[Tensor], None] | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen W, (out, in)."""
        weight = self.get_base_layer().weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def gate(self) -> Tensor | None:
        """What the update is multiplied with, element by element: the mask, W itself, or nothing."""
        return self.weight if self.method == "hira" else self.kept

    @property
    def alpha(self) -> float:
        """What stock PEFT divides by the present rank to get the scale."""
        return self.lora_alpha[ADAPTER] if self.scale_rule == "alpha_over_rank" else self.scaling[ADAPTER] * self.rank

    @property
    def scale(self) -> float:
        """s at the present rank."""
        if self.scale_rule == "alpha_over_rank":
            return self.lora_alpha[ADAPTER] / self.rank
        return self.scaling[ADAPTER]

    @property
    def mask(self) -> Tensor | None:
        """The mask, boolean (out, in); None for a dense update and for HiRA."""
        if self.kept is None or self.kept.dtype == torch.bool:
            return self.kept
        return unpack_mask(self.kept, self.weight.shape[1])

    def set_mask(self, mask: Tensor) -> None:
        mask = mask.to(self.weight.device)
        self.kept = pack_mask(mask) if uses_kernels(self.weight) else mask

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank), cut to the present rank."""
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        return a[: self.rank], b[:, : self.rank]

    def merged_weight(self) -> Tensor:
        """W + M⊙(s·BA), or W + W⊙(s·BA), in W's dtype: what is merged, and what a gated layer computes with."""
        return effective_weight(self.weight, self.gate, *self.factors(), self.scale)

    def get_delta_weight(self, adapter: str) -> Tensor:
        assert adapter == ADAPTER
        return (self.merged_weight() - self.weight).to(self.factors()[1].dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        a, b = self.factors()
        if self.written_out is not None:
            return functional.linear(x.to(self.written_out.dtype), self.written_out, base.bias)
        gate = self.gate
        if gate is not None:
            return masked_linear(x, base.weight, base.bias, gate, a, b, self.scale, self.collect)
        low = functional.linear(self.lora_dropout[ADAPTER](x), a.to(x.dtype))
        return base(x) + functional.linear(low, (b * self.scale).to(x.dtype))


@torch.no_grad()
def write_out(layer: ElasticLinear) -> None:
    """Compute with the merged weight from now on, until `written_out` is set to None."""
    layer.written_out = layer.merged_weight()
