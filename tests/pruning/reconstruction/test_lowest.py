import torch
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.pruning.reconstruction.lowest import lowest


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9999), st.floats(0, 1), st.sampled_from([1.0, 1e-38, 1e38]))
def test_the_lowest_go_and_ties_by_position(rows, columns, seed, share, size):
    """Few distinct values, so that ties are the rule; sizes down to denormal numbers and up to infinity."""
    scores = torch.randint(0, 5, (rows, columns), generator=torch.Generator().manual_seed(seed)) * size
    count = round(share * scores.numel())
    expected = torch.zeros(scores.numel(), dtype=torch.bool)
    expected[torch.sort(scores.reshape(-1), stable=True).indices[:count]] = True
    assert torch.equal(lowest(scores, count), expected.reshape(rows, columns))


def test_real_scores_and_views():
    scores = torch.rand(50, 40, generator=torch.Generator().manual_seed(0)).t()
    found = lowest(scores, 777)
    assert int(found.sum()) == 777
    assert scores[found].max() < scores[~found].min()
