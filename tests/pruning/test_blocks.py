"""Blocks run one by one give what the model gives."""

import gc
import weakref

import pytest
import torch
from torch import nn

from phoenix_sparse.models import decoder_blocks
from phoenix_sparse.pruning import blocks as module
from phoenix_sparse.pruning.blocks import Blocks
from tiny import CONFIGS, make_model


def logits_by_blocks(blocks, ids):
    hidden = blocks.embed(ids)
    for index, name in enumerate(blocks.names):
        with blocks.opened(name) as block:
            hidden = blocks.run(index, block, hidden)
    return blocks.top(ids, hidden)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_one_by_one_they_give_the_model_s_logits_to_the_last_bit(kind):
    model = make_model(kind)
    blocks = Blocks(model)
    assert blocks.names == list(decoder_blocks(model))
    generator = torch.Generator().manual_seed(0)
    for length in (24, 3, 24, 40):  # beyond the window of Mistral's attention, too
        ids = torch.randint(0, 256, (1, length), generator=generator)
        assert torch.equal(logits_by_blocks(blocks, ids), model(ids).logits)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_the_model_is_left_as_it_was(kind):
    model = make_model(kind)
    ids = torch.randint(0, 256, (1, 12))
    before, keys = model(ids).logits, [set(block.__dict__) for block in decoder_blocks(model).values()]
    logits_by_blocks(Blocks(model), ids)
    assert torch.equal(model(ids).logits, before)
    assert [set(block.__dict__) for block in decoder_blocks(model).values()] == keys


@torch.no_grad()
def test_blocks_come_back_after_an_error(llama, monkeypatch):
    blocks = Blocks(llama)
    ids = torch.randint(0, 256, (1, 8))
    before = llama(ids).logits

    def broken(*_args, **_kwargs):
        raise RuntimeError("no room")

    monkeypatch.setattr(llama.model.embed_tokens, "forward", broken)
    with pytest.raises(RuntimeError, match="no room"):
        blocks.embed(ids)
    monkeypatch.undo()
    assert torch.equal(llama(ids).logits, before)
    assert all("forward" not in block.__dict__ for block in blocks.blocks.values())


@torch.no_grad()
def test_a_forward_of_the_block_s_own_comes_back(llama):
    """As accelerate sets them on a model that it has spread over devices."""
    block, called = llama.model.layers[1], []
    inner = block.forward

    def own(*args, **kwargs):
        called.append(1)
        return inner(*args, **kwargs)

    block.forward = own
    ids = torch.randint(0, 256, (1, 8))
    logits = logits_by_blocks(Blocks(llama), ids)
    assert block.forward is own
    assert called == [1]
    assert torch.equal(llama(ids).logits, logits)


class Positional(nn.Module):
    """A model that gives its blocks an argument by position, and another by name."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, shift, *, scale=1.0, past_key_values=None):
            return self.linear(x + shift) * scale

    class Config:
        num_hidden_layers = 2

    def __init__(self, by_name=False):
        super().__init__()
        self.config, self.by_name = self.Config(), by_name
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(self.Block() for _ in range(2))

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=False):
        hidden = self.embed(input_ids)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, torch.full((4,), float(index + 1)), scale=2.0 + index)
        return type("Output", (), {"logits": hidden})


@torch.no_grad()
def test_arguments_by_position_are_not_lost():
    torch.manual_seed(0)
    model = Positional().eval()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(logits_by_blocks(Blocks(model), ids), model(ids).logits)


@torch.no_grad()
def test_arguments_are_made_once_for_each_length(llama, monkeypatch):
    made = []
    until_stopped = module.Blocks._until_stopped

    def counted(self, ids, act, gives_tuple):
        if act.__name__ == "note":
            made.append(ids.shape[1])
        return until_stopped(self, ids, act, gives_tuple)

    monkeypatch.setattr(module.Blocks, "_until_stopped", counted)
    blocks = Blocks(llama)
    for length in (8, 8, 5, 8, 5):
        logits_by_blocks(blocks, torch.zeros(1, length, dtype=torch.int64))
    assert made == [8, 5]


@torch.no_grad()
def test_no_hidden_state_is_kept(llama):
    blocks = Blocks(llama)
    hidden = blocks.embed(torch.randint(0, 256, (1, 8)))
    with blocks.opened(blocks.names[0]) as block:
        outputs = blocks.run(0, block, hidden)
    kept = [weakref.ref(hidden), weakref.ref(outputs)]
    del hidden, outputs
    gc.collect()
    assert [one() for one in kept] == [None, None]


def test_gradients_pass_through_the_top(llama):
    blocks = Blocks(llama)
    ids = torch.randint(0, 256, (1, 8))
    hidden = blocks.embed(ids).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(blocks.top(ids, hidden).sum(), hidden)
    expected = hidden.detach().requires_grad_()
    (wanted,) = torch.autograd.grad(llama.lm_head(llama.model.norm(expected)).sum(), expected)
    assert torch.equal(gradient, wanted)
