"""Masks against an independent implementation of Wanda as published: hooks, running means, row-wise stable sort."""

import pytest
import torch
from torch import nn

from phoenix_sparse.masks import compute_sparsity_stats, require_preserved
from phoenix_sparse.models import decoder_blocks, prunable_linears
from phoenix_sparse.pruning.sequential import prune
from phoenix_sparse.pruning.settings import SparsifySettings
from tiny import CONFIGS, make_model


class Captured(Exception):
    pass


def published_wanda(model, tokens, sparsity):
    """The published order of work, written from its description, for models whose blocks share their arguments.

    The first block is replaced by a catcher; blocks are then run one at a time on the caught inputs. The norm of a
    column is a running mean over sequences of its summed squares, in float32.
    """
    names = {id(module): name for name, module in model.named_modules()}
    inputs, arguments = [], {}
    blocks = list(decoder_blocks(model).values())
    stack = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and m[0] is blocks[0])

    class Catcher(nn.Module):
        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(blocks[0], name)

        def forward(self, hidden, *args, **kwargs):
            inputs.append(hidden)
            arguments.update({k: v for k, v in kwargs.items() if k != "past_key_values"})
            raise Captured

    stack[0] = Catcher()
    for row in tokens:
        with pytest.raises(Captured), torch.no_grad():
            model(row[None], use_cache=False)
    stack[0] = blocks[0]

    def forward(block, hidden):
        with torch.no_grad():
            out = block(hidden, **arguments)
        return out[0] if isinstance(out, tuple) else out

    masks = {}
    for block in blocks:
        subset = {names[id(m)]: m for m in block.modules() if isinstance(m, nn.Linear)}
        rows = {name: torch.zeros(m.in_features) for name, m in subset.items()}
        seen = dict.fromkeys(subset, 0)

        def note(name, rows=rows, seen=seen):
            def hook(_module, args, _output):
                x = args[0].reshape(-1, args[0].shape[-1]).t()
                rows[name] *= seen[name] / (seen[name] + 1)
                seen[name] += 1
                rows[name] += torch.norm(x.type(torch.float32), p=2, dim=1) ** 2 / seen[name]

            return hook

        handles = [m.register_forward_hook(note(name)) for name, m in subset.items()]
        for hidden in inputs:
            forward(block, hidden)
        for handle in handles:
            handle.remove()
        for name, module in subset.items():
            metric = module.weight.data.abs() * torch.sqrt(rows[name].reshape(1, -1))
            order = torch.sort(metric, dim=-1, stable=True)[1][:, : int(metric.shape[1] * sparsity)]
            pruned = torch.zeros_like(metric) == 1
            pruned.scatter_(1, order, True)
            module.weight.data[pruned] = 0
            masks[name] = ~pruned
        inputs = [forward(block, hidden) for hidden in inputs]
    return masks


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_wanda_equals_the_published_algorithm_to_the_last_bit(kind, sparsity):
    tokens = torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(1))
    ours, theirs = make_model(kind), make_model(kind)
    masks = prune(ours, SparsifySettings(sparsity=sparsity), tokens=tokens, seed=0)
    expected = published_wanda(theirs, tokens, sparsity)
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[name], expected[name]) for name in masks)
    state = theirs.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in ours.state_dict().items())


def test_wanda_equals_the_published_algorithm_on_a_real_model(shared):
    from phoenix_sparse.models import load_model

    directory = shared / "models" / "base-65m"
    tokens = torch.randint(0, 16384, (2, 64), generator=torch.Generator().manual_seed(1))
    ours, theirs = load_model(directory, "float32", "cpu"), load_model(directory, "float32", "cpu")
    masks = prune(ours, SparsifySettings(sparsity=0.5), tokens=tokens, seed=0)
    expected = published_wanda(theirs, tokens, 0.5)
    assert sum(int((masks[name] != expected[name]).sum()) for name in expected) == 0


@pytest.mark.parametrize("importance", ["wanda", "magnitude", "random"])
@pytest.mark.parametrize("group", ["row", "layer", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8])
def test_sparsity_is_met_and_weights_are_zero(importance, group, sparsity):
    model = make_model()
    tokens = torch.randint(0, 256, (2, 16))
    settings = SparsifySettings(importance=importance, group=group, sparsity=sparsity)
    masks = prune(model, settings, tokens=tokens, seed=0)
    layers = prunable_linears(model)
    require_preserved(masks, layers, "model")
    stats = compute_sparsity_stats(masks)
    rows = sum(mask.shape[0] for mask in masks.values())
    slack = {"row": rows, "layer": len(masks), "global": 1}[group]
    assert 0 <= stats["weights"] * sparsity - (stats["weights"] - stats["nnz"]) <= slack
    if sparsity == 0:
        assert all(mask.all() for mask in masks.values())


def test_magnitude_keeps_the_largest_weights():
    model = make_model()
    before = {name: layer.weight.detach().clone() for name, layer in prunable_linears(model).items()}
    masks = prune(model, SparsifySettings(importance="magnitude", sparsity=0.6), tokens=None, seed=0)
    for name, mask in masks.items():
        size = before[name].abs()
        assert size[mask].min() >= size[~mask].max()


def test_random_depends_on_the_seed_alone():
    def masks(seed):
        return prune(make_model(), SparsifySettings(importance="random"), tokens=None, seed=seed)

    one, two, other = masks(3), masks(3), masks(4)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_embeddings_and_head_stay_dense():
    model = make_model()
    before = model.state_dict()["lm_head.weight"].clone(), model.state_dict()["model.embed_tokens.weight"].clone()
    prune(model, SparsifySettings(importance="magnitude", sparsity=0.9), tokens=None, seed=0)
    assert torch.equal(model.state_dict()["lm_head.weight"], before[0])
    assert torch.equal(model.state_dict()["model.embed_tokens.weight"], before[1])
