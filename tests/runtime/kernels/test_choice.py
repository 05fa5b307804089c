import time

import pytest
import torch

from phoenix_sparse.runtime.kernels import choice, linear
from phoenix_sparse.runtime.kernels.choice import dense_is_faster
from runtime.kernels.matrices import libraries, matrix

LIBRARIES = libraries()
pytestmark = pytest.mark.skipif(not LIBRARIES, reason="the kernels are not built")


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch):
    monkeypatch.setattr(choice, "table", {})
    monkeypatch.delenv(choice.VARIABLE, raising=False)


def counted(seconds):
    calls = []

    def product(library, x, bitmask, values, row_offsets):
        calls.append(x.shape[0])
        time.sleep(seconds)

    return product, calls


@pytest.mark.parametrize("faster", ["sparse", "dense"])
def test_what_was_faster_is_taken_and_measured_once(faster):
    slow, fast = counted(0.01), counted(0.001)
    (sparse, calls), (dense, _) = (fast, slow) if faster == "sparse" else (slow, fast)
    for batch in (17, 20, 32):
        assert dense_is_faster(LIBRARIES[-1], torch.ones(batch, 8), torch.int8, sparse, dense) is (faster == "dense")
        assert 1 <= len(calls) <= choice.ROUNDS + 1
        assert set(calls) == {32}
    dense_is_faster(LIBRARIES[-1], torch.ones(5000, 8), torch.int8, sparse, dense)
    assert set(calls) == {32, 256}
    assert len(choice.table) == 2


def test_small_batches_are_never_timed():
    assert not dense_is_faster(LIBRARIES[-1], torch.ones(8, 8), torch.int8, None, None)


def test_nothing_is_timed_where_results_must_not_change(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "off")
    for one in LIBRARIES:
        found = [dense_is_faster(one, torch.ones(n, 8), torch.int8, None, None) for n in (9, 31, 32, 999)]
        assert found == ([False] * 4 if one.has_dense else [False, False, True, True])
    monkeypatch.delenv(choice.VARIABLE)
    torch.use_deterministic_algorithms(True)
    try:
        assert not dense_is_faster(LIBRARIES[-1], torch.ones(9, 8), torch.int8, None, None)
    finally:
        torch.use_deterministic_algorithms(False)
    assert choice.table == {}


def test_measuring_leaves_torch_s_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    m = matrix(10, 64, 0.5, torch.bfloat16, 0)
    linear.sparse_linear(torch.ones(40, 64).bfloat16(), *m.parts)
    assert torch.equal(torch.rand(4), expected)


def test_panels_are_as_long_as_memory_allows(monkeypatch):
    m = matrix(23, 64, 0.5, torch.int8, 0)
    x = torch.ones(30, 64)
    whole = linear._by_panels(LIBRARIES[-1], x, *m.parts)
    monkeypatch.setattr(linear, "PANEL", 64 * 4 * 5)
    torch.testing.assert_close(linear._by_panels(LIBRARIES[-1], x, *m.parts), whole)
