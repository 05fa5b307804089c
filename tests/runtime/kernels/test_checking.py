import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.kernels import checking, library
from phoenix_sparse.runtime.kernels.checking import check
from runtime.kernels.matrices import VALUES, libraries, matrix

LIBRARIES = libraries()


@pytest.fixture(params=["kernels", "torch"], autouse=True)
def by(request, monkeypatch):
    """The compiled check, and torch's."""
    if request.param == "torch":
        monkeypatch.setattr(checking, "library", lambda: None)
    elif not LIBRARIES:
        pytest.skip("the kernels are not built")
    library.library.cache_clear()
    yield
    library.library.cache_clear()


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 8), (200, 77), (33, 640), (0, 5)])
def test_a_packed_matrix_passes(rows, columns, values):
    m = matrix(rows, columns, 0.5, values, rows)
    check(m.bitmask, m.values, m.row_offsets, columns, m.scales)


def broken(change, columns=77, rows=150):
    m = matrix(rows, columns, 0.5, torch.bfloat16, 3)
    bitmask, values, offsets = m.bitmask.clone(), m.values.clone(), m.row_offsets.clone()
    bitmask, values, offsets = change(bitmask, values, offsets)
    check(bitmask, values, offsets, columns, where="model.layers.0")


def at(tensor, place, value):
    tensor[place] = value
    return tensor


INCONSISTENT = {
    "begin with 1": lambda b, v, o: (b, v, at(o, 0, 1)),
    "fall at row 9": lambda b, v, o: (b, v, at(o, 10, 0)),
    "row 9 has another number": lambda b, v, o: (b, v, at(at(o, 10, 2**62), 11, -(2**62))),
    "end at": lambda b, v, o: (b, v[:-1], o),
    "end at ": lambda b, v, o: (b, v, at(o, -1, o[-1] + 1)),
    "row 20 has another number": lambda b, v, o: (at(b, (20, 3), b[20, 3] ^ 1), v, o),
    "row 30 has another number": lambda b, v, o: (b, v, at(o, 31, o[31] + 1)),
    "row 140 of the bitmask has bits beyond column 76": lambda b, v, o: (at(b, (140, -1), b[140, -1] | 128), v, o),
}


@pytest.mark.parametrize("message", INCONSISTENT)
def test_what_disagrees_is_named(message):
    with pytest.raises(PhoenixError, match=f"^model.layers.0: .*{message}.*; pack the model again$"):
        broken(INCONSISTENT[message])


@given(st.integers(0, 2**20), st.integers(1, 40), st.integers(1, 40))
def test_any_one_change_is_found(seed, rows, columns):
    generator = torch.Generator().manual_seed(seed)
    m = matrix(rows, columns, 0.5, torch.float32, seed)

    def some(below):
        return int(torch.randint(0, below, (1,), generator=generator))

    row, bit = some(rows), some(8)
    bitmask = m.bitmask.clone()
    bitmask[row, some(bitmask.shape[1])] ^= 1 << bit
    with pytest.raises(PhoenixError):
        check(bitmask, m.values, m.row_offsets, columns)
    offsets = m.row_offsets.clone()
    offsets[some(rows + 1)] += 1 + some(2**62)
    with pytest.raises(PhoenixError):
        check(m.bitmask, m.values, offsets, columns)


def test_forms_are_checked_before_contents():
    m = matrix(8, 30, 0.5, torch.int8, 1)
    b, v, o, s = m.parts
    for parts in [
        (b[:, :3], v, o, s),
        (b.to(torch.int8), v, o, s),
        (b.t().contiguous().t(), v, o, s),
        (b[0], v, o, s),
        (b, v[:, None], o, s),
        (b, v.int(), o, s),
        (b, v[::2], o, s),
        (b, v, o[:-1], s),
        (b, v, o.float(), s),
        (b, v, o, None),
        (b, v, o, s[:-1]),
        (b, v, o, s.double()),
        (b, v.float(), o, s),
        (b, v.to("meta"), o, s),
    ]:
        with pytest.raises(PhoenixError, match="pack the model again"):
            check(parts[0], parts[1], parts[2], 30, parts[3])
