"""Ranks by kind of layer, and the rule of the scale: in the adapter, its files, the search and the settings."""

import json

import pytest
import torch
from peft import PeftModel

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.finetuning.adapter import (
    adapter_parameters,
    adapter_space,
    add_super_adapter,
    elastic_layers,
    load_adapter,
    save_adapter,
    set_ranks,
    target_linears,
)
from phoenix_sparse.finetuning.elastic import draw, largest, spaces
from phoenix_sparse.finetuning.search import Score, search
from phoenix_sparse.finetuning.settings import FinetuneSettings, SearchSettings
from phoenix_sparse.recipe import check
from tiny import pruned

TOKENS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(5))
RANKS = {"q_proj": (6, 3), "mlp.*": (5,), "*": (4, 2, 1)}


def adapted(masked=True, scale_rule="fixed", scale=2.0, targets=None):
    model, masks = pruned()
    space = spaces(target_linears(model, targets), RANKS)
    masks = masks if masked else None
    adapter = add_super_adapter(model, space, scale=scale, masks=masks, seed=1, targets=targets, scale_rule=scale_rule)
    torch.manual_seed(2)
    for layer in elastic_layers(adapter).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return adapter, masks, space


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


def test_a_layer_has_its_own_largest_rank():
    adapter, _, space = adapted()
    for name, layer in elastic_layers(adapter).items():
        expected = 6 if name.endswith("q_proj") else 5 if ".mlp." in name else 4
        assert layer.lora_A["default"].weight.shape[0] == layer.rank == space[name][0] == expected
        assert layer.scale == pytest.approx(2.0)
    trained = sum(parameter.numel() for parameter in adapter.parameters() if parameter.requires_grad)
    assert adapter_parameters(adapter, largest(space)) == trained
    with pytest.raises(PhoenixError, match=r"q_proj: rank 7 is outside 1 to 6"):
        set_ranks(adapter, {name: 7 for name in space if name.endswith("q_proj")})


def test_the_scale_follows_its_rule():
    for rule in ("fixed", "alpha_over_rank"):
        adapter, _, space = adapted(scale_rule=rule)
        ranks = draw(space, 0, 1)
        set_ranks(adapter, ranks)
        for name, layer in elastic_layers(adapter).items():
            factor = space[name][0] / ranks[name] if rule == "alpha_over_rank" else 1
            assert layer.scale == pytest.approx(2.0 * factor)
            a, b = layer.factors()
            torch.testing.assert_close(
                layer.merged_weight(), layer.weight + layer.mask * (2.0 * factor * (b @ a)), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("rule", ["fixed", "alpha_over_rank"])
@pytest.mark.parametrize("scale", [2.0, 0.3])
def test_stock_peft_computes_the_same_with_a_dense_sub_adapter(tmp_path, rule, scale):
    adapter, _, space = adapted(masked=False, scale_rule=rule, scale=scale)
    set_ranks(adapter, draw(space, 0, 7))
    save_adapter(adapter, tmp_path / "a", None)
    stock = PeftModel.from_pretrained(pruned()[0], tmp_path / "a")
    torch.testing.assert_close(logits(stock), logits(adapter), rtol=1e-5, atol=1e-5)
    for name, layer in elastic_layers(adapter).items():
        theirs = stock.get_base_model().get_submodule(name)
        assert theirs.r["default"] == layer.rank
        assert theirs.scaling["default"] == pytest.approx(layer.scale, rel=1e-12)


@pytest.mark.parametrize("rule", ["fixed", "alpha_over_rank"])
@pytest.mark.parametrize("targets", [None, ("q_proj", "up_proj", "o_proj")])
def test_super_and_sub_adapter_come_back(tmp_path, rule, targets):
    adapter, masks, space = adapted(scale_rule=rule, targets=targets)
    save_adapter(adapter, tmp_path / "super", masks, space)
    assert adapter_space(tmp_path / "super") == space
    again = load_adapter(pruned()[0], tmp_path / "super", masks)
    for model in (adapter, again):
        set_ranks(model, draw(space, 0, 7))
    assert torch.equal(logits(again), logits(adapter))
    save_adapter(again, tmp_path / "chosen", masks)
    chosen = load_adapter(pruned()[0], tmp_path / "chosen", masks)
    assert {name: layer.rank for name, layer in elastic_layers(chosen).items()} == draw(space, 0, 7)
    assert torch.equal(logits(chosen), logits(adapter))


@pytest.mark.parametrize("space", [{"q_proj": []}, {"q_proj": [0]}, {"q_proj": 4}])
def test_a_damaged_space_is_refused(tmp_path, space):
    adapter, masks, _ = adapted()
    save_adapter(adapter, tmp_path / "a", masks, (4, 2))
    path = tmp_path / "a" / "phoenix.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"space": space}))
    with pytest.raises(PhoenixError, match=r"no valid space of ranks|is no super-adapter"):
        adapter_space(tmp_path / "a")


def test_the_search_keeps_to_each_layer_s_ranks(tmp_path):
    names = [f"model.layers.{n}.{name}" for n in range(10) for name in ("self_attn.q_proj", "mlp.up_proj", "x.o_proj")]
    space = spaces(names, RANKS)

    def quality(ranks):
        return Score(sum(rank == 3 for rank in ranks.values()) / len(ranks), 0.01)

    record = search(
        names,
        RANKS,
        SearchSettings(hill_climb=40, nsga2=20),
        evaluate=lambda generation: map(quality, generation),
        count_parameters=lambda ranks: sum(ranks.values()),
        seed=0,
        journal=tmp_path / "journal.jsonl",
    )
    assert record["space"] == {name: list(ranks) for name, ranks in space.items()}
    for candidate in record["candidates"]:
        assert all(rank in space[name] for name, rank in candidate["ranks"].items())
    first, second, third = record["candidates"][:3]
    assert set(first["ranks"].values()) == {3, 5, 2}  # of two ranks, the lower one
    assert second["ranks"] == largest(space)
    assert set(third["ranks"].values()) == {3, 5, 1}
    fixed = search(
        names,
        {"*": (4,), "q_proj": (2,)},
        SearchSettings(),
        evaluate=lambda generation: map(quality, generation),
        count_parameters=len,
        seed=0,
        journal=tmp_path / "fixed.jsonl",
    )
    assert len(fixed["candidates"]) == fixed["budget"] == 1


def test_settings_by_kind_of_layer():
    settings = check(FinetuneSettings, {"ranks": {"q_proj": [16, 32], "*": [8]}}, "test")
    assert settings.ranks == {"q_proj": (32, 16), "*": (8,)}
    assert settings.largest_ranks == {"q_proj": (32,), "*": (8,)}
    assert FinetuneSettings.model_validate(settings.model_dump(mode="json")) == settings
    assert FinetuneSettings(ranks=(2, 4)).largest_ranks == (4,)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ranks": {}}, "ranks: needs ranks by last names or patterns"),
        ({"ranks": {"q_proj": [4, 4]}}, "q_proj needs one or more different whole numbers"),
        ({"ranks": {"q_proj": 4}}, "q_proj needs one or more different whole numbers"),
        ({"ranks": {3: [4]}}, "needs ranks by last names or patterns"),
        ({"ranks": [True]}, "needs one or more different whole numbers"),
        ({"ranks": "32"}, "needs one or more different whole numbers"),
        ({"ranks": [8], "sampling": "sandwich"}, "sampling: sandwich needs a largest and a smallest rank"),
        ({"ranks": {"*": [8]}, "sampling": "sandwich"}, "sampling: sandwich needs a largest and a smallest rank"),
        ({"scale_rule": "rank"}, "scale_rule='rank' should be 'fixed' or 'alpha_over_rank'"),
    ],
)
def test_wrong_settings_are_one_line(values, words):
    with pytest.raises(PhoenixError, match=words):
        check(FinetuneSettings, values, "test")
