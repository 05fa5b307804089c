from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from phoenix_sparse.pruning.reconstruction.gram import Gram
from phoenix_sparse.pruning.reconstruction.moments import Moments


class Layer(NamedTuple):
    weight: Tensor
    inputs: Tensor
    gram: Tensor
    moments: Moments


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., Layer]:
    def make(out: int, columns: int, *, tokens: int = 0, seed: int = 0, dtype: torch.dtype = torch.float32) -> Layer:
        """A linear and inputs as a language model's: correlated, of unlike sizes, not around zero."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        spectrum = torch.arange(1, columns + 1, dtype=torch.float64) ** -0.7
        inputs = (draw(tokens or 8 * columns, columns) * spectrum) @ draw(columns, columns)
        inputs = ((inputs + draw(columns)) * draw(columns).exp()).to(dtype)
        gram, moments = Gram(columns, torch.device("cpu")), Moments(columns, torch.device("cpu"))
        gram.add(inputs)
        moments.add(inputs)
        return Layer((draw(out, columns) / columns**0.5).to(dtype), inputs, gram.matrix, moments)

    return make
