import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.kernels import choice, library, linear, portable
from phoenix_sparse.runtime.kernels.linear import sparse_linear
from runtime.kernels.matrices import DTYPES, VALUES, expected, libraries, matrix, multiply, packed, tolerance

LIBRARIES = libraries()
SHAPES = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 300)),
    # Around the steps of 8 to 64 columns, blocks of 1024 and 4096, and groups of 4 rows.
    st.tuples(
        st.integers(1, 13),
        st.sampled_from([8, 16, 31, 32, 33, 63, 64, 65, 128, 255, 257, 512, 1023, 1024, 1025, 2113, 4097]),
    ),
)
DENSITIES = st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])


@pytest.fixture(params=[*(one.path for one in LIBRARIES), "torch"])
def path(request, monkeypatch):
    """Each instruction set in turn, as a user would ask for it; nothing is timed."""
    monkeypatch.setenv(library.VARIABLE, request.param)
    monkeypatch.setenv(choice.VARIABLE, "off")
    library.library.cache_clear()
    yield request.param
    library.library.cache_clear()


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
def test_every_kernel_agrees_with_float64(shape, density, batch, x_dtype, values, others, biased, seed):
    rows, columns = shape
    m = matrix(rows, columns, density, values, seed, others)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, columns, generator=generator).to(x_dtype)
    bias = torch.randn(rows, generator=generator).to(others) if biased else None
    exact, allowed = expected(m, x, bias), tolerance(m, x, bias)
    for one in LIBRARIES:
        assert ((multiply(one, m, x, bias).double() - exact).abs() <= allowed).all(), one.path
    # Panels and plain torch round the product, and then what scales and bias make of it.
    allowed = tolerance(m, x, bias, by_torch=True)
    for one in LIBRARIES:
        assert ((linear._by_panels(one, x, *m.parts, bias).double() - exact).abs() <= allowed).all(), one.path
    assert ((portable.linear(x, *m.parts, bias).double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_dimensions_and_strides(path, dtype, values):
    m = matrix(20, 100, 0.5, values, 1)
    whole = torch.randn(6, 3, 250).to(dtype)
    for x in (whole[..., 50:150], whole[:, 0, :100], whole[0, 0, :100], whole[::2, :, :200:2], whole[..., 1:101]):
        y = sparse_linear(x, *m.parts)
        assert y.shape == (*x.shape[:-1], 20)
        assert y.dtype == dtype
        flat = x.reshape(-1, 100)
        assert ((y.reshape(-1, 20).double() - expected(m, flat)).abs() <= tolerance(m, flat, None, by_torch=True)).all()
    assert sparse_linear(whole[:0, :, :100], *m.parts).shape == (0, 3, 20)


def test_results_do_not_depend_on_the_number_of_threads(path):
    before = torch.get_num_threads()
    try:
        for values in VALUES:
            m = matrix(700, 515, 0.5, values, 2)
            for batch in (1, 2, 4, 8, 9, 40):
                x = torch.randn(batch, 515).bfloat16()
                found = []
                for threads in (1, 2, 3, 7):
                    torch.set_num_threads(threads)
                    found.append(sparse_linear(x, *m.parts))
                if path != "torch":  # whose own products may differ
                    assert all(torch.equal(found[0], other) for other in found)
    finally:
        torch.set_num_threads(before)


def test_tall_batches_come_in_turns():
    m = matrix(9, 70, 0.5, torch.bfloat16, 4)
    x = torch.randn(1100, 70)
    for one in LIBRARIES:
        assert ((multiply(one, m, x).double() - expected(m, x)).abs() <= tolerance(m, x, None)).all()


@pytest.mark.parametrize("columns", [8192, 4096 + 300, 250])
@pytest.mark.parametrize("spread", ["even", "normal", "outliers", "powers of two"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fixed_point_is_as_exact_as_it_says(dtype, spread, columns):
    """To 2^-23 of a lane's largest activation in each term for bfloat16, to 2^-31 for float32 (avx512_fixed.h).

    The spread decides how many numbers need a lowest digit, and so whether those of several chunks are merged.
    """
    m = matrix(50, columns, 0.5, torch.int8, 5)
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(1, columns, generator=generator)
    if spread == "even":
        x = 1 + x.abs() % 1
    elif spread == "outliers":
        x[0, 7], x[0, 240], x[0, columns // 2] = 3e4, 2**-9, -2e3
    elif spread == "powers of two":
        x *= 2.0 ** torch.randint(-12, 12, x.shape, generator=generator)
    x = x.to(dtype)
    exact = expected(m, x)
    # Four columns of each 64 make up a lane, in blocks of 4096.
    lanes = torch.nn.functional.pad(x.abs().double(), (0, -columns % 4096)).view(-1, 64, 16, 4)
    largest = lanes.amax((1, 3), keepdim=True).expand_as(lanes).reshape(-1)[:columns]
    step = 2**-23 if dtype == torch.bfloat16 else 2**-31
    allowed = tolerance(m, x, None) + step * (m.dense.abs() @ largest)
    for one in LIBRARIES:
        assert ((multiply(one, m, x).double() - exact).abs() <= allowed).all()


def test_outliers_leave_rows_without_them_as_good_as_bfloat16():
    """Activations of language models have single columns a thousand times the others, which a row may have pruned."""
    kept = torch.rand(50, 2048) < 0.5
    kept[:, [7, 1500]] = False
    m = packed(torch.randint(-127, 128, (50, 2048)).to(torch.int8), kept, torch.full((50,), 0.01))
    x = torch.randn(1, 2048)
    x[0, 7], x[0, 1500] = 1e3, -1e3
    x = x.bfloat16()
    exact = expected(m, x)
    for one in LIBRARIES:
        error = (multiply(one, m, x).double() - exact).abs()
        assert (error <= 2**-8 * exact.abs() + 2**-12 * m.dense.norm(dim=1)).all()


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("x_value", [float("inf"), float("nan")])
def test_infinite_activations_stay_infinite(path, values, x_value):
    m = matrix(5, 90, 1.0, values, 6)
    x = torch.ones(1, 90)
    x[0, 33] = x_value
    for dtype in DTYPES:
        y, exact = sparse_linear(x.to(dtype), *m.parts), expected(m, x)
        assert torch.equal(y.isnan(), exact.isnan())
        assert torch.equal(y.isinf(), exact.isinf())


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30])
def test_very_small_and_very_large_activations(size):
    m = matrix(6, 200, 0.7, torch.int8, 7)
    for dtype in DTYPES:
        x = (torch.rand(2, 200) * size).to(dtype)
        for one in LIBRARIES:
            y, exact = multiply(one, m, x).double(), expected(m, x)
            assert ((y - exact).abs() <= 0.01 * exact.abs() + 1e-36).all(), one.path


def test_float16_goes_through_torch(path):
    m = matrix(11, 40, 0.5, torch.bfloat16, 8)
    x = torch.randn(3, 40).half()
    y = sparse_linear(x, *m.parts)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.double(), expected(m, x), atol=0.02, rtol=0.002)
    half = m.values.half()
    torch.testing.assert_close(
        sparse_linear(x.float(), m.bitmask, half, m.row_offsets).double(), expected(m, x), atol=0.02, rtol=0.002
    )


def test_gradients_reach_x_and_bias(path):
    m = matrix(17, 45, 0.5, torch.int8, 9)
    x, bias = torch.randn(2, 3, 45, requires_grad=True), torch.randn(17, requires_grad=True)
    (sparse_linear(x, *m.parts, bias) ** 2).sum().backward()
    x2, bias2 = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    ((x2 @ m.dense.T + bias2) ** 2).sum().backward()
    torch.testing.assert_close(x.grad.double(), x2.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bias.grad.double(), bias2.grad, atol=1e-4, rtol=1e-4)
    x.grad = None
    sparse_linear(x, *m.parts).sum().backward()  # most models have no biases
    torch.testing.assert_close(x.grad.double(), m.dense.sum(0).expand(2, 3, -1), atol=1e-4, rtol=1e-4)


def test_the_operator_is_one_that_torch_compiles():
    m = matrix(12, 50, 0.5, torch.bfloat16, 10)
    x = torch.randn(2, 50).bfloat16()
    torch.library.opcheck(linear._operator, (x, *m.parts, None))
    compiled = torch.compile(lambda a: sparse_linear(a * 2, *m.parts) + 1, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), sparse_linear(x * 2, *m.parts) + 1)


def test_what_does_not_fit_is_refused(path):
    m = matrix(8, 30, 0.5, torch.bfloat16, 11)
    x = torch.randn(2, 30)
    wrong = [
        (torch.randn(2, 41), *m.parts, None),
        (x.to(torch.complex64), *m.parts, None),
        (x, m.bitmask.int(), *m.parts[1:], None),
        (x, m.bitmask, m.values.double(), m.row_offsets, None, None),
        (x, m.bitmask, m.values, m.row_offsets[:-1], None, None),
        (x, m.bitmask, m.values, m.row_offsets.int(), None, None),
        (x, m.bitmask, m.values, m.row_offsets, torch.ones(8), None),
        (x, m.bitmask, m.values.to(torch.int8), m.row_offsets, None, None),
        (x, m.bitmask, m.values.to(torch.int8), m.row_offsets, torch.ones(7), None),
        (x, *m.parts, torch.ones(7)),
    ]
    for operands in wrong:
        with pytest.raises(PhoenixError, match="sparse_linear: "):
            sparse_linear(*operands)
    if path != "torch":
        with pytest.raises(PhoenixError, match="another number"):
            sparse_linear(x, m.bitmask, m.values[:-1], m.row_offsets)
