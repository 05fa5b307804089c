import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.models import prunable_linears
from phoenix_sparse.pruning.allocation.budget import spread, uniform
from phoenix_sparse.pruning.allocation.evolutionary import evolve
from phoenix_sparse.pruning.allocation.fitness import DivergenceFitness
from phoenix_sparse.pruning.importance import magnitude_importance
from phoenix_sparse.pruning.patterns import STRUCTURED, UNSTRUCTURED, parse_pattern
from phoenix_sparse.pruning.selection import keep
from tiny import make_model


def tokens(sequences=7, length=12, seed=0):
    return torch.randint(0, 256, (sequences, length), generator=torch.Generator().manual_seed(seed))


def some_labels(inputs):
    """Completions of different lengths, and a sequence without any."""
    labels = inputs.clone()
    for row in range(len(labels)):
        labels[row, : 3 + row % 4] = -100
        labels[row, 8 + row % 3 :] = -100
    labels[1] = -100
    return labels


def scores_of(model):
    return {name: magnitude_importance(layer.weight) for name, layer in prunable_linears(model).items()}


def naive(dense, pruned, inputs, labels, kind):
    """Position by position in float64."""
    with torch.no_grad():
        p = dense(input_ids=inputs).logits.double()
        q = pruned(input_ids=inputs).logits.double()
    values = []
    for row in range(len(inputs)):
        for position in range(inputs.shape[1] - 1):
            label = int(labels[row, position + 1])
            if label == -100:
                continue
            log_p, log_q = torch.log_softmax(p[row, position], 0), torch.log_softmax(q[row, position], 0)
            if kind == "kl":
                values.append(float((log_p.exp() * (log_p - log_q)).sum()))
            else:
                values.append(-float(log_q[label]))
    return sum(values) / len(values), len(values)


def prune_by_hand(model, scores, allocation, group, pattern):
    with torch.no_grad():
        for name, layer in prunable_linears(model).items():
            layer.weight *= keep(scores[name], allocation[name], group, pattern, exact=True)
    return model


@pytest.mark.parametrize("kind", ["kl", "loss"])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(
    ("group", "pattern"), [("row", UNSTRUCTURED), ("layer", UNSTRUCTURED), ("layer", parse_pattern("4x2"))]
)
def test_it_is_the_naive_measure(kind, labelled, group, pattern):
    model, dense = make_model(), make_model()
    inputs = tokens()
    labels = some_labels(inputs) if labelled else inputs
    scores = scores_of(model)
    stages = [1, 5, 7]
    fitness = DivergenceFitness(
        model,
        scores,
        inputs,
        labels=labels if labelled else None,
        stages=stages,
        group=group,
        pattern=pattern,
        measure=kind,
        batch_size=3,
        store_dtype=torch.float32,
    )
    for seed, stage in [(0, 2), (1, 0), (0, 1)]:
        wishes = torch.rand(len(scores), generator=torch.Generator().manual_seed(seed)).tolist()
        allocation = spread(dict(zip(scores, wishes, strict=True)), fitness.sizes, 0.6, units=fitness.units)
        pruned = prune_by_hand(make_model(), scores, allocation, group, pattern)
        expected, count = naive(dense, pruned, inputs[: stages[stage]], labels[: stages[stage]], kind)
        assert fitness(allocation, stage) == pytest.approx(expected, rel=2e-4)
        assert fitness.positions[stage] == count


def test_half_precision_log_probabilities_are_close():
    model, dense, inputs = make_model(), make_model(), tokens()
    scores = scores_of(model)
    fitness = DivergenceFitness(model, scores, inputs, stages=[7], group="row")
    allocation = uniform(fitness.sizes, 0.5, units=fitness.units)
    pruned = prune_by_hand(make_model(), scores, allocation, "row", UNSTRUCTURED)
    assert fitness(allocation, 0) == pytest.approx(naive(dense, pruned, inputs, inputs, "kl")[0], rel=1e-3)
    assert abs(fitness(dict.fromkeys(scores, 0.0), 0)) < 1e-5


@settings(deadline=None, max_examples=10)
@given(st.lists(st.tuples(st.floats(0, 0.95), st.integers(0, 99)), min_size=1, max_size=4), st.booleans())
def test_the_dense_weights_come_back_to_the_last_bit(targets, bfloat16):
    model = make_model().to(torch.bfloat16 if bfloat16 else torch.float32)
    with torch.no_grad():
        next(iter(prunable_linears(model).values())).weight[0, :4] = torch.tensor([-0.0, 0.0, 1e-30, -1e-30])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fresh = {}
    with DivergenceFitness(model, scores_of(model), tokens(3), stages=[2], group="layer") as fitness:
        for target, seed in targets:
            wishes = torch.rand(len(fitness.sizes), generator=torch.Generator().manual_seed(seed)).tolist()
            allocation = spread(dict(zip(fitness.sizes, wishes, strict=True)), fitness.sizes, target)
            value = fitness(allocation, 0)
            assert fresh.setdefault((target, seed), value) == value  # whatever stood there before
    view = torch.int16 if bfloat16 else torch.int32
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(view), before[name].view(view)), name


def test_the_way_there_does_not_matter_and_only_changed_layers_are_touched():
    model = make_model()
    fitness = DivergenceFitness(model, scores_of(model), tokens(), stages=[2, 7], group="layer")
    first = uniform(fitness.sizes, 0.5)
    changed = [*fitness.sizes][3]
    second = {**first, changed: 0.8}
    value = fitness(first, 1)
    fitness(second, 0)
    weights = {name: layer.weight for name, layer in prunable_linears(model).items()}
    versions = {name: weight._version for name, weight in weights.items()}
    assert fitness(first, 1) == value
    assert [name for name, weight in weights.items() if weight._version != versions[name]] == [changed]
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    assert zeros == sum(fitness.sizes.values()) // 2
    fitness.restore()
    versions = {name: weight._version for name, weight in weights.items()}
    fitness.restore()
    assert versions == {name: weight._version for name, weight in weights.items()}
    assert fitness(first, 1) == value


def test_what_is_padded_on_the_right_does_not_matter():
    model, inputs = make_model(), tokens(4, 10)
    wider = torch.cat([inputs, torch.full((4, 6), 256)], 1)
    labels = torch.cat([inputs, torch.full((4, 6), -100)], 1)
    values = []
    for batch, label in [(inputs, inputs), (wider, labels)]:
        with DivergenceFitness(model, scores_of(model), batch, labels=label, stages=[4], group="row") as fitness:
            values.append(fitness(uniform(fitness.sizes, 0.6), 0))
    assert values[0] == values[1]


def test_broken_models_are_not_fit():
    model = make_model()
    fitness = DivergenceFitness(model, scores_of(model), tokens(), stages=[2], group="layer")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(math.nan)
    assert math.isnan(fitness(uniform(fitness.sizes, 0.5), 0))


def test_evolution_finds_a_better_allocation_than_uniform():
    model, inputs = make_model(), tokens(8, 16)
    with DivergenceFitness(model, scores_of(model), inputs, stages=[2, 4, 8], group="layer") as fitness:
        start = fitness(uniform(fitness.sizes, 0.7), 2)
        allocation, history = evolve(fitness.sizes, 0.7, fitness, budget=100, seed=0, offspring=12)
        assert history[0].best == start
        assert fitness(allocation, 2) == history[-1].best < 0.97 * start
        dropped = sum(int((layer.weight == 0).sum()) for layer in prunable_linears(model).values())
        assert dropped == round(0.7 * sum(fitness.sizes.values()))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"stages": []}, "stages"),
        ({"stages": [0, 2]}, "stages"),
        ({"stages": [4, 2]}, "stages"),
        ({"stages": [99]}, "at most"),
        ({"labels": tokens(2)}, "one shape"),
        ({"labels": torch.full((7, 12), -100)}, "no labelled token"),
        ({"measure": "mse"}, "kl or loss"),
        ({"batch_size": 0}, "batches of 1"),
        ({"pattern": parse_pattern("2:4")}, "can't be shared out"),
        ({"pattern": STRUCTURED}, "can't be shared out"),
        ({"pattern": parse_pattern("5x1")}, "does not divide"),
        ({"scores": {"model.layers.9.x": torch.ones(2, 2)}}, "no such layer"),
        ({"scores": {"model.layers.0.mlp.up_proj": torch.ones(2, 2)}}, "scores of shape"),
        ({"scores": {"model.embed_tokens": torch.ones(257, 32)}}, "linear"),
    ],
)
def test_refusals(more, message):
    model = make_model()
    settings = {"scores": scores_of(model), "stages": [2], "group": "layer"} | more
    with pytest.raises(PhoenixError, match=message):
        DivergenceFitness(model, settings.pop("scores"), tokens(), **settings)


def test_an_allocation_of_other_layers_is_refused():
    model = make_model()
    fitness = DivergenceFitness(model, scores_of(model), tokens(), stages=[2], group="layer")
    with pytest.raises(PhoenixError, match="name different layers"):
        fitness({"model.layers.0.mlp.up_proj": 0.5}, 0)
