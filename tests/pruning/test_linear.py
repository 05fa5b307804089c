"""One linear at a time."""

import pytest
import torch
from torch import nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.importance import Seen, find_importance
from phoenix_sparse.pruning.linear import Method, prune_linear
from phoenix_sparse.pruning.observing import Observer
from phoenix_sparse.pruning.patterns import parse_pattern
from phoenix_sparse.pruning.reconstruction.alps import alps
from phoenix_sparse.pruning.reconstruction.dsnot import dsnot
from phoenix_sparse.pruning.reconstruction.sparsegpt import sparsegpt
from phoenix_sparse.pruning.selection import keep
from phoenix_sparse.pruning.settings import SparsifySettings

NAME = "model.layers.0.mlp.up_proj"
IMPORTANCES = ["magnitude", "random", "wanda", "ria", "gradient", "taylor", "gblm"]


class Case:
    """A linear with everything that could be measured for it."""

    def __init__(self, out=12, columns=16, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.linear = nn.Linear(columns, out).to(dtype)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(out, columns, generator=generator))
        self.observer = Observer(columns, torch.device("cpu"), gram=True, moments=True)
        mixing = torch.randn(columns, columns, generator=generator)
        for _ in range(3):
            self.observer.add((torch.randn(1, 40, columns, generator=generator) @ mixing + 1).to(dtype))
        self.gradient = torch.randn(out, columns, generator=generator)
        self.dense = self.linear.weight.detach().clone()

    def prune(self, sparsity=0.5, **settings):
        if "pattern" not in settings or "x" in settings["pattern"]:
            settings["sparsity"] = sparsity
        method = Method.of(SparsifySettings(**settings), 3)
        return prune_linear(NAME, self.linear, sparsity, method, self.observer, self.gradient)

    @property
    def weight(self):
        return self.linear.weight.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x2"])
@pytest.mark.parametrize("name", IMPORTANCES)
def test_without_an_update_the_mask_is_that_of_the_scores_and_kept_weights_stay(name, pattern, dtype):
    case = Case(dtype=dtype)
    mask = case.prune(importance=name, pattern=pattern)
    importance = find_importance(name)
    scores = importance.score(case.dense, Seen(NAME, 3, case.observer.norms.norm, case.gradient))
    group = "row" if importance.per_row and pattern == "unstructured" else "layer"
    assert torch.equal(mask, keep(scores, 0.5, group, parse_pattern(pattern)))
    assert torch.equal(case.weight, case.dense * mask)
    assert case.weight.dtype == dtype
    assert mask.float().mean() == 0.5


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("name", ["magnitude", "wanda", "taylor"])
def test_dsnot_begins_with_the_mask_of_the_scores(name, pattern):
    case = Case()
    first = Case()
    start = first.prune(importance=name, pattern=pattern)
    mask = case.prune(importance=name, pattern=pattern, update="dsnot")
    assert torch.equal(mask, dsnot(case.dense, start, case.observer.moments, pattern=parse_pattern(pattern)))
    assert not torch.equal(mask, start)
    assert torch.equal(mask.sum(1), start.sum(1))
    assert torch.equal(case.weight, case.dense * mask)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize(("update", "adjust"), [("sparsegpt", sparsegpt), ("alps", alps)])
def test_weight_updates_are_taken_over(update, adjust, pattern):
    case = Case()
    expected, chosen = adjust(case.dense, case.observer.gram.matrix, 0.5, parse_pattern(pattern))
    mask = case.prune(update=update, pattern=pattern)
    assert torch.equal(mask, chosen)
    assert torch.equal(case.weight, expected)
    assert not torch.equal(case.weight, case.dense * mask)
    assert not case.weight[~mask].any()


@pytest.mark.parametrize("update", ["none", "dsnot", "sparsegpt", "alps"])
def test_each_update_asks_for_what_it_needs(update):
    method = Method.of(SparsifySettings(importance="magnitude", update=update), 0)
    assert method.reads_inputs == (update != "none")
    assert method.observes == {"gram": update in ("sparsegpt", "alps"), "moments": update == "dsnot"}


@pytest.mark.parametrize("update", ["none", "dsnot", "sparsegpt", "alps"])
@pytest.mark.parametrize("name", IMPORTANCES)
def test_sparsity_zero_changes_nothing(name, update):
    case = Case()
    mask = case.prune(0.0, importance=name, update=update)
    assert mask.all()
    assert torch.equal(case.weight, case.dense)


@pytest.mark.parametrize("update", ["none", "dsnot", "sparsegpt", "alps"])
def test_errors_name_the_layer(update):
    case = Case(columns=18)
    with pytest.raises(PhoenixError, match=f"2:4 does not divide {NAME}, 12x18"):
        case.prune(update=update, pattern="2:4")
    assert torch.equal(case.weight, case.dense)
    broken = Case()
    with torch.no_grad():
        broken.linear.weight[2, 3] = torch.nan
    with pytest.raises(PhoenixError, match=NAME):
        broken.prune(update=update)


def test_dead_inputs_are_no_trouble():
    for update in ("none", "dsnot", "sparsegpt", "alps"):
        case = Case()
        case.observer = Observer(16, torch.device("cpu"), gram=True, moments=True)
        case.observer.add(torch.zeros(1, 5, 16))
        mask = case.prune(update=update)
        assert torch.isfinite(case.weight).all()
        assert mask.float().mean() == 0.5
