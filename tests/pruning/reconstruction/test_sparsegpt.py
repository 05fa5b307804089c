import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.patterns import STRUCTURED, UNSTRUCTURED, Pattern, parse_pattern
from phoenix_sparse.pruning.reconstruction.gram import relative_error
from phoenix_sparse.pruning.reconstruction.sparsegpt import inverse_factor, sparsegpt


def reference(weight, gram, sparsity, pattern, block, damp=0.01):
    """In float64 and by H⁻¹ itself: after each column, Gaussian elimination takes it out of the inverse."""
    weight, hessian = weight.double().clone(), gram.double().clone()
    rows, columns = weight.shape
    hessian += damp * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    inverses = []
    for column in range(columns):
        inverses.append(inverse.clone())
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    pivots = torch.stack([inverses[column][column, column] for column in range(columns)])
    mask = torch.ones(rows, columns, dtype=torch.bool)
    for column in range(columns):
        scores = weight**2 / pivots
        if pattern.kind == "n:m" and column % pattern.second == 0:
            for row in range(rows):
                group = list(range(column, column + pattern.second))
                group.sort(key=lambda place: scores[row, place])
                mask[row, group[: pattern.second - pattern.first]] = False
        if pattern.kind == "unstructured" and column % block == 0:
            end = min(column + block, columns)
            places = [(row, place) for row in range(rows) for place in range(column, end)]
            places.sort(key=lambda place: scores[place])
            for place in places[: int(end * rows * sparsity) - int((~mask).sum())]:
                mask[place] = False
        error = weight[:, column] * ~mask[:, column] / pivots[column]
        weight[:, column:] -= torch.outer(error, inverses[column][column, column:])
        weight[:, column] *= mask[:, column]
    return weight, mask


CASES = [
    ("unstructured", 0.5, 128),
    ("unstructured", 0.7, 8),
    ("unstructured", 0.95, 7),
    ("2:4", 0.5, 128),
    ("2:4", 0.5, 8),
    ("1:4", 0.5, 6),
    ("3:5", 0.5, 8),
]


@pytest.mark.parametrize(("pattern", "sparsity", "block"), CASES)
def test_same_mask_and_weights_as_by_elimination(make_layer, pattern, sparsity, block):
    layer, form = make_layer(9, 20), parse_pattern(pattern)
    weight, mask = sparsegpt(layer.weight, layer.gram, sparsity, form, block=block)
    expected_weight, expected_mask = reference(layer.weight, layer.gram, sparsity, form, block)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(weight.double(), expected_weight, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("size", [1, 1000], ids=["plain", "with_an_outlier"])
def test_the_factor_is_the_cholesky_factor_of_the_inverse(make_layer, size):
    gram = make_layer(2, 16).gram.double()
    gram[5] *= size
    gram[:, 5] *= size
    hessian = gram / gram.diagonal().mean() + 0.01 * torch.eye(16, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    torch.testing.assert_close(inverse_factor(gram.float(), 0.01).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_factor_is_sound_where_one_direction_is_all():
    """R of 11ᵀ + dI in closed form; float32 arithmetic is far off."""
    columns, damp = 400, 2.0**-10
    rest = torch.arange(columns - 1, -1, -1, dtype=torch.float64)  # columns right of each
    diagonal = ((rest + damp) / (damp * (rest + 1 + damp))).sqrt()
    factor = inverse_factor(torch.ones(columns, columns), damp).double()
    torch.testing.assert_close(factor.diagonal(), diagonal, rtol=1e-5, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 12),
    columns=st.integers(1, 30),
    tokens=st.integers(1, 60),
    sparsity=st.floats(0, 0.95),
    block=st.sampled_from([1, 8, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_exactly_so_many_go_and_nothing_breaks(make_layer, out, columns, tokens, sparsity, block, dtype):
    """Often with fewer tokens than columns: a matrix of low rank."""
    layer = make_layer(out, columns, tokens=tokens, dtype=dtype)
    before = layer.weight.clone(), layer.gram.clone()
    weight, mask = sparsegpt(layer.weight, layer.gram, sparsity, block=block)
    assert weight.dtype == dtype
    assert weight.shape == mask.shape == layer.weight.shape
    assert mask.dtype == torch.bool
    assert int((~mask).sum()) == int(out * columns * sparsity)
    assert torch.isfinite(weight).all()
    assert not weight[~mask].any()
    assert torch.equal(layer.weight, before[0])
    assert torch.equal(layer.gram, before[1])


def test_blocks_lose_their_shares(make_layer):
    layer = make_layer(13, 40)
    _, mask = sparsegpt(layer.weight, layer.gram, 0.613, block=8)
    for end in range(8, 41, 8):
        assert int((~mask[:, :end]).sum()) == int(end * 13 * 0.613)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_n_of_each_m_stay_whatever_the_sparsity(make_layer, n, m):
    layer = make_layer(6, 32)
    for sparsity in (0.0, 0.9):
        weight, mask = sparsegpt(layer.weight, layer.gram, sparsity, Pattern("n:m", n, m))
        assert (mask.reshape(6, -1, m).sum(-1) == n).all()
        assert not weight[~mask].any()


def test_no_sparsity_leaves_everything_as_it_is(make_layer):
    layer = make_layer(5, 8)
    weight, mask = sparsegpt(layer.weight, layer.gram, 0.0)
    assert torch.equal(weight, layer.weight)
    assert weight is not layer.weight
    assert mask.all()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_dead_columns_go_first_and_cost_nothing(make_layer, pattern):
    layer = make_layer(8, 16)
    gram = layer.gram.clone()
    dead = [1, 6, 11]
    gram[dead], gram[:, dead] = 0, 0
    weight, mask = sparsegpt(layer.weight, gram, 0.5, parse_pattern(pattern))
    assert not weight[:, dead].any()
    assert not mask[:, dead].any()
    alive = [column for column in range(16) if column not in dead]
    rest = gram[alive][:, alive]
    if pattern == "unstructured":  # as if they weren't there
        expected, _ = sparsegpt(layer.weight[:, alive], rest, (64 - 24) / 104)
        torch.testing.assert_close(weight[:, alive], expected, rtol=1e-3, atol=1e-4)
    nothing, mask = sparsegpt(layer.weight, torch.zeros(16, 16), 0.25)
    assert not nothing.any()
    assert int(mask.sum()) == 96


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_scale_of_the_inputs_does_not_matter(make_layer, factor):
    layer = make_layer(8, 24)
    gram = layer.gram.clone()
    gram[3], gram[:, 3] = 0, 0
    weight, mask = sparsegpt(layer.weight, gram, 0.6)
    other, other_mask = sparsegpt(layer.weight, gram * factor, 0.6)
    assert torch.equal(mask, other_mask)
    torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-5)


def test_better_than_the_same_mask_without_an_update(make_layer):
    layer = make_layer(32, 48)
    for pattern in (UNSTRUCTURED, Pattern("n:m", 2, 4)):
        weight, mask = sparsegpt(layer.weight, layer.gram, 0.6, pattern)
        masked = relative_error(layer.weight, layer.weight * mask, layer.gram)
        assert relative_error(layer.weight, weight, layer.gram) < 0.6 * masked


def test_damping_rises_until_the_matrix_can_be_factorised():
    gram = torch.tensor([[1.0, 1.05], [1.05, 1.0]])  # not of any inputs, as rounding may make it
    weight, mask = sparsegpt(torch.tensor([[1.0, 2.0]]), gram, 0.5)
    assert torch.isfinite(weight).all()
    assert int(mask.sum()) == 1


def refusals():
    weight, gram = torch.ones(2, 4), torch.eye(4)
    nan_weight, nan_gram = weight.clone(), gram.clone()
    nan_weight[0, 1], nan_gram[2, 2] = torch.nan, torch.nan
    indefinite = gram + 1000 * (1 - gram)
    return [
        (weight, gram, 0.5, Pattern("block", 2, 1), r"sparsify\.pattern: 2x1"),
        (weight, gram, 0.5, STRUCTURED, r"sparsify\.pattern: structured"),
        (torch.ones(2, 3), torch.eye(3), 0.5, Pattern("n:m", 2, 4), r"sparsify\.pattern: 2:4 does not divide q_proj"),
        (weight, gram, 1.0, UNSTRUCTURED, r"sparsify\.sparsity: 1\.0"),
        (weight, gram, -0.1, UNSTRUCTURED, r"sparsify\.sparsity: -0\.1"),
        (weight, torch.eye(3), 0.5, UNSTRUCTURED, "q_proj: a weight .* don't fit"),
        (nan_weight, gram, 0.5, UNSTRUCTURED, "q_proj: the weights have values that are NaN"),
        (weight, nan_gram, 0.5, UNSTRUCTURED, "q_proj: the second moments of the inputs have values that are NaN"),
        (weight, -gram, 0.5, UNSTRUCTURED, "q_proj: the second moments of the inputs are negative"),
        (weight, indefinite, 0.5, UNSTRUCTURED, "q_proj: .* not positive definite"),
    ]


@pytest.mark.parametrize(("weight", "gram", "sparsity", "pattern", "message"), refusals())
def test_refusals_say_where(weight, gram, sparsity, pattern, message):
    with pytest.raises(PhoenixError, match=message):
        sparsegpt(weight, gram, sparsity, pattern, name="q_proj")


def test_a_weight_too_large_for_its_dtype_is_refused():
    """Two inputs that are always the same: what stays takes over what goes."""
    weight = torch.full((1, 2), 6e4, dtype=torch.float16)
    with pytest.raises(PhoenixError, match="left the range of float16"):
        sparsegpt(weight, torch.ones(2, 2), 0.5)
