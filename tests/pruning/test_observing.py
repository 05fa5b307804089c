"""What is measured of a linear's inputs, against float64."""

import gc
import weakref

import pytest
import torch
from torch import nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.models import linears
from phoenix_sparse.pruning.blocks import Blocks
from phoenix_sparse.pruning.observing import ColumnNorms, Observer, observing
from phoenix_sparse.pruning.reconstruction.gram import Gram
from tiny import CONFIGS, make_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_all_tokens_up_to_one_factor(dtype):
    inputs = (torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13)).to(dtype)
    one, several, flat = ColumnNorms(12, CPU), ColumnNorms(12, CPU), ColumnNorms(12, CPU)
    for sequence in inputs:
        one.add(sequence[None])
        flat.add(sequence)  # (tokens, in) is one sequence
    several.add(inputs[:2])
    several.add(inputs[2:])
    expected = (inputs.double().square().sum((0, 1)) / 5).sqrt()
    for norms in (one, several, flat):
        assert norms.norm.dtype == torch.float32
        assert norms.sequences == 5
        torch.testing.assert_close(norms.norm.double(), expected, rtol=1e-5, atol=0)


def test_an_observer_measures_only_what_is_asked_for():
    inputs = torch.randn(2, 6, 4)
    plain, all_of_it = Observer(4, CPU), Observer(4, CPU, gram=True, moments=True)
    for observer in (plain, all_of_it):
        observer.add(inputs)
    assert plain.gram is None
    assert plain.moments is None
    flat = inputs.reshape(-1, 4).double()
    torch.testing.assert_close(all_of_it.gram.matrix.double(), 2 / 12 * flat.t() @ flat)
    torch.testing.assert_close(all_of_it.moments.mean.double(), flat.mean(0))
    torch.testing.assert_close(all_of_it.moments.variance.double(), flat.var(0, correction=0))


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_shared_observers_equal_separate_ones(kind, monkeypatch):
    """Each linear observed on its own, by a hook of the test's, must see what the shared observer saw."""
    blocks = Blocks(make_model(kind))
    rows = torch.randint(0, 256, (4, 20), generator=torch.Generator().manual_seed(1))
    hidden = [blocks.embed(row[None]) for row in rows]
    block = blocks.blocks[blocks.names[0]]
    layers = linears(block, blocks.names[0])
    separate = {name: Observer(layer.in_features, CPU, gram=True, moments=True) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _module, args, _output, name=name: separate[name].add(args[0]))
    added = []
    add = Gram.add
    with observing(layers, gram=True, moments=True) as observers:
        for state in hidden:
            blocks.run(0, block, state)
    for name, one in separate.items():
        assert torch.equal(observers[name].norms.norm, one.norms.norm)
        assert torch.equal(observers[name].gram.matrix, one.gram.matrix)
        assert torch.equal(observers[name].moments.variance, one.moments.variance)
    shared = {leaf: observers[f"{blocks.names[0]}.self_attn.{leaf}_proj"] for leaf in "qkv"}
    assert shared["q"] is shared["k"] is shared["v"]
    for layer in layers.values():
        layer._forward_hooks.clear()
    monkeypatch.setattr(Gram, "add", lambda self, inputs: (added.append(self), add(self, inputs)))
    with observing(layers, gram=True):
        blocks.run(0, block, hidden[0])
    # Of q, k and v; of o; of gate and up, or fc1; of down, or fc2.
    assert len(added) == len(set(map(id, added))) == 4


class Choosing(nn.Module):
    """`one` and `other` have the same input as long as `together` says so."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, together):
        return self.one(x) + self.other(x if together else x * 2)


def test_inputs_that_were_never_the_same_are_not_mixed():
    block, inputs = Choosing(), torch.randn(3, 1, 5, 4)
    with observing(linears(block)) as observers:
        for x in inputs:
            block(x, together=False)
    torch.testing.assert_close(observers["other"].norms.norm, observers["one"].norms.norm * 2)


def test_inputs_that_are_the_same_later_on_are_counted_for_each():
    block, inputs = Choosing(), torch.randn(2, 1, 5, 4)
    with observing(linears(block)) as observers:
        block(inputs[0], together=False)
        block(inputs[1], together=True)
    expected = (torch.stack([inputs[0] * 2, inputs[1]]).square().sum((1, 2)) / 2).sum(0).sqrt()
    torch.testing.assert_close(observers["other"].norms.norm, expected)
    expected = (inputs.square().sum((1, 2)) / 2).sum(0).sqrt()
    torch.testing.assert_close(observers["one"].norms.norm, expected)


def test_inputs_that_are_no_longer_the_same_are_refused():
    block, x = Choosing(), torch.randn(1, 5, 4)
    with (
        pytest.raises(PhoenixError, match="other has the inputs of one in some forward passes"),
        observing(linears(block)),
    ):
        block(x, together=True)
        block(x.clone(), together=False)
    assert not block.other._forward_pre_hooks


def test_hooks_and_inputs_are_let_go():
    block = Choosing()
    inputs = torch.randn(1, 5, 4)
    kept = weakref.ref(inputs)
    with observing(linears(block)) as observers:
        block(inputs, together=True)
    del inputs
    gc.collect()
    assert kept() is None
    assert not block.one._forward_pre_hooks
    block(torch.randn(1, 5, 4), together=True)
    assert observers["one"].norms.sequences == 1
    with pytest.raises(ZeroDivisionError), observing(linears(block)):
        _ = 1 / 0
    assert not block.one._forward_pre_hooks
