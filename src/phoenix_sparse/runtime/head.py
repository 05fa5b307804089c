"""A packed model's head: dense, and once its linears are packed the largest thing that decoding a token reads."""

from typing import Any

import torch
from torch import Tensor, nn

from phoenix_sparse.runtime.kernels.choice import own_dense_is_faster
from phoenix_sparse.runtime.kernels.library import Library, library
from phoenix_sparse.runtime.kernels.linear import watched
from phoenix_sparse.runtime.kernels.placing import place

MOST = 8  # rows of x that the kernel takes


class Head(nn.Linear):
    """y = x Wᵀ with a dense W, which stays a parameter as it was, and tied if it was.

    A few bfloat16 rows on a CPU are multiplied by Phoenix's dense kernel where that is faster than torch, which reads W
    at half of the memory's speed then. All else is torch's: gradients, compiled graphs, GPUs, prompts.
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> "Head":
        """The same linear, without a copy of W."""
        with torch.device("meta"):
            head = cls(linear.in_features, linear.out_features, bias=False)
        head.weight = linear.weight
        return head.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out), in x's dtype, summed in float32."""
        compiled = self._kernels(x)
        if compiled is None:
            return super().forward(x)
        flat = x.reshape(-1, self.in_features).contiguous()
        if not own_dense_is_faster(compiled, flat, self.weight):
            return super().forward(x)
        return compiled.dense(flat, self.weight).view(*x.shape[:-1], self.out_features)

    def _kernels(self, x: Tensor) -> Library | None:
        """The kernels, if they have one for this x."""
        if watched(x) or x.device.type != "cpu" or self.weight.device.type != "cpu":
            return None
        if x.dtype != torch.bfloat16 or self.weight.dtype != torch.bfloat16 or not self.weight.is_contiguous():
            return None
        if not 1 <= x.numel() // self.in_features <= MOST or x.shape[-1] != self.in_features:
            return None
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return None
        compiled = library()
        return compiled if compiled is not None and compiled.has_dense else None


def head_of(model: Any) -> nn.Linear | None:
    """A model's head, if `Head` can be in its place: a plain linear without bias."""
    found = model.get_output_embeddings()
    return found if type(found) in (nn.Linear, Head) and found.bias is None else None


def put_head(model: Any) -> None:
    """Give a model on the CPU a `Head`, its weight on huge pages as packed weights are; once, when it is loaded."""
    head = head_of(model)
    # accelerate's hooks, with which models are spread over devices, would be lost.
    if head is not None and head.weight.device.type == "cpu" and not hasattr(head, "_hf_hook"):
        head.weight.data = place(head.weight.data)
        model.set_output_embeddings(Head.of(head))
