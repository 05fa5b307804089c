import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.importance import wanda_importance
from phoenix_sparse.pruning.patterns import UNSTRUCTURED, Pattern
from phoenix_sparse.pruning.reconstruction.dsnot import dsnot
from phoenix_sparse.pruning.reconstruction.moments import Moments
from phoenix_sparse.pruning.selection import keep

TWO_OF_FOUR = Pattern("n:m", 2, 4)


def wanda(layer, sparsity, pattern=UNSTRUCTURED):
    return keep(wanda_importance(layer.weight, layer.moments.squared_norm.sqrt()), sparsity, "row", pattern)


def expected_errors(layer, mask):
    """|ε| of each row from the inputs themselves, summed over a sequence (all tokens are one)."""
    return ((layer.weight.double() * ~mask) @ layer.inputs.double().sum(0)).abs()


def reference_row(weight, mask, inputs, group, max_cycles, threshold):
    """One row in plain Python: swap after swap, with the candidates sorted anew at each."""
    part = weight * inputs.sum(0)
    spread, norm = inputs.var(0, correction=0), weight.abs() * inputs.square().sum(0).sqrt()
    mask, moved = mask.clone(), set()
    error = part[~mask].sum().item()
    start = mask.tolist()
    for _ in range(max_cycles):
        if abs(error) <= threshold:
            break
        sign = 1 if error > 0 else -1
        columns = range(len(weight))
        grow = [c for c in columns if not start[c] and c not in moved and sign * part[c] > 0]
        grow.sort(key=lambda c: -sign * part[c] / spread[c])
        pair = None
        for column in grow:
            mates = [c for c in columns if c // group == column // group]
            prune = [c for c in mates if start[c] and c not in moved and sign * part[c] < 0]
            if prune:
                pair = column, min(prune, key=lambda c: norm[c])
                break
        if pair is None or abs(error + part[pair[1]] - part[pair[0]]) >= abs(error):
            break
        error += (part[pair[1]] - part[pair[0]]).item()
        mask[pair[0]], mask[pair[1]] = True, False
        moved |= set(pair)
    return mask


@pytest.mark.parametrize("pattern", [UNSTRUCTURED, TWO_OF_FOUR, Pattern("n:m", 1, 4), Pattern("n:m", 3, 4)], ids=str)
@pytest.mark.parametrize(("max_cycles", "threshold"), [(50, 0.1), (3, 0.0), (50, 200.0)])
def test_same_masks_as_swap_by_swap(make_layer, pattern, max_cycles, threshold):
    layer = make_layer(20, 32)
    mask = wanda(layer, 0.6, pattern)
    found = dsnot(layer.weight, mask, layer.moments, pattern=pattern, max_cycles=max_cycles, threshold=threshold)
    group = 32 if pattern == UNSTRUCTURED else 4
    for row in range(20):
        inputs = layer.inputs.double()
        expected = reference_row(layer.weight[row].double(), mask[row], inputs, group, max_cycles, threshold)
        assert torch.equal(found[row], expected), row


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 8),
    groups=st.integers(1, 8),
    tokens=st.integers(1, 40),
    sparsity=st.floats(0, 0.95),
    pattern=st.sampled_from([UNSTRUCTURED, TWO_OF_FOUR]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_counts_stay_and_no_expected_error_grows(make_layer, out, groups, tokens, sparsity, pattern, dtype):
    layer = make_layer(out, 4 * groups, tokens=tokens, dtype=dtype)
    mask = wanda(layer, sparsity, pattern)
    before = mask.clone()
    found = dsnot(layer.weight, mask, layer.moments, pattern=pattern)
    assert torch.equal(mask, before)
    assert found.dtype == torch.bool
    size = 4 if pattern == TWO_OF_FOUR else 4 * groups
    assert torch.equal(found.reshape(-1, size).sum(1), mask.reshape(-1, size).sum(1))
    old, new = expected_errors(layer, mask), expected_errors(layer, found)
    assert (new <= old * 1.0001 + 1e-3).all()


@pytest.mark.parametrize("pattern", [UNSTRUCTURED, TWO_OF_FOUR], ids=str)
def test_the_expected_error_falls(make_layer, pattern):
    layer = make_layer(64, 128)
    mask = wanda(layer, 0.5, pattern)
    found = dsnot(layer.weight, mask, layer.moments, pattern=pattern)
    old, new = expected_errors(layer, mask), expected_errors(layer, found)
    assert new.mean() < 0.3 * old.mean()
    assert (found != mask).any()


def test_masks_whose_rows_differ_keep_their_counts(make_layer):
    layer = make_layer(16, 24)
    mask = torch.rand(16, 24, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 1, 16)[:, None]
    mask[0], mask[15] = False, True
    found = dsnot(layer.weight, mask, layer.moments)
    assert torch.equal(found.sum(1), mask.sum(1))
    assert torch.equal(found[[0, 15]], mask[[0, 15]])


def test_no_cycles_or_a_high_threshold_change_nothing(make_layer):
    layer = make_layer(8, 16)
    mask = wanda(layer, 0.5)
    assert torch.equal(dsnot(layer.weight, mask, layer.moments, max_cycles=0), mask)
    assert torch.equal(dsnot(layer.weight, mask, layer.moments, threshold=1e9), mask)


def test_constant_and_dead_inputs_break_nothing(make_layer):
    layer = make_layer(8, 16)
    inputs = layer.inputs.clone()
    inputs[:, 2], inputs[:, 5] = 0, 3
    moments = Moments(16, torch.device("cpu"))
    moments.add(inputs)
    mask = wanda(layer, 0.5)
    found = dsnot(layer.weight, mask, moments)
    assert torch.equal(found.sum(1), mask.sum(1))
    nothing = Moments(16, torch.device("cpu"))
    assert torch.equal(dsnot(layer.weight, mask, nothing), mask)


def test_refusals_say_where(make_layer):
    layer = make_layer(4, 6)
    mask = wanda(layer, 0.5)
    with pytest.raises(PhoenixError, match=r"sparsify\.pattern: DSnoT has no swaps for 2x1"):
        dsnot(layer.weight, mask, layer.moments, pattern=Pattern("block", 2, 1))
    with pytest.raises(PhoenixError, match=r"sparsify\.pattern: 2:4 does not divide q_proj"):
        dsnot(layer.weight, mask, layer.moments, pattern=TWO_OF_FOUR, name="q_proj")
    with pytest.raises(PhoenixError, match="q_proj: .* don't fit"):
        dsnot(layer.weight, mask[:, :5], layer.moments, name="q_proj")
    with pytest.raises(PhoenixError, match="q_proj: .* NaN"):
        dsnot(layer.weight * torch.nan, mask, layer.moments, name="q_proj")
