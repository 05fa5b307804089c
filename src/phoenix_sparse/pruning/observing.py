"""What is measured at a linear's input while the calibration tokens pass: norms, and what weight updates need."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.reconstruction.gram import Gram
from phoenix_sparse.pruning.reconstruction.moments import Moments


class ColumnNorms:
    """Gather ‖X_j‖₂² of a linear's inputs, as the Wanda repository does: a running mean over sequences, in float32."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.mean = torch.zeros(columns, device=device)
        self.sequences = 0

    def add(self, inputs: Tensor) -> None:
        """Take in the inputs of one forward pass, (sequences, tokens, in)."""
        count = inputs.shape[0] if inputs.dim() == 3 else 1
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).t().float()
        self.mean *= self.sequences / (self.sequences + count)
        self.sequences += count
        self.mean += torch.norm(flat, p=2, dim=1) ** 2 / self.sequences

    @property
    def norm(self) -> Tensor:
        """(in,) float32: ‖X_j‖₂ up to one factor per layer."""
        return torch.sqrt(self.mean)


class Observer:
    """Everything that one linear's pruning needs to know of its inputs."""

    def __init__(self, columns: int, device: torch.device, *, gram: bool = False, moments: bool = False) -> None:
        self.norms = ColumnNorms(columns, device)
        self.gram = Gram(columns, device) if gram else None
        self.moments = Moments(columns, device) if moments else None
        self.passes = 0

    def add(self, inputs: Tensor) -> None:
        self.passes += 1
        self.norms.add(inputs)
        for part in (self.gram, self.moments):
            if part is not None:
                part.add(inputs)


@contextmanager
def observing(layers: Mapping[str, nn.Linear], **needs: bool) -> Iterator[dict[str, Observer]]:
    """Observe the inputs of linears while the `with` lasts.

    Linears with the very same input (q, k and v; gate and up) share an observer: a Gram matrix is dear.

    Raises:
        PhoenixError: linears had the same input in one forward pass, and not in another.
    """
    observers = {name: Observer(layer.in_features, layer.weight.device, **needs) for name, layer in layers.items()}
    last: dict[str, Any] = {"inputs": None, "name": None}
    sharing: dict[str, str] = {}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if last["inputs"] is args[0]:
                seen = observers[last["name"]]
                if observers[name] is seen:
                    return
                if observers[name].passes == 0 and seen.passes == 1:  # both have seen this one input
                    observers[name], sharing[name] = seen, last["name"]
                    return
            if name in sharing:
                raise PhoenixError(
                    f"{name} has the inputs of {sharing[name]} in some forward passes and others in the rest; "
                    "such a block can't be observed"
                )
            last.update(inputs=args[0], name=name)
            observers[name].add(args[0])

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield observers
    finally:
        for hook in hooks:
            hook.remove()
        last.clear()
