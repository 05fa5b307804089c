"""Masks and weights against independent implementations of the published order of work: for each block, hooks observe
its linears over all sequences, it is pruned, and its new outputs are the next block's inputs."""

import gc
import itertools
import weakref

import pytest
import torch
from torch import nn

from phoenix_sparse.masks import compute_sparsity_stats, require_preserved
from phoenix_sparse.models import decoder_blocks, prunable_linears
from phoenix_sparse.pruning import linear as linear_module
from phoenix_sparse.pruning.blocks import Blocks
from phoenix_sparse.pruning.initialise import prune
from phoenix_sparse.pruning.linear import Method
from phoenix_sparse.pruning.reconstruction.gram import Gram
from phoenix_sparse.pruning.sequential import prune_blocks, score_blocks
from phoenix_sparse.pruning.settings import SparsifySettings
from tiny import CONFIGS, make_model


class Captured(Exception):
    pass


def published(model, tokens, observer, prune_linear):
    """The published order of work, written from its description, for models whose blocks share their arguments.

    The first block is replaced by a catcher; blocks are then run one at a time on the caught inputs.
    `observer(columns)` takes in each linear's inputs, (tokens, in); `prune_linear(weight, observer)` prunes in place
    and gives what it dropped.
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
        observers = {name: observer(m.in_features) for name, m in subset.items()}

        def note(name, observers=observers):
            return lambda _module, args, _output: observers[name].add(args[0].reshape(-1, args[0].shape[-1]))

        handles = [m.register_forward_hook(note(name)) for name, m in subset.items()]
        for hidden in inputs:
            forward(block, hidden)
        for handle in handles:
            handle.remove()
        for name, module in subset.items():
            masks[name] = ~prune_linear(module.weight.data, observers[name])
        inputs = [forward(block, hidden) for hidden in inputs]
    return masks


class RunningNorm:
    """The norm of a column is a running mean over sequences of its summed squares, in float32."""

    def __init__(self, columns):
        self.rows, self.seen = torch.zeros(columns), 0

    def add(self, x):
        self.rows *= self.seen / (self.seen + 1)
        self.seen += 1
        self.rows += torch.norm(x.t().type(torch.float32), p=2, dim=1) ** 2 / self.seen


def published_wanda(model, tokens, sparsity, n=0, m=0):
    """Row-wise stable sort; for N:M the M - N lowest of each M neighbours."""

    def prune_linear(weight, norm):
        metric = weight.abs() * torch.sqrt(norm.rows.reshape(1, -1))
        pruned = torch.zeros_like(metric) == 1
        if m:
            for start in range(0, metric.shape[1], m):
                lowest = torch.topk(metric[:, start : start + m].float(), m - n, dim=1, largest=False).indices
                pruned.scatter_(1, start + lowest, True)
        else:
            order = torch.sort(metric, dim=-1, stable=True)[1][:, : int(metric.shape[1] * sparsity)]
            pruned.scatter_(1, order, True)
        weight[pruned] = 0
        return pruned

    return published(model, tokens, RunningNorm, prune_linear)


class Hessian:
    """(2/n) XᵀX over the sequences seen so far, n of them, in float64."""

    def __init__(self, columns):
        self.matrix, self.seen = torch.zeros(columns, columns, dtype=torch.float64), 0

    def add(self, x):
        self.matrix *= self.seen / (self.seen + 1)
        self.seen += 1
        x = x.double() * (2 / self.seen) ** 0.5
        self.matrix += x.t() @ x


def published_sparsegpt(model, tokens, sparsity, n=0, m=0, damp=0.01):
    """Column by column with the Cholesky factor of the inverse, in float64; no layer here is wider than a block of 128.

    The published threshold takes one weight more than its share, and ties along; here it is exactly the share.
    """

    def prune_linear(weight, hessian):
        matrix, values = hessian.matrix.clone(), weight.double()
        assert matrix.shape[0] <= 128
        assert (matrix.diagonal() > 0).all()
        matrix.diagonal().add_(damp * matrix.diagonal().mean())
        inverse = torch.linalg.cholesky(torch.linalg.inv(matrix), upper=True)
        pruned = torch.zeros_like(values) == 1
        if not m:
            scores = (values**2 / inverse.diagonal() ** 2).flatten()
            pruned.view(-1)[torch.sort(scores, stable=True).indices[: int(scores.numel() * sparsity)]] = True
        for column in range(values.shape[1]):
            if m and column % m == 0:
                part = slice(column, column + m)
                scores = values[:, part] ** 2 / inverse.diagonal()[part] ** 2
                pruned.scatter_(1, column + torch.topk(scores, m - n, dim=1, largest=False).indices, True)
            kept = values[:, column].masked_fill(pruned[:, column], 0)
            error = (values[:, column] - kept) / inverse[column, column]
            values[:, column + 1 :] -= error[:, None] @ inverse[column, None, column + 1 :]
            values[:, column] = kept
        weight.copy_(values)
        return pruned

    return published(model, tokens, Hessian, prune_linear)


def draw_tokens(rows=5, length=24, seed=1):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_wanda_equals_the_published_algorithm_to_the_last_bit(kind, sparsity):
    tokens = torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(1))
    ours, theirs = make_model(kind), make_model(kind)
    masks = prune(ours, SparsifySettings(importance="wanda", sparsity=sparsity), tokens=tokens, seed=0)
    expected = published_wanda(theirs, tokens, sparsity)
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[name], expected[name]) for name in masks)
    state = theirs.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in ours.state_dict().items())


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_n_of_m_wanda_equals_the_published_algorithm(kind, n, m):
    tokens = draw_tokens()
    ours, theirs = make_model(kind), make_model(kind)
    masks = prune(ours, SparsifySettings(importance="wanda", pattern=f"{n}:{m}", sparsity=1 - n / m), tokens=tokens)
    expected = published_wanda(theirs, tokens, None, n, m)
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[name], expected[name]) for name in masks)
    state = theirs.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in ours.state_dict().items())


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("sparsity", "n", "m"), [(0.5, 0, 0), (0.7, 0, 0), (0.5, 2, 4), (0.5, 4, 8)])
def test_sparsegpt_equals_the_published_order_of_work(kind, sparsity, n, m):
    tokens = draw_tokens(rows=8)
    ours, theirs = make_model(kind), make_model(kind)
    pattern = f"{n}:{m}" if m else "unstructured"
    masks = prune(ours, SparsifySettings(update="sparsegpt", sparsity=sparsity, pattern=pattern), tokens=tokens)
    expected = published_sparsegpt(theirs, tokens, sparsity, n, m)
    assert masks.keys() == expected.keys()
    different = sum(int((masks[name] != expected[name]).sum()) for name in masks)
    assert different <= 4  # of 20,000; float32 against float64
    state = theirs.state_dict()
    for name, weight in ours.state_dict().items():
        near = torch.isclose(weight, state[name], rtol=1e-3, atol=1e-3)
        assert int((~near).sum()) <= different + 4


def test_wanda_equals_the_published_algorithm_on_a_real_model(shared):
    from phoenix_sparse.models import load_model

    directory = shared / "models" / "base-65m"
    tokens = torch.randint(0, 16384, (2, 64), generator=torch.Generator().manual_seed(1))
    ours, theirs = load_model(directory, "float32", "cpu"), load_model(directory, "float32", "cpu")
    masks = prune(ours, SparsifySettings(importance="wanda", sparsity=0.5), tokens=tokens, seed=0)
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


IMPORTANCES = ["magnitude", "random", "wanda", "ria", "gradient", "taylor", "gblm"]
PATTERNS = {
    "unstructured": [0.0, 0.5, 0.95],
    "2:4": [0.5],
    "1:8": [0.875],
    "16x1": [0.0, 0.5, 0.95],
    "1x8": [0.5],
    "structured": [0.0, 0.3, 0.7],
}
METHODS = [
    (importance, update, pattern, sparsity)
    for importance, update, pattern in itertools.product(IMPORTANCES, ["none", "dsnot", "sparsegpt", "alps"], PATTERNS)
    if update == "none" or ("x" not in pattern and pattern != "structured")
    if (update in ("none", "dsnot") or importance == "wanda")  # the others choose without the importance
    for sparsity in PATTERNS[pattern]
]


@pytest.fixture(scope="module")
def rows():
    ids = draw_tokens(rows=3, length=18, seed=3).tolist()
    return [{"input_ids": one, "labels": [-100] * 6 + one[6:]} for one in ids]


@pytest.mark.parametrize(("importance", "update", "pattern", "sparsity"), METHODS)
def test_no_method_leaves_nan_or_a_dead_layer(importance, update, pattern, sparsity, rows):
    settings = SparsifySettings(importance=importance, update=update, pattern=pattern, sparsity=sparsity)
    ours, again = make_model(), make_model()
    tokens = draw_tokens(rows=2, length=16)
    masks = prune(ours, settings, tokens=tokens, rows=rows, seed=3)
    assert list(masks) == list(prunable_linears(ours))
    require_preserved(masks, prunable_linears(ours), "model")
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert mask.device.type == "cpu"
        assert mask.any(), name
        assert prunable_linears(ours)[name].weight.any(), name
        if sparsity == 0:
            assert mask.all()
    assert all(torch.isfinite(value).all() for value in ours.state_dict().values())
    assert torch.isfinite(ours(tokens).logits).all()
    if sparsity == 0:
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())
    repeated = prune(again, settings, tokens=tokens, rows=rows, seed=3)
    assert all(torch.equal(repeated[name], mask) for name, mask in masks.items())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())
    stats = compute_sparsity_stats(masks)
    unit = {"16x1": 16 * 14, "1x8": 8 * 14, "structured": 96}.get(pattern, 32 * 14)
    assert abs(stats["nnz"] - stats["weights"] * (1 - sparsity)) <= unit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("update", ["none", "dsnot", "sparsegpt", "alps"])
def test_other_dtypes_stay_what_they_are(update, dtype):
    model = make_model().to(dtype)
    masks = prune(model, SparsifySettings(update=update), tokens=draw_tokens(rows=3, length=16))
    assert {value.dtype for value in model.parameters()} == {dtype}
    assert all(torch.isfinite(value).all() for value in model.parameters())
    require_preserved(masks, prunable_linears(model), "model")
    if dtype == torch.float64:
        float32 = prune(make_model(), SparsifySettings(update=update), tokens=draw_tokens(rows=3, length=16))
        assert sum(int((masks[name] != mask).sum()) for name, mask in float32.items()) <= 8


def test_linears_of_one_input_share_its_gram(monkeypatch):
    """q, k and v; gate and up: four Gram matrices for seven linears, each made once for each sequence."""
    made, add = [], Gram.add
    monkeypatch.setattr(Gram, "add", lambda self, inputs: (made.append(self), add(self, inputs))[1])
    used, sparsegpt = [], linear_module.sparsegpt
    monkeypatch.setattr(linear_module, "sparsegpt", lambda *a, **k: (used.append(a[1]), sparsegpt(*a, **k))[1])
    prune(make_model(), SparsifySettings(update="sparsegpt"), tokens=draw_tokens(rows=3))
    assert len(made) == 2 * 3 * 4
    assert len(used) == 2 * 7
    assert len({id(gram) for gram in used}) == 2 * 4


def test_hidden_states_are_let_go_as_they_are_replaced(monkeypatch):
    alive, most, run = weakref.WeakSet(), [], Blocks.run

    class Watched(Blocks):
        def run(self, index, block, hidden):
            output = run(self, index, block, hidden)
            alive.add(output)
            most.append(len(alive))
            return output

    blocks = Watched(make_model())
    settings, tokens = SparsifySettings(importance="wanda"), draw_tokens(rows=6)
    masks = prune_blocks(
        blocks, Method.of(settings, 0), dict.fromkeys(prunable_linears(blocks.model), 0.5), tokens=tokens
    )
    gc.collect()
    assert len(masks) == 14
    assert not alive
    assert max(most) <= 6 + 2  # one for each sequence, and those that were just made


@torch.no_grad()
def test_scores_are_of_the_dense_model():
    """Pruning passes on the pruned blocks' outputs, scoring alone the dense ones'."""
    model, tokens, seen = make_model(), draw_tokens(), {}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    score_blocks(
        Blocks(model),
        Method.of(SparsifySettings(importance="wanda"), 0),
        tokens=tokens,
        visit=lambda name, weight, scores: seen.update({name: scores}),
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    inputs = {}
    layers = prunable_linears(model)
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _module, args, name=name: inputs.update({name: args[0]}))
    model(tokens)
    assert list(seen) == list(layers)
    for name, layer in layers.items():
        norm = inputs[name].double().square().sum((0, 1)).div(len(tokens)).sqrt()
        torch.testing.assert_close(seen[name].double(), layer.weight.double().abs() * norm, rtol=1e-4, atol=1e-7)


def test_progress_counts_blocks():
    calls = []
    prune(make_model(), SparsifySettings(importance="magnitude"), progress=lambda *call: calls.append(call))
    assert calls == [("pruning block", 1, 2), ("pruning block", 2, 2)]
