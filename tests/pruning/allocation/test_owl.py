import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.allocation.owl import outliers, owl_allocation

KINDS = {"self_attn.q_proj": 64 * 64, "mlp.up_proj": 64 * 172, "mlp.down_proj": 172 * 64}


def layers(blocks):
    return {f"model.layers.{block}.{kind}": size for block in range(blocks) for kind, size in KINDS.items()}


def found(ratios):
    return {f"model.layers.{block}": (count, 10**6) for block, count in enumerate(ratios)}


def published(ratios, sparsity, lamda):
    """Keep ratios as in the paper's repository, in float64, over blocks of one size."""
    ratio = np.array(ratios, dtype=np.float64)
    keep = (ratio - ratio.min()) / (ratio.max() - ratio.min()) * 2 * lamda
    return 1 - (keep - keep.mean() + 1 - sparsity)


@given(
    st.lists(st.integers(0, 90_000), min_size=2, max_size=20).filter(lambda r: len(set(r)) > 1),
    st.floats(0.2, 0.8),
    st.floats(0, 0.09),
)
def test_it_is_the_published_formula(ratios, target, width):
    sizes = layers(len(ratios))
    allocation = owl_allocation(found(ratios), sizes, target, width=width)
    for block, sparsity in enumerate(published(ratios, target, width)):
        for kind, size in KINDS.items():
            assert abs(allocation[f"model.layers.{block}.{kind}"] - sparsity) <= 1 / size + 1e-6
    drop = sum(int(sizes[name] * sparsity) for name, sparsity in allocation.items())
    assert drop == round(target * sum(sizes.values()))


@given(st.lists(st.integers(0, 90_000), min_size=2, max_size=20), st.floats(0.01, 0.97), st.integers(0, 9))
def test_totals_and_order_whatever_the_sizes(ratios, target, seed):
    generator = np.random.default_rng(seed)
    sizes = {name: int(generator.integers(50, 5000)) for name in layers(len(ratios))}
    allocation = owl_allocation(found(ratios), sizes, target)
    drop = sum(int(sizes[name] * sparsity) for name, sparsity in allocation.items())
    assert abs(drop - target * sum(sizes.values())) <= len(sizes)
    for a, left in enumerate(ratios):
        for b, right in enumerate(ratios):
            if left > right:
                one, other = f"model.layers.{a}.mlp.up_proj", f"model.layers.{b}.mlp.up_proj"
                assert allocation[one] <= allocation[other] + 1 / sizes[one] + 1 / sizes[other]


def test_equal_blocks_get_equal_sparsities():
    sizes = layers(4)
    assert owl_allocation(found([700] * 4), sizes, 0.5) == dict.fromkeys(sizes, 0.5)


def test_outliers_stand_above_the_mean_of_the_whole_block():
    generator = torch.Generator().manual_seed(0)
    small, large = torch.rand(40, 30, generator=generator) ** 8, 10 * torch.rand(50, 20, generator=generator) ** 8
    together = np.concatenate([small.numpy().ravel(), large.numpy().ravel()]).astype(np.float64)
    for multiple in (3.0, 5.0, 7.0):
        expected = int((together > multiple * together.mean()).sum())
        assert outliers([small, large], multiple) == expected
        assert expected != outliers(small, multiple) + outliers(large, multiple)
    assert outliers(torch.zeros(3, 3)) == 0
    assert outliers(torch.ones(3, 3, dtype=torch.bfloat16)) == 0


def test_refusals():
    with pytest.raises(PhoenixError, match=r"in 3 blocks and the layers are in 4; model.layers.3"):
        owl_allocation(found([1, 2, 3]), layers(4), 0.5)
    with pytest.raises(PhoenixError, match="at least one layer"):
        outliers([])
    with pytest.raises(PhoenixError, match="can't be reached"):
        owl_allocation(found([1, 2, 3]), layers(3), 0.999)
