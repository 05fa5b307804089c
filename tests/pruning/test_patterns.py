import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.patterns import STRUCTURED, UNSTRUCTURED, Pattern, parse_pattern

sizes = st.integers(1, 64)


@given(sizes, sizes)
def test_n_of_m_is_read_back(n, m):
    text = f"{n}:{m}"
    if n >= m:
        with pytest.raises(PhoenixError, match=f"'{text}' is no pattern; use unstructured, N:M with N < M"):
            parse_pattern(text)
        return
    pattern = parse_pattern(text)
    assert (pattern.kind, pattern.first, pattern.second, str(pattern)) == ("n:m", n, m, text)
    assert pattern.sparsity == pytest.approx((m - n) / m)


@given(sizes, sizes)
def test_blocks_are_read_back(rows, columns):
    text = f"{rows}x{columns}"
    if rows * columns == 1:
        with pytest.raises(PhoenixError, match="is no pattern"):
            parse_pattern(text)
        return
    assert parse_pattern(text) == Pattern("block", rows, columns)
    assert str(parse_pattern(text)) == text


def test_names_are_read_back():
    assert parse_pattern("unstructured") == UNSTRUCTURED
    assert parse_pattern("structured") == STRUCTURED
    assert str(UNSTRUCTURED) == "unstructured"


@pytest.mark.parametrize(
    "text", ["", "2:", ":4", "0:4", "2:4:8", "2 : 4", "02:4", "2:4\n", "16X1", "0x4", "-1:4", "2.5:4"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(PhoenixError, match="sparsify.pattern: .* is no pattern"):
        parse_pattern(text)


@given(sizes, sizes, st.integers(1, 9), st.integers(2, 9))
def test_a_matrix_must_be_divisible(out, inner, one, other):
    cases = {
        UNSTRUCTURED: True,
        STRUCTURED: True,
        Pattern("n:m", 1, other): inner % other == 0,
        Pattern("block", one, other): out % one == 0 and inner % other == 0,
    }
    for pattern, fits in cases.items():
        if fits:
            pattern.check("some.layer", (out, inner))
            continue
        with pytest.raises(
            PhoenixError, match=f"sparsify.pattern: {pattern} does not divide some.layer, {out}x{inner}"
        ):
            pattern.check("some.layer", (out, inner))
