"""Token arrays: every learned token is the next one of its row, and nothing else is learned."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.cerebras.tokens import IGNORED, fitting_length, token_array
from phoenix_sparse.errors import PhoenixError

ROWS = st.lists(
    st.tuples(
        st.lists(st.integers(1, 99), min_size=1, max_size=20), st.lists(st.integers(1, 99), min_size=1, max_size=9)
    ),
    min_size=1,
    max_size=5,
)


@given(ROWS)
def test_what_is_learned_is_the_completion(pairs):
    rows = [{"input_ids": p + c, "labels": [IGNORED] * len(p) + c} for p, c in pairs]
    data = token_array(rows, 32, pad=0)
    assert data.shape == (len(rows), 3, 32)
    assert data.dtype == np.int32
    for (prompt, completion), (ids, mask, labels) in zip(pairs, data, strict=True):
        whole = prompt + completion
        assert list(labels[mask == 1]) == completion
        assert list(ids[: len(whole) - 1]) == whole[:-1]
        assert not ids[len(whole) - 1 :].any()
        assert not labels[len(whole) - 1 :].any()
        assert mask.sum() == len(completion)


def test_lengths():
    rows = [{"input_ids": [1] * 34, "labels": [1] * 34}]
    assert fitting_length(rows, 512) == 64
    assert fitting_length(rows, 40) == 40
    with pytest.raises(PhoenixError, match="34 tokens"):
        token_array(rows, 32, pad=0)
    with pytest.raises(PhoenixError, match="no examples"):
        token_array([], 32, pad=0)
