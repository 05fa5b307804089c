"""Allocations measured on a whole model: they meet the target, and say how they were found."""

import pytest
import torch

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.models import decoder_blocks, prunable_linears
from phoenix_sparse.pruning import allocating
from phoenix_sparse.pruning.allocation.alphapruning import hill_alpha
from phoenix_sparse.pruning.blocks import Blocks
from phoenix_sparse.pruning.initialise import Calibration, initialise
from phoenix_sparse.pruning.linear import Method
from phoenix_sparse.pruning.sequential import prune_blocks
from phoenix_sparse.pruning.settings import SparsifySettings
from tiny import CONFIGS, make_model

TOKENS = torch.randint(0, 256, (6, 20), generator=torch.Generator().manual_seed(1))
EVOLUTION = {"budget": 24, "offspring": 6, "sequences": (1, 2, 4)}
ALLOCATIONS = {
    "uniform": "uniform",
    "owl": "owl",
    "alphapruning": "alphapruning",
    "evolutionary": "evolutionary",
    "table": {"*.o_proj": 0.25, "*.out_proj": 0.25, "*.0.*.k_proj": 0.5},
    "list": (0.5, 0.7),
}


def uneven(kind="llama"):
    """A model whose second block has outliers among its inputs, and whose first has a steeper spectrum."""
    model = make_model(kind)
    with torch.no_grad():
        first, second = decoder_blocks(model).values()
        for module in second.modules():
            if "norm" in type(module).__name__.lower():
                module.weight[:2] *= 30
        for layer in prunable_linears(model).values():
            if layer in list(first.modules()):
                layer.weight.mul_(torch.linspace(0.1, 3, layer.in_features))
    return model


def run(model, seed=0, tokens=TOKENS, labels=None, **settings):
    settings = SparsifySettings(**{"evolution": EVOLUTION} | settings)
    return initialise(Blocks(model), settings, Calibration(tokens, labels), seed=seed)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("importance", "pattern", "unit"),
    [("wanda", "unstructured", 1), ("magnitude", "unstructured", 1), ("wanda", "16x1", 16), ("wanda", "2x4", 8)],
)
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_the_total_is_met(name, importance, pattern, unit, kind):
    allocation = ALLOCATIONS[name]
    if isinstance(allocation, dict):  # only patterns that this model has layers for
        leaf = "out_proj" if kind == "opt" else "o_proj"
        allocation = {f"*.{leaf}": 0.25, "*.0.*.k_proj": 0.5}
    masks, shares = run(uneven(kind), importance=importance, pattern=pattern, sparsity=0.6, allocation=allocation)
    assert list(shares.sparsity) == list(masks)
    dropped = {layer: int((~mask).sum()) for layer, mask in masks.items()}
    total = sum(mask.numel() for mask in masks.values())
    if (name, importance, pattern) == ("uniform", "wanda", "unstructured"):  # rows lose alike, as published
        assert dropped == {layer: mask.shape[0] * int(mask.shape[1] * 0.6) for layer, mask in masks.items()}
        assert set(shares.sparsity.values()) == {0.6}
        return
    # Within a weight (a block) a layer; a search for an allocation, to within half of one in all.
    slack = unit * len(masks) if name in ("table", "list") or unit == 1 else unit / 2 + 0.5
    assert abs(sum(dropped.values()) - 0.6 * total) <= slack
    for layer, mask in masks.items():
        assert dropped[layer] == unit * int(mask.numel() // unit * shares.sparsity[layer])
        assert mask.any()
        if importance == "wanda" and unit == 1:
            assert int(mask.sum(1).max() - mask.sum(1).min()) <= 1
    if name != "uniform":
        assert len(set(shares.sparsity.values())) > 1


def test_owl_counts_outliers_of_the_dense_model():
    """Against every linear's input in one pass of the whole model, in float64."""
    model, inputs = uneven(), {}
    layers = prunable_linears(model)
    weights = {name: layer.weight.detach().double().clone() for name, layer in layers.items()}
    hooks = [
        layer.register_forward_pre_hook(lambda _module, args, name=name: inputs.update({name: args[0].double()}))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(TOKENS)
    for hook in hooks:
        hook.remove()
    expected = {}
    for block in decoder_blocks(model):
        scores = torch.cat(
            [
                (weights[name].abs() * inputs[name].square().sum((0, 1)).sqrt() / len(TOKENS) ** 0.5).flatten()
                for name in layers
                if name.startswith(f"{block}.")
            ]
        )
        expected[block] = float((scores > 5 * scores.mean()).double().mean())
    for settings in ({}, {"importance": "magnitude"}, {"update": "sparsegpt"}):  # it counts among Wanda's in any case
        _, shares = run(uneven(), allocation="owl", sparsity=0.6, **settings)
        assert shares.found == {"outliers": pytest.approx(expected, abs=1e-4)}
        first, second = ({shares.sparsity[n] for n in layers if f".{block}." in n} for block in (0, 1))
        assert expected["model.layers.1"] > expected["model.layers.0"]
        assert max(second) < min(first)
        assert min(first) - max(second) == pytest.approx(0.16, abs=0.05)


def test_alphapruning_says_every_layer_s_exponent():
    model = uneven()
    expected = {name: hill_alpha(layer.weight) for name, layer in prunable_linears(model).items()}
    _, shares = run(model, allocation="alphapruning", sparsity=0.5)
    assert shares.found == {"alphas": expected}


def history(shares):
    return [generation["best"] for generation in shares.found["history"]]


@pytest.mark.parametrize("settings", [{}, {"importance": "magnitude"}, {"pattern": "16x1"}, {"update": "sparsegpt"}])
def test_evolution_is_the_same_again_by_its_seed(settings):
    one, same, other = (
        run(uneven(), seed=seed, allocation="evolutionary", sparsity=0.6, **settings) for seed in (1, 1, 2)
    )
    assert one[1] == same[1]
    assert all(torch.equal(one[0][name], same[0][name]) for name in one[0])
    assert one[1].sparsity != other[1].sparsity
    assert history(one[1]) == sorted(history(one[1]), reverse=True)
    assert history(one[1])[-1] < history(one[1])[0]
    assert one[1].found["history"][-1]["evaluations"] == EVOLUTION["budget"]


@pytest.mark.parametrize("update", ["none", "dsnot", "sparsegpt"])
def test_evolution_gives_the_dense_weights_back_before_pruning(update):
    model, fresh = uneven(), uneven()
    masks, shares = run(model, allocation="evolutionary", sparsity=0.6, update=update)
    method = Method.of(SparsifySettings(sparsity=0.6, update=update, allocation="evolutionary"), 0)
    expected = prune_blocks(Blocks(fresh), method, shares.sparsity, tokens=TOKENS)
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_stopped_evolution_leaves_the_model_dense(monkeypatch):
    model = uneven()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def stop(what, done, _of):
        if what == "allocation" and done == 5:
            raise KeyboardInterrupt

    settings = SparsifySettings(allocation="evolutionary", sparsity=0.6, evolution=EVOLUTION)
    with pytest.raises(KeyboardInterrupt):
        initialise(Blocks(model), settings, Calibration(TOKENS), seed=0, progress=stop)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_evolution_by_the_task_s_loss_looks_at_its_labels():
    labels = TOKENS.clone()
    labels[:, :15] = -100
    shares = [
        run(uneven(), labels=given, allocation="evolutionary", sparsity=0.6, evolution=EVOLUTION | {"fitness": "loss"})[
            1
        ]
        for given in (None, labels)
    ]
    assert history(shares[0])[0] != history(shares[1])[0]


def test_evolution_scores_by_an_importance_that_the_update_does_not_use():
    """Taylor scores and SparseGPT: gradients are measured for the search alone."""
    settings = SparsifySettings(
        importance="taylor", update="sparsegpt", allocation="evolutionary", sparsity=0.6, evolution=EVOLUTION
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in TOKENS.tolist()]
    masks, shares = initialise(Blocks(uneven()), settings, Calibration(TOKENS, rows=rows), seed=0)
    assert len(set(shares.sparsity.values())) > 1
    assert all(mask.any() for mask in masks.values())


def test_evolution_makes_do_with_fewer_sequences_than_its_stages():
    _, shares = run(uneven(), tokens=TOKENS[:1], allocation="evolutionary", sparsity=0.6)
    assert len(history(shares)) > 1


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_sparsity_zero_keeps_everything(name):
    allocation = {"table": {"*.o_proj": 0.0}, "list": (0.0, 0)}.get(name, ALLOCATIONS[name])
    masks, shares = run(uneven(), allocation=allocation, sparsity=0.0)
    assert set(shares.sparsity.values()) == {0.0}
    assert all(mask.all() for mask in masks.values())


@pytest.mark.parametrize(
    ("allocation", "sparsity", "message"),
    [
        ((0.5,), 0.5, "1 values for 2 decoder blocks; give one value per block"),
        ((), 0.5, "0 values for 2 decoder blocks"),
        ((0.5, 0.6, 0.7), 0.5, "3 values for 2 decoder blocks"),
        ((0.5, 0.6), 0.5, "the list fixes every layer and gives a sparsity of 0.5.* in all, not 0.5"),
        ({"*.oproj": 0.4}, 0.5, r"'\*.oproj' matches no layer; did you mean \*.o_proj"),
        ({"*_proj": 0.4}, 0.5, "the table fixes every layer and gives a sparsity of 0.3"),
        ({"*.mlp.*": 0.9}, 0.5, "the table drops .* would need a sparsity of -0"),
        ("owl", 0.995, "a sparsity of 0.995 in all can't be reached within the layers' bounds"),
        ("alphapruning", 0.995, "a sparsity of 0.995 in all can't be reached"),
        ("evolutionary", 0.999, "no level of 1 weights can move"),
    ],
)
def test_what_can_not_be_met_is_refused(allocation, sparsity, message):
    model = uneven()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PhoenixError, match=f"sparsify.allocation: .*{message}"):
        run(model, importance="magnitude", allocation=allocation, sparsity=sparsity)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_sparsities_are_those_of_the_masks():
    masks = {"one": torch.tensor([[True, False], [False, False]]), "other": torch.ones(2, 2, dtype=torch.bool)}
    assert allocating.sparsities(masks) == {"one": 0.75, "other": 0.0}
