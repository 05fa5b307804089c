"""Step 1 as a whole."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_json
from phoenix_sparse.masks import compute_sparsity_stats, require_preserved
from phoenix_sparse.models import prunable_linears
from phoenix_sparse.pruning import initialise as module
from phoenix_sparse.pruning.blocks import Blocks
from phoenix_sparse.pruning.gradients import measure_gradients
from phoenix_sparse.pruning.initialise import Calibration, initialise, prune
from phoenix_sparse.pruning.selection import keep_globally
from phoenix_sparse.pruning.settings import SparsifySettings
from phoenix_sparse.pruning.structured import structured_masks
from tiny import CONFIGS, make_model

TOKENS = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(1))
ROWS = [{"input_ids": ids, "labels": [-100] * 5 + ids[5:]} for ids in TOKENS.tolist()]


@pytest.mark.parametrize("kind", CONFIGS)
def test_global_masks_are_those_of_one_comparison(kind):
    model, fresh = make_model(kind), make_model(kind)
    masks = prune(model, SparsifySettings(importance="taylor", group="global", sparsity=0.7), rows=ROWS)
    gradients = measure_gradients(Blocks(fresh), ROWS)
    layers = prunable_linears(fresh)
    scores = {name: layer.weight.detach().abs() * gradients[name] for name, layer in layers.items()}
    expected = keep_globally(scores, 0.7)
    assert list(masks) == list(expected)
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())
    require_preserved(masks, prunable_linears(model), "model")
    for name, layer in prunable_linears(model).items():
        assert torch.equal(layer.weight, layers[name].weight * masks[name])
    assert compute_sparsity_stats(masks)["sparsity"] == pytest.approx(0.7, abs=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_structured_masks_are_those_of_the_scores(kind):
    model, fresh = make_model(kind), make_model(kind)
    settings = SparsifySettings(importance="magnitude", pattern="structured", sparsity=0.4)
    masks = prune(model, settings)
    expected = structured_masks(
        fresh, {name: layer.weight.detach().abs() for name, layer in prunable_linears(fresh).items()}, 0.4
    )
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())
    require_preserved(masks, prunable_linears(model), "model")


@pytest.mark.parametrize("group", ["row", "layer", "global"])
def test_the_shares_are_what_the_masks_have(group):
    masks, shares = initialise(Blocks(make_model()), SparsifySettings(group=group), Calibration(TOKENS), seed=0)
    for name, mask in masks.items():
        assert shares.sparsity[name] == pytest.approx(1 - float(mask.float().mean()), abs=1e-6)
    assert (len(set(shares.sparsity.values())) > 1) == (group == "global")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (None, "these settings measure on tokens and there are none; give whole numbers"),
        (torch.zeros(0, 8, dtype=torch.int64), r"there are \(0, 8\) of torch.int64"),
        (torch.zeros(8, dtype=torch.int64), r"there are \(8,\) of torch.int64"),
        (torch.zeros(2, 8), r"there are \(2, 8\) of torch.float32"),
        (torch.full((2, 8), 257), "tokens from 257 to 257, and the model has embeddings for 257"),
        (torch.full((2, 8), -1), "tokens from -1 to -1, and the model has embeddings for 257"),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"importance": "magnitude", "update": "alps"}, {"allocation": "owl"}])
def test_tokens_that_are_none_are_refused(tokens, message, settings, llama):
    with pytest.raises(PhoenixError, match=f"calibration: .*{message}"):
        prune(llama, SparsifySettings(**settings), tokens=tokens)


def test_examples_that_are_missing_are_refused(llama):
    with pytest.raises(PhoenixError, match="gradients: no example has a completion to learn"):
        prune(llama, SparsifySettings(importance="taylor"))


def test_what_is_not_needed_may_be_missing(llama):
    masks = prune(llama, SparsifySettings(importance="magnitude", allocation="alphapruning"))
    assert len(masks) == 14


def test_a_model_in_training_mode_is_refused(llama):
    with pytest.raises(PhoenixError, match="model: it is in training mode.* call model.eval"):
        prune(llama.train(), SparsifySettings(importance="magnitude"))


def test_a_model_without_linears_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=257)).eval()
    with pytest.raises(PhoenixError, match="has no nn.Linear inside its decoder blocks"):
        prune(model, SparsifySettings(importance="magnitude"))


@pytest.mark.parametrize("pattern", ["16:33", "20x1", "1x9"])
def test_a_pattern_that_does_not_divide_is_refused_before_anything_is_measured(pattern, llama, monkeypatch):
    def unwanted(*_args, **_kwargs):
        raise AssertionError("measured")

    monkeypatch.setattr(module, "measure_gradients", unwanted)
    sparsity = 1 - 16 / 33 if ":" in pattern else 0.5
    settings = SparsifySettings(importance="taylor", pattern=pattern, sparsity=sparsity)
    with pytest.raises(PhoenixError, match=f"sparsify.pattern: {pattern} does not divide model.layers.0.self_attn"):
        prune(llama, settings, rows=ROWS)


def test_a_place_for_work_is_of_one_pruning(tmp_path):
    settings = SparsifySettings(importance="taylor")
    calibration = Calibration(TOKENS, rows=ROWS)
    initialise(Blocks(make_model()), settings, calibration, seed=0, work=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["allocation.json", "blocks", "gradients", "inputs.json"]
    assert read_json(tmp_path / "inputs.json")["seed"] == 0
    initialise(Blocks(make_model()), settings, calibration, seed=0, work=tmp_path)
    others = [
        (make_model(), SparsifySettings(importance="taylor", sparsity=0.6), calibration, 0),
        (make_model(), settings, calibration, 1),
        (make_model(), settings, Calibration(TOKENS + 1, rows=ROWS), 0),
        (make_model(), settings, Calibration(TOKENS, rows=ROWS[:2]), 0),
        (make_model("opt"), settings, calibration, 0),
        (make_model().to(torch.bfloat16), settings, calibration, 0),
    ]
    for model, other, given, seed in others:
        with pytest.raises(PhoenixError, match="holds what a pruning with other inputs left; remove it"):
            initialise(Blocks(model), other, given, seed=seed, work=tmp_path)


def test_progress_tells_every_part():
    calls = []
    settings = SparsifySettings(importance="taylor", allocation="owl")
    prune(make_model(), settings, tokens=TOKENS, rows=ROWS, progress=lambda *call: calls.append(call))
    parts = ["running block", "gradients of block", "scoring block", "pruning block"]
    assert calls == [(part, done, 2) for part in parts for done in (1, 2)]


def test_masks_do_not_depend_on_the_caller(llama):
    """On its random numbers or its gradient mode."""
    settings = SparsifySettings(importance="gblm")
    first = prune(make_model(), settings, tokens=TOKENS, rows=ROWS)
    torch.manual_seed(99)
    with torch.no_grad():
        second = prune(llama, settings, tokens=TOKENS, rows=ROWS)
    assert all(torch.equal(first[name], second[name]) for name in first)
