import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.importance import wanda_importance
from phoenix_sparse.pruning.patterns import UNSTRUCTURED, Pattern, parse_pattern
from phoenix_sparse.pruning.reconstruction.alps import alps, refit
from phoenix_sparse.pruning.reconstruction.gram import relative_error
from phoenix_sparse.pruning.reconstruction.sparsegpt import sparsegpt
from phoenix_sparse.pruning.selection import keep

DAMP = 0.01


def damped(gram):
    gram = gram.double()
    return gram + DAMP * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def least_squares(weight, hessian, mask):
    """The best weights on a mask, row by row: H_SS w_S = (H w)_S."""
    best = torch.zeros_like(weight)
    for row in range(len(weight)):
        kept = mask[row].nonzero().squeeze(1)
        best[row, kept] = torch.linalg.solve(hessian[kept][:, kept], (hessian @ weight[row])[kept])
    return best


def error(weight, new_weight, hessian):
    change = weight - new_weight
    return ((change @ hessian) * change).sum().item()


@pytest.mark.parametrize("steps", [{}, {"max_steps": 4, "refit_steps": 40}], ids=["as_usual", "cut_short"])
@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.5), ("unstructured", 0.8), ("2:4", 0.5)])
def test_the_weights_are_the_best_on_their_mask(make_layer, pattern, sparsity, steps):
    layer = make_layer(24, 40)
    new_weight, mask = alps(layer.weight, layer.gram, sparsity, parse_pattern(pattern), damp=DAMP, **steps)
    weight, hessian = layer.weight.double(), damped(layer.gram)
    best = least_squares(weight, hessian, mask)
    assert error(weight, new_weight.double(), hessian) <= 1.005 * error(weight, best, hessian)


def test_refitting_reaches_the_best_from_afar(make_layer):
    layer = make_layer(12, 20)
    hessian = damped(layer.gram)
    scale = hessian.diagonal().sqrt()
    hessian = hessian / scale[:, None] / scale
    dense = layer.weight.double() * scale
    mask = torch.rand(12, 20, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[3], mask[4] = False, True
    found = refit(torch.zeros_like(dense), mask, dense, dense @ hessian, hessian, 60)
    torch.testing.assert_close(found, least_squares(dense, hessian, mask), rtol=1e-6, atol=1e-6)
    assert torch.isfinite(refit(found, mask, dense, dense @ hessian, hessian, 60)).all()


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.9])
def test_alps_beats_sparsegpt_beats_wanda(make_layer, sparsity):
    for seed in range(3):
        layer = make_layer(48, 64, seed=seed)
        scores = wanda_importance(layer.weight, layer.moments.squared_norm.sqrt())
        wanda = layer.weight * keep(scores, sparsity, "row")
        methods = (sparsegpt(layer.weight, layer.gram, sparsity)[0], alps(layer.weight, layer.gram, sparsity)[0])
        errors = [relative_error(layer.weight, weight, layer.gram) for weight in (wanda, *methods)]
        assert 1 > errors[0] > 1.1 * errors[1] > 1.2 * errors[2]


def test_alps_beats_sparsegpt_beats_wanda_two_of_four(make_layer):
    pattern = Pattern("n:m", 2, 4)
    for seed in range(3):
        layer = make_layer(48, 64, seed=seed)
        scores = wanda_importance(layer.weight, layer.moments.squared_norm.sqrt())
        wanda = layer.weight * keep(scores, 0.5, "row", pattern)
        methods = (f(layer.weight, layer.gram, 0.5, pattern)[0] for f in (sparsegpt, alps))
        errors = [relative_error(layer.weight, weight, layer.gram) for weight in (wanda, *methods)]
        assert 1 > errors[0] > 1.1 * errors[1] > 1.2 * errors[2]


def test_near_the_best_of_all_masks(make_layer):
    """One row of ten weights: every mask can be tried."""
    layer = make_layer(1, 10)
    weight, hessian = layer.weight.double(), damped(layer.gram)
    errors = []
    for chosen in torch.combinations(torch.arange(10), 5):
        mask = torch.zeros(1, 10, dtype=torch.bool)
        mask[0, chosen] = True
        errors.append(error(weight, least_squares(weight, hessian, mask), hessian))
    found, _ = alps(layer.weight, layer.gram, 0.5, damp=DAMP)
    better = sum(one < 0.999 * error(weight, found.double(), hessian) for one in errors)
    assert len(errors) == 252
    assert better <= 5


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 12),
    columns=st.integers(1, 30),
    tokens=st.integers(1, 60),
    sparsity=st.floats(0, 0.95),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_exactly_so_many_go_and_nothing_breaks(make_layer, out, columns, tokens, sparsity, dtype):
    """Often with fewer tokens than columns: a matrix of low rank."""
    layer = make_layer(out, columns, tokens=tokens, dtype=dtype)
    before = layer.weight.clone(), layer.gram.clone()
    weight, mask = alps(layer.weight, layer.gram, sparsity)
    assert weight.dtype == dtype
    assert weight.shape == mask.shape == layer.weight.shape
    assert mask.dtype == torch.bool
    assert int((~mask).sum()) == int(out * columns * sparsity)
    assert torch.isfinite(weight).all()
    assert not weight[~mask].any()
    assert torch.equal(layer.weight, before[0])
    assert torch.equal(layer.gram, before[1])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 5)])
def test_n_of_each_m_stay_whatever_the_sparsity(make_layer, n, m):
    layer = make_layer(6, 8 * m)
    for sparsity in (0.0, 0.9):
        weight, mask = alps(layer.weight, layer.gram, sparsity, Pattern("n:m", n, m))
        assert (mask.reshape(6, -1, m).sum(-1) == n).all()
        assert not weight[~mask].any()


def test_no_sparsity_leaves_everything_as_it_is(make_layer):
    layer = make_layer(5, 8)
    weight, mask = alps(layer.weight, layer.gram, 0.0)
    assert torch.equal(weight, layer.weight)
    assert mask.all()


def test_dead_columns_go_first(make_layer):
    layer = make_layer(8, 16)
    gram, dead = layer.gram.clone(), [1, 6, 11]
    gram[dead], gram[:, dead] = 0, 0
    weight, mask = alps(layer.weight, gram, 0.5)
    assert not weight[:, dead].any()
    assert not mask[:, dead].any()
    nothing, mask = alps(layer.weight, torch.zeros(16, 16), 0.25)
    assert not nothing.any()
    assert int(mask.sum()) == 96


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_scale_of_the_inputs_does_not_matter(make_layer, factor):
    layer = make_layer(16, 24)
    weight, mask = alps(layer.weight, layer.gram, 0.6)
    other, other_mask = alps(layer.weight, layer.gram * factor, 0.6)
    assert torch.equal(mask, other_mask)
    torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-4)


def test_refusals_say_where(make_layer):
    layer = make_layer(4, 6)
    with pytest.raises(PhoenixError, match=r"sparsify\.pattern: 2x1"):
        alps(layer.weight, layer.gram, 0.5, Pattern("block", 2, 1))
    with pytest.raises(PhoenixError, match="q_proj: the second moments of the inputs have values that are NaN"):
        alps(layer.weight, layer.gram * torch.nan, 0.5, name="q_proj")
    with pytest.raises(PhoenixError, match=r"sparsify\.sparsity"):
        alps(layer.weight, layer.gram, 1.5, UNSTRUCTURED)
