"""The library's functions for masks alone, against loops over sorted lists."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.masks import apply_masks, compute_sparsity_stats, load_mask, save_mask, validate_mask
from phoenix_sparse.models import prunable_linears
from phoenix_sparse.pruning.importance import _REGISTRY, Seen, register_importance
from phoenix_sparse.pruning.mask_generator import (
    MaskGenerator,
    compute_masks_for_state_dict,
    compute_random_mask,
    compute_structured_mask,
    compute_unstructured_mask,
)
from phoenix_sparse.pruning.selection import keep
from phoenix_sparse.pruning.structured import shrink, structured_masks
from tiny import CONFIGS, make_model

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def seen(model):
    """Norms and gradients as if measured."""
    generator = torch.Generator().manual_seed(2)
    return {
        name: Seen(
            input_norm=torch.rand(layer.in_features, generator=generator),
            gradient=torch.rand(layer.weight.shape, generator=generator),
        )
        for name, layer in prunable_linears(model).items()
    }


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def lowest(values, count):
    """Positions of the lowest values, earlier ones first among equals."""
    return set(sorted(range(len(values)), key=lambda place: (values[place], place))[:count])


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_lowest_of_each_layer_go(kind):
    model = make_model(kind)
    before = copy.deepcopy(model.state_dict())
    masks = compute_unstructured_mask(model, sparsity=0.7)
    layers = prunable_linears(model)
    assert list(masks) == list(layers)
    for name, mask in masks.items():
        values = layers[name].weight.abs().flatten().tolist()
        dropped = (~mask).flatten().nonzero().flatten().tolist()
        assert set(dropped) == lowest(values, int(0.7 * len(values)))
        assert mask.dtype == torch.bool
        assert mask.device.type == "cpu"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_as_the_issue_calls_them(model, tmp_path):
    """The very calls that users of the first interface write."""
    masks = compute_unstructured_mask(model, sparsity=0.7, importance_metric="magnitude", global_pruning=True)
    save_mask(masks, str(tmp_path / "m.pt"), metadata={"sparsity": 0.7})
    masks, metadata = load_mask(str(tmp_path / "m.pt"))
    assert metadata == {"sparsity": 0.7}
    generator = MaskGenerator(model=model, sparsity=0.5, method="unstructured", importance_metric="magnitude")
    for mask in generator.generate_masks().values():
        is_valid, stats = validate_mask(mask, expected_sparsity=0.5, tolerance=0.01)
        assert is_valid
        assert stats["sparsity"] == 0.5
    assert compute_sparsity_stats(masks)["global"]["sparsity"] == pytest.approx(0.7, abs=1e-4)
    by_name = compute_masks_for_state_dict(model.state_dict(), sparsity=0.5, method="unstructured")
    assert same(by_name, compute_unstructured_mask(model=model, sparsity=0.5, importance_metric="magnitude"))
    assert compute_structured_mask(model, sparsity=0.5).keys() == compute_random_mask(model, 0.5).keys() == masks.keys()


@settings(deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 100))
def test_random_masks_are_of_the_right_count(model, sparsity, seed):
    masks = compute_random_mask(model, sparsity, seed)
    for mask in masks.values():
        assert int((~mask).sum()) == int(mask.numel() * sparsity)
        assert mask.any()


def test_random_masks_depend_on_the_seed_and_the_name_alone(model):
    masks = compute_random_mask(model, 0.5, seed=1)
    torch.manual_seed(99)
    assert same(masks, compute_random_mask(make_model(seed=7), 0.5, seed=1))
    assert not same(masks, compute_random_mask(model, 0.5, seed=2))
    first, second = (masks[f"model.layers.{block}.mlp.up_proj"] for block in (0, 1))
    assert not torch.equal(first, second)
    assert same(masks, compute_unstructured_mask(model, 0.5, "random", seed=1))
    assert same(masks, compute_masks_for_state_dict(model.state_dict(), 0.5, "random", seed=1))
    for mask in masks.values():  # spread out, not in one corner
        assert 0.3 < mask.float().mean(0).std() + mask.float().mean(1).std() + 0.3 < 0.7


@pytest.mark.parametrize("metric", ["magnitude", "random", "wanda", "ria", "gradient", "taylor", "gblm"])
def test_every_importance_is_found_by_its_name(model, seen, metric):
    masks = compute_unstructured_mask(model, 0.6, metric, seed=3, seen=seen)
    found = _REGISTRY[metric]
    for name, layer in prunable_linears(model).items():
        facts = Seen(name, 3, seen[name].input_norm, seen[name].gradient)
        group = "row" if found.per_row else "layer"
        assert torch.equal(masks[name], keep(found.score(layer.weight.detach(), facts), 0.6, group))
    if found.per_row:
        rows = masks[UP].sum(1)
        assert (rows == 32 - int(0.6 * 32)).all()


def test_a_registered_importance_is_used(model):
    @register_importance("upside_down_for_masks")
    def upside_down(weight, _seen):
        return -weight.abs()

    try:
        masks = compute_unstructured_mask(model, 0.5, "upside_down_for_masks")
        for name, layer in prunable_linears(model).items():
            kept, dropped = layer.weight[masks[name]].abs(), layer.weight[~masks[name]].abs()
            assert kept.max() <= dropped.min()
    finally:
        del _REGISTRY["upside_down_for_masks"]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4),
    st.sampled_from(["unstructured", "random"]),
    st.booleans(),
)
def test_levels_are_nested_and_each_is_as_alone(model, levels, method, everywhere):
    generator = MaskGenerator(model, method=method, global_pruning=everywhere)
    found = generator.generate_levels(levels)
    assert set(found) == set(levels)
    ordered = sorted(set(levels))
    for lower, higher in itertools.pairwise(ordered):
        for name, mask in found[higher].items():
            assert not (mask & ~found[lower][name]).any()
    for level in levels:
        assert same(found[level], MaskGenerator(model, level, method, global_pruning=everywhere).generate_masks())


def test_levels_are_scored_once(model):
    calls = []

    @register_importance("counted_for_masks")
    def counted(weight, seen):
        calls.append(seen.name)
        return weight.abs()

    try:
        for method in ("unstructured", "structured"):
            calls.clear()
            levels = MaskGenerator(model, method=method, importance_metric="counted_for_masks").generate_levels(
                [0.5, 0.3, 0.7]
            )
            assert sorted(calls) == sorted(prunable_linears(model))
            assert list(levels) == [0.5, 0.3, 0.7]
    finally:
        del _REGISTRY["counted_for_masks"]


def test_sparsity_zero_keeps_everything(model):
    for method in ("unstructured", "structured", "random"):
        for everywhere in (False, True):
            masks = MaskGenerator(model, 0, method, global_pruning=everywhere).generate_masks()
            assert all(mask.all() for mask in masks.values())


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.7, 0.9, 0.95])
def test_global_pruning_has_one_threshold_and_a_floor(sparsity):
    model = make_model()
    layers = prunable_linears(model)
    with torch.no_grad():
        layers[UP].weight.mul_(1e-4)  # all below everything else
        layers["model.layers.0.mlp.up_proj"].weight.mul_(3)
    masks = compute_unstructured_mask(model, sparsity, global_pruning=True)
    stats = compute_sparsity_stats(masks)
    assert stats["weights"] - stats["nnz"] == int(stats["weights"] * sparsity)
    assert not validate_mask(masks)[1]["dead_layers"]
    if sparsity > 0.1:
        assert stats["layers"][UP]["nnz"] == round(0.01 * masks[UP].numel())
        # Layers at their floor keep what the threshold would drop.
        free = [name for name in masks if stats["layers"][name]["nnz"] > round(0.01 * masks[name].numel())]
        kept = min(float(layers[name].weight[masks[name]].detach().abs().min()) for name in free)
        dropped = max(float(layers[name].weight[~masks[name]].detach().abs().max()) for name in masks)
        assert free
        assert kept >= dropped
        assert stats["layers"]["model.layers.0.mlp.up_proj"]["sparsity"] < sparsity


def test_ties_go_by_position():
    model = make_model()
    with torch.no_grad():
        for layer in prunable_linears(model).values():
            layer.weight.fill_(0.5)
    for mask in compute_unstructured_mask(model, 0.25).values():
        assert mask.flatten().tolist() == [False] * (mask.numel() // 4) + [True] * (mask.numel() * 3 // 4)


def test_masks_of_a_model_in_bfloat16_are_those_of_its_weights():
    model = make_model().to(torch.bfloat16)
    masks = compute_unstructured_mask(model, 0.5)
    assert same(masks, compute_unstructured_mask(copy.deepcopy(model).float(), 0.5))


@pytest.mark.parametrize("method", ["unstructured", "structured", "random"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_layers_that_are_not_finite_are_refused_by_name(method, value):
    for kind in ("llama", "opt"):
        model = make_model(kind)
        name = list(prunable_linears(model))[9]
        with torch.no_grad():
            prunable_linears(model)[name].weight[3, 4] = value
        with pytest.raises(PhoenixError, match=f"^{name}: 1 weights are NaN or infinite"):
            MaskGenerator(model, 0.3, method).generate_masks()
    with pytest.raises(PhoenixError, match=f"^{name}: 1 weights"):
        compute_masks_for_state_dict(model.state_dict(), 0.3)


@pytest.mark.parametrize("sparsity", [1, 1.5, -0.1, float("nan"), float("inf"), "0.5", None])
def test_a_sparsity_outside_is_refused(model, sparsity):
    for act in (
        lambda: compute_unstructured_mask(model, sparsity),
        lambda: compute_structured_mask(model, sparsity),
        lambda: compute_random_mask(model, sparsity),
        lambda: compute_masks_for_state_dict(model.state_dict(), sparsity),
        lambda: MaskGenerator(model).generate_levels([0.5, sparsity]),
    ):
        with pytest.raises(PhoenixError, match=r"sparsity: .* is not in \[0, 1\)"):
            act()


def test_a_module_that_is_no_language_model_is_refused():
    with pytest.raises(PhoenixError, match="Linear has no configuration with num_hidden_layers; give a causal"):
        compute_unstructured_mask(torch.nn.Linear(4, 4))


def test_what_is_not_known_or_not_given_is_refused(model, seen):
    with pytest.raises(PhoenixError, match="importance: 'fisher' is not known; use one of .*magnitude"):
        compute_unstructured_mask(model, importance_metric="fisher")
    with pytest.raises(PhoenixError, match="method: 'rows' is not known; use one of unstructured, structured, random"):
        MaskGenerator(model, method="rows")
    first = next(iter(seen))
    for metric, what in (("wanda", "input_norm"), ("taylor", "gradient"), ("gblm", "input_norm")):
        for act in (compute_unstructured_mask, compute_structured_mask):
            with pytest.raises(PhoenixError, match=f"{metric} needs the {what} .* of {first}; measure it"):
                act(model, 0.5, metric)
    with pytest.raises(PhoenixError, match=rf"wanda needs the input_norm \(32,\) of {UP}"):
        compute_unstructured_mask(model, 0.5, "wanda", seen=seen | {UP: Seen(input_norm=torch.ones(48))})
    with pytest.raises(PhoenixError, match=rf"gradient needs the gradient \(48, 32\) of {UP}"):
        compute_unstructured_mask(model, 0.5, "gradient", seen={name: s for name, s in seen.items() if name != UP})


def test_scores_that_are_none_are_refused(model):
    try:
        for name, score in (("nan", lambda w, _: w / 0 * 0), ("short", lambda w, _: w[0])):
            register_importance(f"{name}_for_masks")(score)
            with pytest.raises(PhoenixError, match=rf"{name}_for_masks gave scores of shape .* for model\.layers\.0"):
                compute_unstructured_mask(model, 0.5, f"{name}_for_masks")
    finally:
        _REGISTRY.pop("nan_for_masks", None)
        _REGISTRY.pop("short_for_masks", None)


@pytest.mark.parametrize("kind", CONFIGS)
def test_structured_masks_are_those_of_the_scores(kind):
    model = make_model(kind)
    scores = {name: layer.weight.abs() for name, layer in prunable_linears(model).items()}
    masks = compute_structured_mask(model, 0.3)
    assert same(masks, structured_masks(model, scores, 0.3))
    alone = compute_structured_mask(model, 0.3, attention=False)
    assert all(alone[name].all() for name in alone if "self_attn" in name)
    ids = torch.arange(20)[None]
    small = shrink(model, masks)
    apply_masks(masks, prunable_linears(model))
    with torch.no_grad():
        assert torch.allclose(small(ids).logits, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_state_dict_gives_the_model_s_masks(kind, seen):
    model = make_model(kind)
    state = model.state_dict()
    for metric in ("magnitude", "random"):
        for everywhere in (False, True):
            masks = compute_masks_for_state_dict(state, 0.6, importance_metric=metric, global_pruning=everywhere)
            assert same(masks, compute_unstructured_mask(model, 0.6, metric, everywhere))
    if kind == "llama":
        masks = compute_masks_for_state_dict(state, 0.6, importance_metric="wanda", seen=seen)
        assert same(masks, compute_unstructured_mask(model, 0.6, "wanda", seen=seen))


def test_which_names_of_a_state_dict_are_pruned():
    matrix = torch.rand(4, 8)
    pruned = ["layers.0.q", "model.layers.11.mlp.up_proj", "transformer.h.3.attn.c_attn", "a.blocks.2.ffn.down_proj"]
    dense = ["lm_head", "model.embed_tokens", "model.layers.0.self_attn.rel_embed", "layers.1.input_layernorm", "norm"]
    dense += ["project_in", "layers.mlp", "players.0.q", "model.layers.x.q", "h.0.ln_1"]
    state = {f"{name}.weight": matrix for name in pruned + dense}
    state |= {
        "layers.0.q.bias": matrix,
        "layers.0.q.weight_scale": matrix,
        "layers.0.conv.weight": torch.rand(4, 1, 3),
        "layers.0.flat.weight": torch.rand(4),
        "layers.0.packed.weight": torch.ones(4, 8, dtype=torch.int8),
        "layers.0.extra.weight": "text",
    }
    assert list(compute_masks_for_state_dict(state, 0.5)) == pruned
    assert compute_masks_for_state_dict({"layers.0.q.weight": torch.nn.Parameter(matrix)}, 0.5)["layers.0.q"].any()
    with pytest.raises(PhoenixError, match="no 2-D weight has a name inside a block"):
        compute_masks_for_state_dict({"lm_head.weight": matrix}, 0.5)
    with pytest.raises(PhoenixError, match="structured needs the model"):
        compute_masks_for_state_dict(state, 0.5, method="structured")
