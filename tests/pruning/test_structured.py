"""Structured masks against their definition, and models made smaller against the same models masked."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    PhiConfig,
    Qwen3Config,
)

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.masks import apply_masks, compute_sparsity_stats
from phoenix_sparse.models import check_finite, load_model, prunable_linears
from phoenix_sparse.pruning.structured import find_units, shrink, structured_levels, structured_masks
from tiny import COMMON, CONFIGS, SIZES, make_model

KINDS = list(CONFIGS)
WITH_GROUPS = ["llama", "mistral", "qwen2"]


def random_scores(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(layer.weight.shape, generator=generator) for name, layer in prunable_linears(model).items()
    }


def build(config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)  # biases as well
    return model


def masked(model, masks):
    model = copy.deepcopy(model)
    apply_masks(masks, prunable_linears(model))
    return model


def logits(model):
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(ids).logits


def assert_close(small, model, masks):
    expected = logits(masked(model, masks))
    assert (expected - logits(model)).abs().max() > 1e-3, "the masks change nothing"
    assert torch.allclose(logits(small), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [0.1, 0.35, 0.6])
def test_a_smaller_model_gives_the_masked_model_s_logits(kind, sparsity):
    model = build(CONFIGS[kind]())
    before = copy.deepcopy(model.state_dict())
    if kind == "opt" and sparsity > 0.4:
        with pytest.raises(PhoenixError, match="attention dense it is 0.4196"):
            structured_masks(model, random_scores(model), sparsity)
        return
    masks = structured_masks(model, random_scores(model), sparsity)
    small = shrink(model, masks)
    assert_close(small, model, masks)
    kept, layers = prunable_linears(small), prunable_linears(model)
    assert sum(layer.weight.numel() for layer in kept.values()) == sum(int(mask.sum()) for mask in masks.values())
    for name, layer in layers.items():
        assert kept[name].in_features == kept[name].weight.shape[1]
        assert kept[name].out_features == kept[name].weight.shape[0]
        assert (kept[name].bias is None) == (layer.bias is None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    theirs = {value.data_ptr() for value in model.state_dict().values()}
    assert not theirs & {value.data_ptr() for value in small.state_dict().values()}
    assert not small.training


@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_model_is_saved_and_loaded_like_any_other(kind, tmp_path):
    model = make_model(kind)
    small = shrink(model, structured_masks(model, random_scores(model), 0.4))
    small.save_pretrained(tmp_path)
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path).eval(), load_model(tmp_path, device="cpu")):
        assert torch.equal(logits(loaded), logits(small))
        assert type(loaded) is type(model)
    ids = torch.arange(5)[None]
    again = small.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(loaded.generate(ids, max_new_tokens=4, do_sample=False), again)


@pytest.mark.parametrize("kind", WITH_GROUPS)
def test_the_configuration_says_the_new_sizes(kind):
    model = make_model(kind)
    masks = structured_masks(model, random_scores(model), 0.5)
    config = shrink(model, masks).config
    assert (config.num_key_value_heads, config.num_attention_heads, config.head_dim) == (1, 2, 8)
    assert config.intermediate_size == int(masks["model.layers.0.mlp.up_proj"].any(1).sum()) == 24
    assert (model.config.num_key_value_heads, model.config.intermediate_size) == (2, 48)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=50)
@given(st.floats(0, 0.41), st.integers(0, 5), st.booleans())
def test_the_sparsity_is_met_to_within_half_a_channel(kind, sparsity, seed, attention):
    model = make_model(kind)
    masks = structured_masks(model, random_scores(model, seed), sparsity, attention=attention)
    stats = compute_sparsity_stats(masks)
    unit = find_units(model)[0]["mlp"].weights * 2
    assert abs(stats["sparsity"] - sparsity) * stats["weights"] <= unit / 2 + 1e-6
    if sparsity == 0:
        assert stats["sparsity"] == 0
    assert all(layer["nnz"] for layer in stats["layers"].values())
    assert {mask.device.type for mask in masks.values()} == {"cpu"}
    assert list(masks) == list(prunable_linears(model))


@pytest.mark.parametrize("kind", WITH_GROUPS)
def test_the_units_of_lowest_mean_score_go(kind):
    """The definition again, by loops over units, in float64."""
    model = make_model(kind)
    scores = random_scores(model, 7)
    masks = structured_masks(model, scores, 0.55)
    for block in ("model.layers.0", "model.layers.1"):
        s = {name.removeprefix(f"{block}."): score.double() for name, score in scores.items() if block in name}
        m = {name.removeprefix(f"{block}."): mask for name, mask in masks.items() if block in name}
        gate, up, down = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
        means = [torch.cat([s[gate][c], s[up][c], s[down][:, c]]).mean().item() for c in range(48)]
        kept = m[down].any(0)
        assert sorted(range(48), key=means.__getitem__)[: 48 - int(kept.sum())] == sorted(
            (c for c in range(48) if not kept[c]), key=means.__getitem__
        )
        for c in range(48):
            assert m[gate][c].tolist() == m[up][c].tolist() == m[down][:, c].tolist() == [bool(kept[c])] * 32
        q, k, v, o = (f"self_attn.{name}_proj" for name in "qkvo")
        means = []
        for g in range(2):  # a group is 2 query heads of 8 beside a key and a value head of 8
            wide, narrow = slice(16 * g, 16 * g + 16), slice(8 * g, 8 * g + 8)
            parts = [s[q][wide], s[k][narrow], s[v][narrow], s[o][:, wide]]
            means.append(torch.cat([part.reshape(-1) for part in parts]).mean().item())
            whole = bool(m[k][8 * g, 0])
            for part in (m[q][wide], m[k][narrow], m[v][narrow], m[o][:, wide]):
                assert bool((part == whole).all())
        assert m[k][::8, 0].tolist() == [means[0] > means[1], means[1] > means[0]]


def test_ties_go_by_position():
    model = make_model()
    scores = {name: torch.ones_like(layer.weight) for name, layer in prunable_linears(model).items()}
    masks = structured_masks(model, scores, 0.5)
    assert masks["model.layers.1.mlp.up_proj"].any(1).tolist() == [False] * 24 + [True] * 24
    assert masks["model.layers.1.self_attn.v_proj"].any(1).tolist() == [False] * 8 + [True] * 8


def test_groups_are_rounded_down_and_channels_make_up_the_rest():
    model = make_model()
    scores = random_scores(model)
    for sparsity, groups in ((0.3, 2), (0.45, 2), (0.5, 1), (0.55, 1)):
        masks = structured_masks(model, scores, sparsity)
        assert int(masks["model.layers.0.self_attn.k_proj"].any(1).sum()) == 8 * groups
        rest = round((sparsity * 7680 - (2 - groups) * 1536) / 96)
        assert int(masks["model.layers.0.mlp.up_proj"].any(1).sum()) == 48 - rest
    alone = structured_masks(model, scores, 0.5, attention=False)
    assert alone["model.layers.0.self_attn.k_proj"].all()
    assert compute_sparsity_stats(alone)["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert_close(shrink(model, alone), model, alone)


def test_only_numbers_of_heads_that_the_configuration_takes():
    """Llama's wants hidden_size to be a multiple of the heads: of 4 groups of one head, 3 can't be written down."""
    llama = build(LlamaConfig(**SIZES, **COMMON, num_key_value_heads=4))
    for sparsity, groups in ((0.3, 4), (0.5, 2), (0.7, 2), (0.8, 1)):
        masks = structured_masks(llama, random_scores(llama), sparsity)
        assert int(masks["model.layers.0.self_attn.k_proj"].any(1).sum()) == 8 * groups
        assert_close(shrink(llama, masks), llama, masks)
    masks = structured_masks(llama, random_scores(llama), 0)
    for block in range(2):
        for name in "qkv":
            masks[f"model.layers.{block}.self_attn.{name}_proj"][:8] = False
        masks[f"model.layers.{block}.self_attn.o_proj"][:, :8] = False
    with pytest.raises(PhoenixError, match="can't express 3 attention heads at a hidden size of 32"):
        shrink(llama, masks)


def test_wide_attention_may_lose_more_groups_when_channels_run_out():
    """With a tiny MLP, channels alone can't make up what rounding the groups down left."""
    sizes = SIZES | {"intermediate_size": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = build(LlamaConfig(**sizes, **COMMON, head_dim=16))
    for sparsity, groups in ((0.02, 4), (0.2, 4), (0.3, 2), (0.49, 2)):
        masks = structured_masks(model, random_scores(model), sparsity)
        assert int(masks["model.layers.0.self_attn.k_proj"].any(1).sum()) == groups * 16
        assert_close(shrink(model, masks), model, masks)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, **COMMON, num_key_value_heads=2, mlp_bias=True, attention_bias=True, head_dim=12),
        LlamaConfig(**SIZES, **COMMON, num_key_value_heads=1, tie_word_embeddings=True),
        Qwen3Config(**SIZES, **COMMON, num_key_value_heads=2, head_dim=8),
        PhiConfig(**SIZES, **COMMON),  # its attention ends in `dense`, so MLPs alone
    ],
    ids=["biases", "tied", "qwen3", "phi"],
)
def test_relatives_shrink_as_well(config, tmp_path):
    model = build(config)
    masks = structured_masks(model, random_scores(model), 0.4)
    small = shrink(model, masks)
    assert_close(small, model, masks)
    small.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(small))
    assert small.get_output_embeddings().weight.data_ptr() == small.get_input_embeddings().weight.data_ptr() or not (
        config.tie_word_embeddings
    )


def test_bfloat16_stays(tmp_path):
    model = make_model().to(torch.bfloat16)
    masks = structured_masks(model, {n: w.weight.abs() for n, w in prunable_linears(model).items()}, 0.5)
    small = shrink(model, masks)
    assert {value.dtype for value in small.parameters()} == {torch.bfloat16}
    assert torch.allclose(logits(small), logits(masked(model, masks)), atol=0.05)
    check_finite(small, "small")


def test_a_lazy_mapping_of_scores_is_looked_up_once():
    from collections import Counter
    from collections.abc import Mapping

    model = make_model()
    scores, count = random_scores(model), Counter()

    class Lazy(Mapping):
        def __getitem__(self, name):
            count[name] += 1
            return scores[name]

        def __iter__(self):
            return iter(scores)

        def __len__(self):
            return len(scores)

    levels = structured_levels(model, Lazy(), [0.5, 0.2])
    assert set(count.values()) == {1}
    assert list(levels) == [0.5, 0.2]
    for sparsity, masks in levels.items():
        alone = structured_masks(model, scores, sparsity)
        assert all(torch.equal(masks[name], alone[name]) for name in masks)


def test_what_can_not_be_reached_is_told():
    model = make_model()
    with pytest.raises(PhoenixError, match=r"0\.9 can't be reached; .* one group in every attention it is 0\.7875"):
        structured_masks(model, random_scores(model), 0.9)
    with pytest.raises(PhoenixError, match=r"and attention dense it is 0\.5875"):
        structured_masks(model, random_scores(model), 0.7, attention=False)
    reached = structured_masks(model, random_scores(model), 0.7875)
    assert all(mask.any() for mask in reached.values())
    assert_close(shrink(model, reached), model, reached)
    for sparsity in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(PhoenixError, match=r"is not in \[0, 1\)"):
            structured_masks(model, random_scores(model), sparsity)


def test_scores_that_do_not_fit_are_refused():
    model = make_model()
    scores, name = random_scores(model), "model.layers.1.mlp.up_proj"
    with pytest.raises(PhoenixError, match=f"no score of the weight's shape for {name}"):
        structured_masks(model, {n: s for n, s in scores.items() if n != name}, 0.5)
    with pytest.raises(PhoenixError, match=f"no score of the weight's shape for {name}"):
        structured_masks(model, scores | {name: scores[name].t()}, 0.5)
    scores[name][0, 0] = torch.nan
    with pytest.raises(PhoenixError, match="NaN"):
        structured_masks(model, scores, 0.5)


def test_masks_that_are_not_structured_are_refused():
    model = make_model()
    good = structured_masks(model, random_scores(model), 0.5)

    def changed(name, change):
        masks = {layer: mask.clone() for layer, mask in good.items()}
        change(masks[name])
        return masks

    def flip(mask):
        mask[0, 0] = ~mask[0, 0]

    for leaf in ("mlp.gate_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj"):
        name = f"model.layers.1.{leaf}"
        with pytest.raises(PhoenixError, match=f"the mask of {name} doesn't keep or drop whole"):
            shrink(model, changed(name, flip))
    first = int(good["model.layers.0.mlp.up_proj"].any(1).nonzero()[0])
    with pytest.raises(PhoenixError, match="doesn't keep or drop whole"):  # its partners still keep it
        shrink(model, changed("model.layers.0.mlp.gate_proj", lambda mask: mask[first].fill_(False)))
    fewer = {name: mask.clone() for name, mask in good.items()}
    fewer["model.layers.1.mlp.gate_proj"][:] = False
    fewer["model.layers.1.mlp.up_proj"][:] = False
    fewer["model.layers.1.mlp.down_proj"][:] = False
    with pytest.raises(PhoenixError, match="block 1 keeps 0 units of its mlp and block 0 24"):
        shrink(model, fewer)
    with pytest.raises(PhoenixError, match=r"masks: no mask for"):
        shrink(model, {})
    opt = make_model("opt")
    masks = structured_masks(opt, random_scores(opt), 0.2)
    masks["model.decoder.layers.0.self_attn.k_proj"][:8] = False
    with pytest.raises(PhoenixError, match=r"layers\.0\.self_attn\.k_proj is pruned, and .* can't make it smaller"):
        shrink(opt, masks)


def test_models_of_another_build_are_refused():
    experts = build(MixtralConfig(**SIZES, **COMMON, num_key_value_heads=2, num_local_experts=2))
    with pytest.raises(PhoenixError, match="has not one gate_proj, up_proj and down_proj, nor one fc1 and fc2"):
        structured_masks(experts, random_scores(experts), 0.5)
    # OLMo 2 norms all query heads together: without some of them the others change.
    olmo = build(Olmo2Config(**SIZES, **COMMON, num_key_value_heads=2))
    masks = structured_masks(olmo, random_scores(olmo), 0.5)
    with pytest.raises(PhoenixError, match="q_norm.weight hangs on the number of units"):
        shrink(olmo, masks)
    alone = structured_masks(olmo, random_scores(olmo), 0.5, attention=False)
    assert_close(shrink(olmo, alone), olmo, alone)
    uneven = make_model()
    uneven.model.layers[1].mlp = copy.deepcopy(
        build(LlamaConfig(**SIZES | {"intermediate_size": 40})).model.layers[1].mlp
    )
    with pytest.raises(PhoenixError, match=r"model\.layers\.1 is of another shape"):
        structured_masks(uneven, random_scores(uneven), 0.5)
