import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.kernels import choice, library, sliced
from phoenix_sparse.runtime.kernels.linear import sparse_linear
from phoenix_sparse.runtime.kernels.sliced import sliced_linear
from phoenix_sparse.runtime.kernels.slices import PLACES, ROWS
from phoenix_sparse.runtime.kernels.slicing import count_steps, fill, slice_if_faster, unslice
from runtime.kernels.matrices import DTYPES, expected, libraries, packed, tolerance
from runtime.kernels.matrices import matrix as any_matrix

VALUES = (torch.bfloat16, torch.int8)
LIBRARIES = libraries()
BEST = LIBRARIES[-1] if LIBRARIES else None
pytestmark = pytest.mark.skipif(not LIBRARIES, reason="the kernels are not built")
needs_kernel = pytest.mark.skipif(BEST is None or not BEST.has_sliced, reason="needs AVX-512 with bfloat16")
SHAPES = st.one_of(
    st.tuples(st.integers(1, 70), st.integers(1, 400)),
    # Around slices of 16 rows, and windows of 128 columns that move by 16.
    st.tuples(
        st.sampled_from([1, 15, 16, 17, 32, 33]), st.sampled_from([1, 15, 16, 17, 127, 128, 129, 145, 1024, 4097])
    ),
)
DENSITIES = st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.3, 0.9, 1.0])


@pytest.fixture(autouse=True)
def nothing_timed(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "off")


def matrix(*arguments):
    """Without -128, which slices have no code for."""
    return any_matrix(*arguments, least=-127)


def slices_of(m):
    """Whatever the density."""
    return fill(BEST, *m.parts[:3], count_steps(BEST, *m.parts[:3], m.dense.shape[1]))


def structured(rows, columns, generator):
    """Rows of a block of columns each: lanes of a slice that have no window in common."""
    kept = torch.zeros(rows, columns, dtype=torch.bool)
    for row in range(rows):
        first = int(torch.randint(0, columns, (1,), generator=generator))
        kept[row, first : first + 50] = True
    return packed(torch.randn(rows, columns, generator=generator).bfloat16(), kept)


@settings(max_examples=300)
@given(
    shape=SHAPES,
    density=DENSITIES,
    batch=st.one_of(st.integers(1, 9), st.integers(1, 65)),
    x_dtype=st.sampled_from(DTYPES),
    values=st.sampled_from(VALUES),
    others=st.sampled_from(DTYPES),
    biased=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_products_agree_with_float64(shape, density, batch, x_dtype, values, others, biased, seed):
    rows, columns = shape
    m = matrix(rows, columns, density, values, seed, others)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, columns, generator=generator).to(x_dtype)
    bias = torch.randn(rows, generator=generator).to(others) if biased else None
    exact, slices = expected(m, x, bias), slices_of(m)
    if BEST.has_sliced:
        y = torch.full((batch, rows), float("nan"), dtype=x_dtype)
        assert BEST.sliced(x, slices, m.scales, bias, y)
        assert ((y.double() - exact).abs() <= tolerance(m, x, bias)).all()
    found = sliced.by_panels(BEST, x, slices, m.scales, bias).double()
    assert ((found - exact).abs() <= tolerance(m, x, bias, by_torch=True)).all()


@settings(max_examples=200)
@given(shape=SHAPES, density=DENSITIES, values=st.sampled_from(VALUES), seed=st.integers(0, 10**6))
def test_slices_hold_every_bit(shape, density, values, seed):
    """Kept zeros, too: a bitmap may have values that are 0."""
    m = matrix(*shape, density, values, seed)
    m.values[::3] = 0
    slices = slices_of(m)
    for before, after in zip(m.parts[:3], unslice(slices), strict=True):
        assert torch.equal(before, after)
    assert slices.places >= m.values.numel()
    assert sorted(slices.order.tolist()) == list(range(shape[0]))


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.2])
def test_few_places_stay_empty(density):
    """A row has d · 128 columns of a window on average; what is measured in docs/results.md is a little better."""
    generator = torch.Generator().manual_seed(1)
    kept = torch.rand(512, 4096, generator=generator) < density
    m = packed(torch.randn(512, 4096, generator=generator).bfloat16(), kept)
    assert slices_of(m).places <= (1.12 + 0.025 / density) * m.values.numel()


def test_rows_without_a_window_in_common_are_right_but_not_taken():
    generator = torch.Generator().manual_seed(2)
    m = structured(64, 4000, generator)
    slices = slices_of(m)
    assert slices.places > 4 * m.values.numel()
    x = torch.randn(3, 4000, generator=generator)
    for found in (sliced_linear(x, slices), sliced.by_panels(BEST, x, slices)):
        assert ((found.double() - expected(m, x)).abs() <= tolerance(m, x, None, by_torch=True)).all()


@needs_kernel
def test_slices_are_taken_where_they_were_measured_to_be_faster(monkeypatch):
    for values in VALUES:
        for density, taken in [(0.0, True), (0.05, True), (0.15, True), (0.4, False), (0.9, False)]:
            kept = torch.rand(64, 1000) < density
            m = packed(torch.randint(-9, 9, (64, 1000)).to(values), kept)
            slices = slice_if_faster(*m.parts[:3], 1000)
            assert (slices is not None) == taken
            if slices is not None:
                assert slices.places <= choice.SLICED[values] * kept.numel()
    # 5% of values would be few enough, their places are not.
    scattered = structured(64, 1000, torch.Generator().manual_seed(3))
    assert choice.slices_pay(torch.bfloat16, 64_000, scattered.values.numel())
    assert slice_if_faster(*scattered.parts[:3], 1000) is None
    few = torch.rand(64, 1000) < 0.05
    for least, taken in [(-127, True), (-128, False)]:
        m = packed(torch.full((64, 1000), least, dtype=torch.int8), few)
        assert (slice_if_faster(*m.parts[:3], 1000) is not None) == taken
    m = matrix(64, 1000, 0.05, torch.float32, 0)
    assert slice_if_faster(*m.parts[:3], 1000) is None
    m = packed(torch.ones(4, 1000).bfloat16(), torch.zeros(4, 1000, dtype=torch.bool))
    for path in (*(one.path for one in LIBRARIES if not one.has_sliced), "torch"):
        monkeypatch.setenv(library.VARIABLE, path)
        library.library.cache_clear()
        assert slice_if_faster(*m.parts[:3], 1000) is None
    library.library.cache_clear()


@needs_kernel
def test_results_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        for values in VALUES:
            m = matrix(1000, 1515, 0.1, values, 2)
            slices = slices_of(m)
            for x in (torch.randn(batch, 1515).to(dtype) for batch in (1, 3, 8, 9, 40) for dtype in DTYPES):
                found = []
                for threads in (1, 2, 3, 7):
                    torch.set_num_threads(threads)
                    found.append(sliced_linear(x, slices, m.scales))
                assert all(torch.equal(found[0], other) for other in found)
                assert torch.equal(found[0][:1], sliced_linear(x[:1], slices, m.scales))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_leading_dimensions_strides_and_tall_batches(dtype):
    m = matrix(20, 100, 0.2, torch.bfloat16, 1)
    slices, whole = slices_of(m), torch.randn(6, 3, 250).to(dtype)
    tall = torch.randn(1100, 100).to(dtype)
    for x in (whole[..., 50:150], whole[:, 0, :100], whole[0, 0, :100], whole[::2, :, :200:2], tall):
        y = sliced_linear(x, slices)
        assert y.shape == (*x.shape[:-1], 20)
        assert y.dtype == dtype
        flat = x.reshape(-1, 100)
        assert ((y.reshape(-1, 20).double() - expected(m, flat)).abs() <= tolerance(m, flat, None, by_torch=True)).all()
    assert sliced_linear(whole[:0, :, :100], slices).shape == (0, 3, 20)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("x_value", [float("inf"), float("-inf"), float("nan")])
def test_infinite_activations_are_as_in_a_dense_product(values, x_value):
    m = matrix(40, 190, 0.3, values, 6)
    slices, x = slices_of(m), torch.ones(2, 190)
    x[0, 33] = x_value
    for dtype in DTYPES:
        y, exact = sliced_linear(x.to(dtype), slices, m.scales), expected(m, x)
        assert torch.equal(y.isnan(), exact.isnan())
        assert torch.equal(y.isinf(), exact.isinf())
        assert (
            (y[1].double() - exact[1]).abs() <= tolerance(m, x, None, by_torch=True)[1] + 2**-7 * exact[1].abs()
        ).all()


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30])
def test_very_small_and_very_large_activations(size):
    m = matrix(20, 200, 0.2, torch.int8, 7)
    slices = slices_of(m)
    for dtype in DTYPES:
        x = (torch.rand(2, 200) * size).to(dtype)
        y, exact = sliced_linear(x, slices, m.scales).double(), expected(m, x)
        assert ((y - exact).abs() <= 0.01 * exact.abs() + 1e-36).all()


def test_gradients_reach_x_and_bias():
    m = matrix(37, 145, 0.2, torch.int8, 9)
    slices = slices_of(m)
    x, bias = torch.randn(2, 3, 145, requires_grad=True), torch.randn(37, requires_grad=True)
    (sliced_linear(x, slices, m.scales, bias) ** 2).sum().backward()
    x2, bias2 = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    ((x2 @ m.dense.T + bias2) ** 2).sum().backward()
    torch.testing.assert_close(x.grad.double(), x2.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bias.grad.double(), bias2.grad, atol=1e-4, rtol=1e-4)
    x.grad = None
    sliced_linear(x, slices, m.scales).sum().backward()  # most models have no biases
    torch.testing.assert_close(x.grad.double(), m.dense.sum(0).expand(2, 3, -1), atol=1e-4, rtol=1e-4)


def test_the_operator_is_one_that_torch_compiles():
    m = matrix(32, 150, 0.1, torch.bfloat16, 10)
    s, x = slices_of(m), torch.randn(2, 150).bfloat16()
    torch.library.opcheck(sliced._operator, (x, s.steps, s.windows, s.starts, s.order, s.columns, None, None))
    compiled = torch.compile(lambda a: sliced_linear(a * 2, s) + 1, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), sliced_linear(x * 2, s) + 1)


@needs_kernel
@pytest.mark.parametrize("faster", [True, False])
def test_dense_products_are_taken_where_they_are_faster(monkeypatch, faster):
    monkeypatch.delenv(choice.VARIABLE)
    monkeypatch.setattr(choice, "table", {})
    timed, taken, kernel = [], [], sliced.Library.sliced
    monkeypatch.setattr(choice, "_measure", lambda *given: (timed.append(given), faster)[1])
    monkeypatch.setattr(sliced.Library, "sliced", lambda *given: (taken.append(1), kernel(*given))[1])
    kept = torch.rand(32, 256, generator=torch.Generator().manual_seed(11)) < 0.1
    m = packed(torch.ones(32, 256).bfloat16(), kept)
    slices = slices_of(m)
    for batch in (8, 9, 15, 300):
        x = torch.randn(batch, 256)
        y = sliced_linear(x, slices)
        assert ((y.double() - expected(m, x)).abs() <= tolerance(m, x, None, by_torch=True)).all()
    assert len(taken) == (1 if faster else 4)
    assert [given[3] for given in timed] == [16, 256]
    # Both were to be timed on a matrix that is no sparser, nor twice as dense.
    share = slices.places / kept.numel()
    assert all(share <= given[-1] < 2 * share for given in timed)


def test_what_does_not_fit_is_refused(monkeypatch):
    m = matrix(ROWS, 2 * PLACES, 0.1, torch.bfloat16, 12)
    slices, x = slices_of(m), torch.randn(2, 2 * PLACES)
    for operands in [
        (x[:, 1:], slices),
        (x.to(torch.complex64), slices),
        (x.to("meta"), slices),
        (x, slices, None, torch.ones(ROWS + 1)),
    ]:
        with pytest.raises(PhoenixError, match="sparse_linear: "):
            sliced_linear(*operands)
    monkeypatch.setenv(library.VARIABLE, "torch")
    library.library.cache_clear()
    with pytest.raises(PhoenixError, match="needs the compiled kernels; load the model again"):
        sliced_linear(x, slices)
    with pytest.raises(PhoenixError, match="needs the compiled kernels; load the model again"):
        unslice(slices)
    library.library.cache_clear()


def test_kernels_without_the_layout_unpack_it(monkeypatch):
    m = matrix(50, 300, 0.1, torch.int8, 13)
    slices, x = slices_of(m), torch.randn(5, 300).bfloat16()
    for one in LIBRARIES:
        monkeypatch.setenv(library.VARIABLE, one.path)
        library.library.cache_clear()
        y = sliced_linear(x, slices, m.scales)
        assert ((y.double() - expected(m, x)).abs() <= tolerance(m, x, None, by_torch=True)).all()
        assert all(torch.equal(*pair) for pair in zip(unslice(slices), m.parts[:3], strict=True))
    library.library.cache_clear()
    torch.testing.assert_close(sparse_linear(x, *m.parts), sliced_linear(x, slices, m.scales))
