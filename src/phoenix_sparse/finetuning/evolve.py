"""A mask that evolves while its weights train, at constant sparsity of every layer.

After some optimizer steps, a layer's least important kept weights are dropped, and as many pruned ones are grown where
the gradient of the effective weight is largest: the dropping and growing of SEFT (arXiv 2505.24037) and RigL (arXiv
1911.11134), with RigL's falling share, on the mask itself. What grows begins at zero in the base; an adapter's update
reaches it as soon as the mask does. An adapter's base is always the pruned model's weight under the present mask: what
is dropped and comes back has its value again, so that the mask alone says what the model is.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.finetuning.elastic_linear import ElasticLinear
from phoenix_sparse.finetuning.full import TrainedLinear
from phoenix_sparse.finetuning.masked_linear import pack_mask, unpack_mask
from phoenix_sparse.finetuning.sections import EvolveSettings
from phoenix_sparse.masks import Masks

Together = Callable[[Tensor], Tensor]


def share_at(settings: EvolveSettings, step: int, steps: int) -> float:
    """The share of kept weights that is replaced when `step` of `steps` are done; 0 where the mask stays.

    fraction/2·(1 + cos(π·step/end)), the cosine of RigL (section 3, eq. 1), after every so many steps before the end.
    """
    end = settings.until * steps
    if step == 0 or step % settings.every or step >= end:
        return 0.0
    return settings.fraction / 2 * (1 + math.cos(math.pi * step / end))


def require_change(settings: EvolveSettings, steps: int) -> None:
    """Refuse to let a mask evolve in a training that ends, or holds the mask, before the first change.

    Raises:
        PhoenixError: `every` is too large for so many steps.
    """
    if not share_at(settings, settings.every, steps):
        raise PhoenixError(
            f"finetune.evolve.every: {settings.every} steps, and the mask stays from step "
            f"{math.ceil(settings.until * steps)} of {steps} on, so it would never change; lower every, or leave "
            "evolve out"
        )


@torch.no_grad()
def exchange(mask: Tensor, weight: Tensor, gradient: Tensor, share: float, drop: str) -> Tensor:
    """A mask with as many weights as the one before.

    Args:
        mask: boolean (out, in).
        weight: the effective weight, (out, in).
        gradient: of the loss by it, (out, in).
        share: of the kept weights to replace, at most; as many as there are pruned weights with a gradient.
        drop: `sensitivity`: the smallest |w·g|; `magnitude`: the smallest |w|.
    """
    kept, wish = mask.flatten(), gradient.abs().flatten().float().masked_fill(mask.flatten(), -1)
    count = min(round(share * int(kept.sum())), int((wish > 0).sum()))
    score = weight.abs().flatten().float()
    if drop == "sensitivity":
        score = score * gradient.abs().flatten().float()
    result = kept.clone()
    result[score.masked_fill_(~kept, math.inf).topk(count, largest=False).indices] = False
    result[wish.topk(count).indices] = True
    return result.view_as(mask)


def require_unstructured(masks: Masks) -> None:
    """Refuse masks of a pattern, which an exchange of single weights would break, by what they look like.

    Raises:
        PhoenixError: every group of some weights side by side keeps as many (N:M), or all of a layer's rows and
            columns are kept whole or not at all (structured), or weights are kept in blocks.
    """
    pruned = [mask for mask in masks.values() if not mask.all()]
    if pruned and any(all(looks(mask) for mask in pruned) for looks in (*map(_grouped, (4, 8, 16)), _whole, _blocks)):
        raise PhoenixError(
            "finetune.evolve: the masks follow a pattern (N:M, blocks or structured) that single weights would break; "
            "use sparsify.pattern=unstructured, or leave evolve out"
        )


class MovingMask:
    """The mask of one layer as it changes, and the gradient that its next change goes by."""

    def __init__(self, layer: ElasticLinear | TrainedLinear) -> None:
        self.layer, self.share, self.drop, self.last = layer, 0.0, "sensitivity", False
        self.gradient: Tensor | None = None
        self.next: Tensor | None = None
        self.first = pack_mask(self.mask)
        # Of an adapter's base: where weights of the pruned model are dropped at present, and what they were.
        self.aside = (torch.empty(0, dtype=torch.long), torch.empty(0))

    @property
    def mask(self) -> Tensor:
        mask = self.layer.mask
        assert mask is not None
        return mask

    def collect(self, gradient: Tensor) -> None:
        """Take the gradient of the effective weight, in the backward pass of a layer.

        With the last one of a step that one process makes, the mask is chosen at once: where a step has a single
        backward pass, no matrix of the weight's size outlives the layer's own.
        """
        if self.last:
            self.gradient = gradient if self.gradient is None else self.gradient.add_(gradient)
            self.choose()
        else:  # what is given is overwritten afterwards
            self.gradient = gradient.clone() if self.gradient is None else self.gradient.add_(gradient)

    def choose(self, together: Together = lambda gradient: gradient) -> None:
        if self.gradient is None:
            return
        weight = self.layer.rounded if isinstance(self.layer, TrainedLinear) else self.layer.merged_weight()
        self.next = pack_mask(exchange(self.mask, weight, together(self.gradient), self.share, self.drop))
        self.gradient = None

    @torch.no_grad()
    def put(self, mask: Tensor) -> None:
        """Compute with another mask from now on."""
        if isinstance(self.layer, TrainedLinear):
            self.layer.mask = mask.to(self.layer.weight.device)  # the one before may be the caller's
            self.layer.weight.mul_(self.layer.mask)
            return
        weight = self.layer.weight
        mask, flat = mask.to(weight.device), weight.view(-1)
        places, values = (part.to(weight.device) for part in self.aside)
        flat[places] = values.to(weight.dtype)
        places = (unpack_mask(self.first, weight.shape[1]).to(weight.device) & ~mask).flatten().nonzero().flatten()
        self.aside = (places, flat[places].clone())
        flat[places] = 0
        self.layer.set_mask(mask)


class Evolution:
    """All moving masks of a model, through a training."""

    def __init__(
        self, model: nn.Module, settings: EvolveSettings, steps: int, changes: list[dict[str, Any]] | None = None
    ) -> None:
        self.settings, self.steps, self.changes = settings, steps, list(changes or [])
        self.moving: dict[str, MovingMask] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, ElasticLinear | TrainedLinear):
                layer.moving = self.moving[name] = MovingMask(layer)
        require_unstructured({name: one.mask for name, one in self.moving.items()})

    def watch(self, done: int, *, last: bool) -> None:
        """Before a backward pass: collect gradients if the mask changes when `done` steps are done.

        Args:
            done: optimizer steps, with the one that this pass belongs to.
            last: whether no other pass, and no other process, adds to the step's gradient.
        """
        share = share_at(self.settings, done, self.steps)
        for one in self.moving.values():
            one.share, one.drop, one.last = share, self.settings.drop, last
            one.layer.collect = one.collect if share else None

    def forget(self) -> None:
        """Begin a step's gradient anew."""
        for one in self.moving.values():
            one.gradient = one.next = None

    def choose(self, together: Together) -> None:
        """Before an optimizer step: choose the masks that weren't within the backward pass, by the same weights.

        Args:
            together: sums over the processes.
        """
        for one in self.moving.values():
            one.choose(together)

    def change(self, done: int, optimizer: Any) -> None:
        """After an optimizer step: put the next masks in place, if it was a step that changes them.

        Args:
            done: optimizer steps.
            optimizer: whose moments of dropped weights become zero, where the weights themselves train.
        """
        share = share_at(self.settings, done, self.steps)
        if not share:
            return
        replaced = 0
        for one in self.moving.values():
            assert one.next is not None, "every layer has a gradient in every step"
            before, mask = one.mask.clone(), unpack_mask(one.next, one.layer.weight.shape[1])
            replaced += int((before & ~mask).sum())
            one.put(mask)
            if isinstance(one.layer, TrainedLinear):
                state = optimizer.state[one.layer.weight]
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment].mul_(mask)
        self.forget()
        self.changes.append({"step": done, "share": share, "replaced": replaced})


def moving_masks(model: nn.Module) -> Mapping[str, MovingMask]:
    """The moving masks of a model by its layers' names; none where the mask stays."""
    found = ((name, getattr(layer, "moving", None)) for name, layer in model.named_modules())
    return {name: one for name, one in found if one is not None}


def _grouped(size: int) -> Callable[[Tensor], bool]:
    def looks(mask: Tensor) -> bool:
        if mask.shape[1] % size:
            return False
        kept = mask.view(-1, size).sum(1)
        return bool((kept == kept[0]).all())

    return looks


def _whole(mask: Tensor) -> bool:
    return bool((mask == (mask.any(1)[:, None] & mask.any(0)[None])).all())


def _blocks(mask: Tensor) -> bool:
    """Whether rows are alike in groups of four, as in blocks of 4 or more rows, or columns are."""
    rows, columns = mask.shape
    tall = rows % 4 == 0 and bool((mask.view(-1, 4, columns) == mask.view(-1, 4, columns)[:, :1]).all())
    return tall or (columns % 4 == 0 and bool((mask.view(rows, -1, 4) == mask.view(rows, -1, 4)[..., :1]).all()))
