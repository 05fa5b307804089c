import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.pruning.patterns import Pattern
from phoenix_sparse.pruning.selection import (
    keep,
    keep_globally,
    keep_n_of_m,
    keep_per_layer,
    keep_per_row,
)

# Few distinct values, so that ties are the rule.
scores = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 999)).map(
    lambda s: torch.randint(0, 4, s[:2], generator=torch.Generator().manual_seed(s[2])).float()
)


@given(scores, st.floats(0, 0.99))
def test_rows_lose_exactly_their_share(matrix, sparsity):
    kept = keep_per_row(matrix, sparsity)
    assert ((~kept).sum(1) == int(matrix.shape[1] * sparsity)).all()
    for row, chosen in zip(matrix, kept, strict=True):
        if chosen.any() and not chosen.all():
            assert row[chosen].min() >= row[~chosen].max()


@given(scores, st.floats(0, 0.99))
def test_layers_lose_exactly_their_share(matrix, sparsity):
    assert int((~keep_per_layer(matrix, sparsity)).sum()) == int(matrix.numel() * sparsity)


def test_ties_go_by_position():
    assert keep_per_layer(torch.ones(2, 4), 0.5).tolist() == [[False] * 4, [True] * 4]


def test_global_thresholds_are_shared():
    masks = keep_globally({"small": torch.tensor([[1.0, 2.0, 9.0]]), "large": torch.tensor([[7.0, 8.0, 3.0]])}, 0.5)
    assert masks["small"].tolist() == [[False, False, True]]
    assert masks["large"].tolist() == [[True, True, False]]


@given(scores, scores, st.floats(0, 0.95))
def test_global_keeps_every_layer_alive_and_meets_the_total(one, other, sparsity):
    masks = keep_globally({"small": one * 1e-6, "large": other + 1}, sparsity)
    total, kept = one.numel() + other.numel(), sum(int(mask.sum()) for mask in masks.values())
    assert all(mask.any() for mask in masks.values())
    assert kept == max(total - int(total * sparsity), 2)


def test_global_sparsity_zero_keeps_everything():
    masks = keep_globally({"one": torch.zeros(3, 4), "other": torch.ones(2, 2)}, 0.0)
    assert all(mask.all() for mask in masks.values())


def by_sorting(flat, drop):
    """The definition: of a stable sort the first `drop` go."""
    mask = np.ones(len(flat), bool)
    mask[np.argsort(flat, kind="stable")[:drop]] = False
    return mask


anything = st.tuples(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 999),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.bool]),
    st.booleans(),
)


@given(anything, st.floats(0, 0.99))
def test_a_layer_s_mask_is_that_of_a_stable_sort_in_every_dtype(drawn, sparsity):
    rows, columns, seed, dtype, ties = drawn
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = (values.round() if ties else values).to(dtype)
    expected = by_sorting(matrix.double().reshape(-1).numpy(), int(matrix.numel() * sparsity))
    assert np.array_equal(keep_per_layer(matrix, sparsity).reshape(-1).numpy(), expected)
    expected = [by_sorting(row.double().numpy(), int(columns * sparsity)) for row in matrix]
    assert np.array_equal(keep_per_row(matrix, sparsity).numpy(), np.stack(expected))


@given(
    st.integers(1, 5), st.integers(1, 5), st.integers(0, 999), st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (3, 5)])
)
def test_n_of_m_keeps_the_largest_of_each_group(rows, groups, seed, n_of_m):
    n, m = n_of_m
    matrix = torch.randint(0, 4, (rows, groups * m), generator=torch.Generator().manual_seed(seed)).float()
    kept = keep_n_of_m(matrix, n, m)
    assert torch.equal(keep(matrix, 0.123, "row", Pattern("n:m", n, m)), kept)
    for row, chosen in zip(matrix, kept, strict=True):
        for start in range(0, groups * m, m):
            part = slice(start, start + m)
            assert np.array_equal(chosen[part].numpy(), by_sorting(row[part].numpy(), m - n))


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([(16, 1), (1, 8), (2, 3)]),
    st.integers(0, 999),
    st.floats(0, 0.95),
)
def test_blocks_go_whole_by_their_sums(down, across, size, seed, sparsity):
    rows, columns = size
    matrix = torch.randn(down * rows, across * columns, generator=torch.Generator().manual_seed(seed)).abs()
    kept = keep(matrix, sparsity, "layer", Pattern("block", rows, columns))
    parts = kept.reshape(down, rows, across, columns).permute(0, 2, 1, 3).reshape(down * across, -1)
    sums = matrix.double().reshape(down, rows, across, columns).sum((1, 3)).reshape(-1)
    assert torch.equal(parts.all(1), parts.any(1))
    assert np.array_equal(parts.all(1).numpy(), by_sorting(sums.numpy(), int(down * across * sparsity)))
    assert kept.is_contiguous()


@given(scores, st.floats(0, 0.99))
def test_exactly_the_layer_s_share_goes_and_rows_differ_by_one_at_most(matrix, sparsity):
    kept = keep(matrix, sparsity, "row", exact=True)
    drop, (rows, _) = int(matrix.numel() * sparsity), matrix.shape
    lost = (~kept).sum(1).tolist()
    assert sum(lost) == drop
    assert set(lost) <= {drop // rows, drop // rows + 1}
    order = [np.argsort(row, kind="stable") for row in matrix.numpy()]
    for row, count in enumerate(lost):  # each the first of its own order
        assert set(order[row][:count]) == set(np.flatnonzero(~kept[row].numpy()))
    following = {row: float(matrix[row, order[row][drop // rows]]) for row in range(rows)} if drop % rows else {}
    more = [row for row in following if lost[row] > drop // rows]
    assert more == sorted(sorted(following, key=following.__getitem__)[: len(more)])


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.875])
def test_whole_shares_of_a_row_are_wanda_s_either_way(sparsity):
    matrix = torch.randint(0, 5, (7, 8), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(keep(matrix, sparsity, "row", exact=True), keep_per_row(matrix, sparsity))


def test_the_group_says_who_competes():
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert keep(matrix, 0.5, "row").tolist() == [[False, True], [False, True]]
    assert keep(matrix, 0.5, "layer").tolist() == [[False, False], [True, True]]


@given(scores, scores, scores, st.floats(0, 0.999))
def test_global_masks_are_those_of_one_sort_above_the_floor(one, two, three, sparsity):
    layers = {"one": one, "two": two + 1, "three": three * 7}
    density, fixed = min(0.01, 1 - sparsity), []
    for matrix in layers.values():
        flat = matrix.double().reshape(-1).numpy()
        safe = min(len(flat), max(1, round(density * len(flat))))
        fixed.append(np.where(by_sorting(flat, len(flat) - safe), np.inf, flat))
    together = np.concatenate(fixed)
    drop = min(int(len(together) * sparsity), int(np.isfinite(together).sum()))
    expected = by_sorting(together, drop)
    masks = keep_globally(layers, sparsity)
    assert list(masks) == list(layers)
    assert np.array_equal(torch.cat([mask.reshape(-1) for mask in masks.values()]).numpy(), expected)
    assert all(mask.shape == layers[name].shape for name, mask in masks.items())


def test_scores_stay_as_they_are():
    matrix = torch.randn(6, 8, requires_grad=True)
    before = matrix.detach().clone()
    keep_globally({"layer": matrix}, 0.5)
    keep(matrix, 0.5, "layer")
    keep(matrix, 0.5, "row", Pattern("n:m", 2, 4))
    keep(matrix, 0.5, "row", Pattern("block", 2, 2))
    assert torch.equal(matrix, before)
