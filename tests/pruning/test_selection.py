import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.selection import keep_globally, keep_per_layer, keep_per_row

# Few distinct values, so that ties are the rule.
scores = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 999)).map(
    lambda s: torch.randint(0, 4, s[:2], generator=torch.Generator().manual_seed(s[2])).float()
)


@given(scores, st.floats(0, 0.99))
def test_rows_lose_exactly_their_share(matrix, sparsity):
    kept = keep_per_row(matrix, sparsity)
    assert ((~kept).sum(1) == int(matrix.shape[1] * sparsity)).all()
    for row, keep in zip(matrix, kept, strict=True):
        if keep.any() and not keep.all():
            assert row[keep].min() >= row[~keep].max()


@given(scores, st.floats(0, 0.99))
def test_layers_lose_exactly_their_share(matrix, sparsity):
    assert int((~keep_per_layer(matrix, sparsity)).sum()) == int(matrix.numel() * sparsity)


def test_ties_go_by_position():
    assert keep_per_layer(torch.ones(2, 4), 0.5).tolist() == [[False] * 4, [True] * 4]


def test_global_thresholds_are_shared():
    masks = keep_globally({"small": torch.tensor([[1.0, 2.0, 9.0]]), "large": torch.tensor([[7.0, 8.0, 3.0]])}, 0.5)
    assert masks["small"].tolist() == [[False, False, True]]
    assert masks["large"].tolist() == [[True, True, False]]


def test_global_refuses_to_empty_a_layer():
    with pytest.raises(PhoenixError, match="would empty small"):
        keep_globally({"small": torch.tensor([[1.0, 2.0]]), "large": torch.tensor([[7.0, 8.0]])}, 0.5)
