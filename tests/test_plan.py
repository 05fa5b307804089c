"""The plan: figures of the real model, from its configuration alone."""

import math
from pathlib import Path

import pytest
import torch

from phoenix_sparse import models, plan
from phoenix_sparse.finetuning.batching import PackRows
from phoenix_sparse.finetuning.examples import tokenize
from phoenix_sparse.models import load_model, prunable_linears
from phoenix_sparse.pipeline import open_task
from phoenix_sparse.recipe import Recipe, check, override
from phoenix_sparse.steps import machine
from phoenix_sparse.tasks.settings import TaskSettings
from tiny import CONFIGS, make_model


def planned(directory: Path, task_directory: Path, *changes: str):
    values = {"name": "a", "model": str(directory), "task": str(task_directory), "finetune": {"ranks": [8, 4]}}
    recipe = check(Recipe, override(values, changes), "test")
    return plan.estimate(recipe, directory, open_task(recipe.task, seed=0))


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    """A plan is for models that may not fit into this machine."""

    def refuse(*_args, **_kwargs):
        pytest.fail("the model was loaded")

    monkeypatch.setattr(models, "load_model", refuse)
    monkeypatch.setattr(machine, "load_model", refuse)


@pytest.fixture
def directory(tmp_path, tokenizer):
    """A model's directory without its weights."""

    def write(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        config = CONFIGS[kind]()
        config.dtype = dtype
        config.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return tmp_path

    return write


@pytest.mark.parametrize("kind", CONFIGS)
def test_parameters_are_those_of_the_real_model(directory, task_directory, kind):
    model = make_model(kind)
    layers = prunable_linears(model)
    figures = planned(directory(kind), task_directory)["model"]
    assert figures["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert figures["prunable"] == sum(layer.weight.numel() for layer in layers.values())
    assert figures["layers"] == len(layers)


def test_the_adapter_is_the_one_that_would_be_trained(model_directory, task_directory):
    from phoenix_sparse.finetuning.adapter import add_adapter

    for targets in (None, ("q_proj", "down_proj")):
        adapted = add_adapter(load_model(model_directory), rank=8, scale=1, masks=None, seed=0, targets=targets)
        trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        change = [f"finetune.targets=[{', '.join(targets)}]"] if targets else []
        assert planned(model_directory, task_directory, *change)["model"]["adapter"] == trained


@pytest.mark.parametrize("group", ["memory_bytes", "disk_bytes"])
@pytest.mark.parametrize("change", [(), ("evaluate.baselines=[]",), ("finetune.gradient_checkpointing=true",)])
def test_parts_are_positive_and_add_up(directory, task_directory, group, change):
    figures = dict(planned(directory(), task_directory, *change)[group])
    whole = figures.pop("in all")
    assert len(figures) >= 3
    assert min(figures.values()) > 0
    assert whole == sum(figures.values())


def test_weights_count_in_their_dtype(directory, task_directory):
    wide = planned(directory(), task_directory)
    assert wide["memory_bytes"]["weights"] == 4 * wide["model"]["parameters"]
    half = planned(directory(dtype=torch.bfloat16), task_directory)
    assert half["memory_bytes"]["weights"] == 2 * half["model"]["parameters"]
    assert (
        planned(directory(), task_directory, "dtype=bfloat16")["memory_bytes"]["weights"]
        == (half["memory_bytes"]["weights"])
    )


def test_steps_and_time_follow_the_recipe(directory, task_directory):
    place = directory()
    three = planned(place, task_directory, "finetune.epochs=3", "finetune.batch_size=16")
    assert three["task"]["train"] == 70
    assert three["training"]["steps of each"] == math.ceil(3 * 70 / 16)
    fixed = planned(place, task_directory, "finetune.max_steps=7", "finetune.batch_size=16")
    assert fixed["training"]["steps of each"] == 7
    alone = planned(place, task_directory, "evaluate.baselines=[dense]", "search.hill_climb=5", "search.nsga2=3")
    both = planned(place, task_directory, "evaluate.baselines=[dense_lora]", "search.bounds=false")
    assert (alone["training"]["trainings"], both["training"]["trainings"]) == (1, 2)
    assert list(alone["evaluation"].values()) == [2, 11]
    assert both["disk_bytes"]["models"] * 2 == alone["disk_bytes"]["models"] * 3
    for figures in (three, both):
        trainings, steps, flops, rate = figures["training"].values()
        assert figures["seconds"]["training, at that rate"] == pytest.approx(trainings * steps * flops / rate)


def test_ranks_by_kind_of_layer_and_a_sandwich_s_passes_are_counted(directory, task_directory):
    place = directory()
    ranks = {"q_proj": 6, "up_proj": 5, "down_proj": 5, "gate_proj": 5}
    adapter = sum(
        ranks.get(name.rsplit(".", 1)[-1], 4) * (layer.in_features + layer.out_features)
        for name, layer in prunable_linears(make_model()).items()
    )
    written = "finetune.ranks={q_proj: [3, 6], 'mlp.*': [5], '*': [4, 2]}"
    one, three = (planned(place, task_directory, written, f"finetune.sampling={s}") for s in ("uniform", "sandwich"))
    assert one["model"]["adapter"] == adapter
    assert three["training"]["FLOPs of a step"] == 3 * one["training"]["FLOPs of a step"]
    fixed = planned(place, task_directory, "finetune.ranks={'*': [4]}")
    assert fixed["evaluation"]["sub-adapters on the validation split"] == 1


def test_trained_weights_take_the_place_of_an_adapter(directory, task_directory):
    place, one = directory(dtype=torch.bfloat16), "evaluate.baselines=[]"
    adapter, full = (planned(place, task_directory, one, f"finetune.method={name}") for name in ("lora", "full"))
    prunable = full["model"]["prunable"]
    assert full["model"]["adapter"] == prunable
    # A float32 copy, its gradient and two moments; what they were copied from is not kept.
    assert full["memory_bytes"]["trained weights, gradient and optimizer"] == 16 * prunable
    assert full["memory_bytes"]["weights"] == adapter["memory_bytes"]["weights"] - 2 * prunable
    assert full["evaluation"]["sub-adapters on the validation split"] == 1
    assert full["training"]["FLOPs of a step"] < adapter["training"]["FLOPs of a step"]
    assert full["training"]["FLOPs of a step"] > 0.8 * adapter["training"]["FLOPs of a step"]
    some = planned(place, task_directory, one, "finetune.method=full", "finetune.targets=[q_proj]")
    assert some["model"]["adapter"] == 2 * 32 * 32


@pytest.mark.parametrize("length", [8, 32, 64])
def test_packed_examples_are_counted_as_they_lie_in_their_rows(directory, task_directory, tokenizer, length):
    """In rows of 8 tokens no two of them fit, and each has its own; in rows of 32 the last one is half empty."""
    place, task = directory(), open_task(check(TaskSettings, {"name": str(task_directory)}, "test"), seed=0)
    rows = tokenize(task.train, tokenizer, length)
    most = max(PackRows(256, length)(rows[n : n + 16])["input_ids"].numel() for n in range(0, len(rows), 16))
    ways = (f"finetune.max_length={length}", "finetune.micro_batch_size=16")
    padded, packed = (
        planned(place, task_directory, *ways, f"finetune.batching={way}")["memory_bytes"]["activations"]
        for way in ("padded", "packed")
    )
    assert packed * 16 * max(len(row["input_ids"]) for row in rows) == padded * most


def test_validation_is_counted(directory, task_directory):
    place = directory()
    plain = planned(place, task_directory, "finetune.max_steps=25")
    often = planned(place, task_directory, "finetune.max_steps=25", "finetune.validate_every=10")
    assert often["evaluation"]["validations of each training"] == 3
    assert often["seconds"]["validation, at that rate"] > 0
    assert often["disk_bytes"]["in all"] > plain["disk_bytes"]["in all"]
    assert "validation, at that rate" not in plain["seconds"]


def test_less_is_kept_in_memory_where_blocks_are_computed_again(directory, task_directory):
    place = directory()
    plain, again = (planned(place, task_directory, f"finetune.gradient_checkpointing={on}") for on in ("no", "yes"))
    assert again["memory_bytes"]["activations"] < plain["memory_bytes"]["activations"]
    micro = planned(place, task_directory, "finetune.micro_batch_size=4")
    assert micro["memory_bytes"]["activations"] * 8 == plain["memory_bytes"]["activations"]


def test_memory_of_pruning_follows_the_method(directory, task_directory):
    place = directory()
    few = ("sparsify.calibration.samples=4", "sparsify.calibration.length=16")

    def pruning(*changes):
        figures = planned(place, task_directory, *few, *(f"sparsify.{change}" for change in changes))
        needs = dict(figures["pruning_bytes"])
        assert needs.pop("in all") == sum(needs.values())
        return figures["model"], needs

    model, wanda = pruning("importance=wanda")
    assert wanda["weights, a block at a time"] < 4 * model["parameters"]
    assert wanda["calibration states"] == 4 * 4 * 16 * 32
    assert wanda["masks"] == model["prunable"]
    assert "calibration states" not in pruning("importance=magnitude")[1]
    # Two blocks, alike: q, k, v, o, gate and up read 32 values, down reads 48.
    assert pruning("update=alps")[1]["second moments of a block's inputs"] == 4 * (6 * 32**2 + 48**2)
    assert pruning()[1] == pruning("update=sparsegpt")[1] == pruning("update=alps")[1]
    assert "second moments of a block's inputs" not in wanda
    assert pruning("importance=taylor")[1]["states before each block"] == 3 * 4 * 4 * 16 * 32
    assert pruning("importance=magnitude", "group=global")[1]["scores of all linears, sorted"] == 24 * model["prunable"]
    assert pruning("pattern=structured")[1]["scores of all linears"] == 4 * model["prunable"]
    search = pruning("allocation=evolutionary")[1]
    assert search["weights"] == 4 * model["parameters"]
    assert search["scores of all linears"] == search["copy of the linears"] == 4 * model["prunable"]
    assert search["dense log-probabilities, at most"] == 2 * 4 * 16 * 257
    assert "dense log-probabilities, at most" not in pruning("allocation=evolutionary", "evolution.fitness=loss")[1]


def test_nothing_is_written(directory, task_directory, tmp_path, monkeypatch):
    place = directory()
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    planned(place, task_directory)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
