"""Importance scores: the higher, the sooner a weight is kept. All are (out, in), float32, on the weight's device."""

import hashlib

import torch
from torch import Tensor


def magnitude_importance(weight: Tensor) -> Tensor:
    """|W|."""
    return weight.detach().abs().float()


def wanda_importance(weight: Tensor, input_square_mean: Tensor) -> Tensor:
    """|W_ij| · ‖X_j‖₂, up to one factor per layer (Sun et al., arXiv 2306.11695, eq. 1).

    Args:
        weight: (out, in).
        input_square_mean: (in,), float32: the squared inputs of each column, summed over the tokens of a sequence
            and averaged over sequences, as `ColumnNorms` gathers them.
    """
    return weight.detach().abs() * torch.sqrt(input_square_mean.reshape(1, -1))


def random_importance(weight: Tensor, seed: int, name: str) -> Tensor:
    """Uniform noise that depends on the seed and the layer's name alone, not on the device or the order of layers."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(key)
    return torch.rand(weight.shape, generator=generator).to(weight.device)


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
