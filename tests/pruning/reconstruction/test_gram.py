import pytest
import torch

from phoenix_sparse.pruning.reconstruction.gram import Gram, relative_error
from phoenix_sparse.pruning.reconstruction.moments import Moments

CPU = torch.device("cpu")


def parts(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 5, 6), (7, 6), (1, 3, 6), (0, 6)]
    return [torch.randn(*shape, generator=generator).add(3).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_is_the_mean_over_all_tokens_however_they_come(dtype):
    gram = Gram(6, CPU)
    for part in parts(dtype):
        gram.add(part)
    whole = torch.cat([part.reshape(-1, 6) for part in parts(dtype)]).double()
    assert gram.tokens == 20
    assert gram.matrix.dtype == torch.float32
    torch.testing.assert_close(gram.matrix, (2 / 20 * whole.T @ whole).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_those_of_all_tokens_however_they_come(dtype):
    moments = Moments(6, CPU)
    for part in parts(dtype):
        moments.add(part)
    whole = torch.cat([part.reshape(-1, 6) for part in parts(dtype)]).double()
    assert (moments.tokens, moments.sequences) == (20, 4)
    torch.testing.assert_close(moments.mean, whole.mean(0).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.variance, whole.var(0, correction=0).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.squared_norm, whole.square().sum(0).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.sum_per_sequence, (whole.sum(0) / 4).float(), rtol=1e-5, atol=1e-5)


def test_a_small_variance_beside_a_large_mean_is_not_lost():
    """E[x²] − E[x]² of these in float32 has no correct digit."""
    generator = torch.Generator().manual_seed(0)
    inputs = 4096 + torch.randn(64, 32, 1, generator=generator)
    moments = Moments(1, CPU)
    for row in inputs:
        moments.add(row)
    expected = inputs.double().reshape(-1).var(correction=0).item()
    assert moments.variance.item() == pytest.approx(expected, rel=1e-3)


def test_relative_error_is_that_of_the_outputs(make_layer):
    layer = make_layer(5, 7)
    pruned = layer.weight * (torch.arange(35).reshape(5, 7) % 3 > 0)
    outputs, change = (layer.inputs.double() @ part.double().T for part in (layer.weight, layer.weight - pruned))
    expected = (change.square().sum() / outputs.square().sum()).item()
    assert relative_error(layer.weight, pruned, layer.gram) == pytest.approx(expected, rel=1e-4)
    assert relative_error(layer.weight, layer.weight, layer.gram) == 0
    assert relative_error(torch.zeros(2, 7), torch.zeros(2, 7), layer.gram) == 0
