"""Mean and spread of a linear's inputs, column by column."""

import torch
from torch import Tensor


class Moments:
    """Gather each input column's mean and variance over tokens; passes are merged by Chan, Golub & LeVeque (1979).

    Merging means and sums of squared deviations keeps a small variance beside a large mean, which the difference of
    two large sums would lose in float32.

    Attributes:
        mean: (in,), float32.
        variance: (in,), float32, of the population (divided by n).
        tokens: tokens seen.
        sequences: sequences seen.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.mean = torch.zeros(columns, device=device)
        self.variance = torch.zeros(columns, device=device)
        self.tokens = 0
        self.sequences = 0

    @torch.no_grad()
    def add(self, inputs: Tensor) -> None:
        """Take in the inputs of one forward pass, (sequences, tokens, in), or (tokens, in) of one sequence."""
        flat = inputs.reshape(-1, inputs.shape[-1]).float()
        if flat.shape[0] == 0:
            return
        variance, mean = torch.var_mean(flat, dim=0, correction=0)
        total = self.tokens + flat.shape[0]
        share = flat.shape[0] / total
        step = mean - self.mean
        self.mean += step * share
        self.variance += (variance - self.variance) * share + step.square() * (share * (1 - share))
        self.tokens = total
        self.sequences += inputs.shape[0] if inputs.dim() == 3 else 1

    @property
    def squared_norm(self) -> Tensor:
        """‖X_j‖₂² over all tokens, (in,) float32."""
        return (self.variance + self.mean.square()) * self.tokens

    @property
    def sum_per_sequence(self) -> Tensor:
        """The sum of a column over the tokens of a sequence, averaged over sequences, (in,) float32."""
        return self.mean * (self.tokens / max(self.sequences, 1))
