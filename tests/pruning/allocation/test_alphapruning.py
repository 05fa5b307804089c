import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.allocation.alphapruning import alpha_allocation, hill_alpha

KINDS = {"self_attn.q_proj": 64 * 64, "mlp.up_proj": 64 * 172, "mlp.down_proj": 172 * 64}


def layers(blocks):
    return {f"model.layers.{block}.{kind}": size for block in range(blocks) for kind, size in KINDS.items()}


def hill(weight):
    """Independent: eigenvalues of the smaller Gram matrix, in float64, one by one."""
    matrix = weight.double().numpy()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    values = sorted(np.linalg.eigvalsh(gram))
    n, k = len(values), len(values) // 2
    return 1 + k / sum(math.log(values[n - i] / values[n - k - 1]) for i in range(1, k + 1))


@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 999))
def test_hill_is_the_formula(out, inner, seed):
    weight = torch.randn(out, inner + 3, generator=torch.Generator().manual_seed(seed))
    assert hill_alpha(weight) == pytest.approx(hill(weight), rel=1e-3)
    assert hill_alpha(weight.double()) == pytest.approx(hill(weight), rel=1e-9)
    assert hill_alpha(weight.T) == pytest.approx(hill_alpha(weight), rel=1e-4)
    assert hill_alpha(7 * weight) == pytest.approx(hill_alpha(weight), rel=1e-4)
    bfloat = weight.bfloat16()
    assert hill_alpha(bfloat) == hill_alpha(bfloat.float())


@pytest.mark.parametrize("alpha", [2.0, 3.0, 4.5])
def test_hill_finds_the_exponent_of_a_pareto_tail(alpha):
    """Eigenvalues drawn with density ∝ λ^−α above 1: the estimate's standard error is (α − 1) / √k."""
    n = 1000
    uniform = np.random.default_rng(0).random(n)
    singular = np.sqrt((1 - uniform) ** (-1 / (alpha - 1)))
    estimate = hill_alpha(torch.diag(torch.tensor(singular)))
    assert abs(estimate - alpha) < 3 * (alpha - 1) / math.sqrt(n / 2)


def test_eigenvalues_of_zero_are_no_part_of_the_spectrum():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(20, 30, generator=generator)
    padded = torch.zeros(50, 60)
    padded[:20, :30] = weight
    assert hill_alpha(padded) == pytest.approx(hill_alpha(weight), rel=1e-4)
    low_rank = torch.randn(60, 8, generator=generator) @ torch.randn(8, 40, generator=generator)
    assert 1 < hill_alpha(low_rank) < 50
    assert hill_alpha(torch.eye(8)) == math.inf


@pytest.mark.parametrize("weight", [torch.zeros(4, 4), torch.ones(4, 4), torch.full((4, 4), math.nan)])
def test_weights_without_a_spectrum_are_refused(weight):
    with pytest.raises(PhoenixError, match="alphapruning"):
        hill_alpha(weight)


@given(st.lists(st.floats(1.1, 9), min_size=6, max_size=30), st.floats(0.1, 0.7), st.floats(0.01, 0.3))
def test_it_is_the_published_mapping(alphas, target, width):
    sizes = layers(len(alphas) // 3)
    given_alphas = dict(zip(sizes, alphas, strict=False))
    allocation = alpha_allocation(given_alphas, sizes, target, width=width)
    metric = np.repeat(np.array(list(given_alphas.values())).reshape(-1, 3).mean(1), 3)
    prunable = np.array(list(sizes.values()), dtype=np.float64)
    if metric.max() - metric.min() < 1e-6:
        return
    ratios = (metric - metric.min()) / (metric.max() - metric.min()) * 2 * width + 1 - width
    ratios *= prunable.sum() * target / (prunable * ratios).sum()
    for sparsity, reference, size in zip(allocation.values(), ratios, prunable, strict=True):
        if ratios.max() < 0.98:
            assert abs(sparsity - reference) <= 1 / size + 1e-6
    drop = sum(int(sizes[name] * sparsity) for name, sparsity in allocation.items())
    assert drop == round(target * sum(sizes.values()))


@given(st.lists(st.floats(1.1, 9), min_size=3, max_size=10), st.floats(0.01, 0.97), st.integers(0, 9))
def test_totals_and_order_whatever_the_sizes(alphas, target, seed):
    generator = np.random.default_rng(seed)
    sizes = {name: int(generator.integers(50, 5000)) for name in layers(len(alphas))}
    of_block = {f"model.layers.{block}": alpha for block, alpha in enumerate(alphas)}
    allocation = alpha_allocation(of_block, sizes, target)
    drop = sum(int(sizes[name] * sparsity) for name, sparsity in allocation.items())
    assert abs(drop - target * sum(sizes.values())) <= len(sizes)
    order = sorted(of_block, key=of_block.__getitem__)
    for heavy, light in pairwise(order):
        one, other = f"{heavy}.mlp.up_proj", f"{light}.mlp.up_proj"
        assert allocation[one] <= allocation[other] + 1 / sizes[one] + 1 / sizes[other]


def test_layers_may_speak_for_themselves():
    sizes = layers(1)
    alphas = dict(zip(sizes, [2.0, 3.0, 4.0], strict=True))
    assert alpha_allocation(alphas, sizes, 0.5) == dict.fromkeys(sizes, 0.5)
    assert list(alpha_allocation(alphas, sizes, 0.5, per_block=False).values()) == sorted(
        alpha_allocation(alphas, sizes, 0.5, per_block=False).values()
    )
    assert len(set(alpha_allocation(alphas, sizes, 0.5, per_block=False).values())) == 3


def test_refusals():
    sizes = layers(2)
    with pytest.raises(PhoenixError, match="neither by layer nor by decoder block"):
        alpha_allocation({"model.layers.0": 2.0}, sizes, 0.5)
    with pytest.raises(PhoenixError, match=r"no tail in model.layers.1 \(α = inf\)"):
        alpha_allocation({"model.layers.0": 2.0, "model.layers.1": math.inf}, sizes, 0.5)
