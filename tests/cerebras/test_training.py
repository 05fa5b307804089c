"""The YAML of a job: groups of the true sparsity, and no job without one."""

import fnmatch
import runpy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.cerebras import masked_lora_source, runner_source
from phoenix_sparse.cerebras.training import TrainingSettings, sparsity_groups, training_params
from phoenix_sparse.cerebras_runs import training_settings
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.recipe import Recipe, check

SHARES = st.dictionaries(
    st.integers(0, 30).map(lambda layer: f"transformer_decoder.layers.{layer}.ffn.ffn.1.linear_layer.weight"),
    st.integers(1, 4).map(lambda fifths: {"sparsity": fifths / 5}),
    min_size=1,
)


@given(SHARES)
def test_every_weight_is_in_one_group_of_its_own_sparsity(weights):
    groups = sparsity_groups(weights)
    for name, weight in weights.items():
        matching = [g for g in groups for p in g["param_filter"] if fnmatch.fnmatchcase(f"model.{name}", p)]
        assert [group["sparsity"] for group in matching] == [weight["sparsity"]]
    assert len(groups) == len({weight["sparsity"] for weight in weights.values()})


@pytest.mark.parametrize("share", [0.0, 1.0, None])
def test_a_mode_without_sparsity_is_impossible(share):
    with pytest.raises(PhoenixError, match="without sparsity"):
        sparsity_groups({} if share is None else {"a": {"sparsity": share}})
    with pytest.raises(PhoenixError, match="static. or .sparse_lora"):
        check(TrainingSettings, {"mode": "dense", "steps": 1, "batch_size": 1, "learning_rate": 1.0}, "export")


def params(mode):
    settings = TrainingSettings(mode=mode, steps=8, warmup=2, batch_size=4, learning_rate=0.1, rank=4, scale=2.0)
    groups = sparsity_groups({"x.weight": {"sparsity": 0.5}})
    return training_params({"name": "llama"}, groups, settings, evaluation_batch=4)


@pytest.mark.parametrize("mode", ["static", "sparse_lora"])
def test_the_runner_refuses_a_job_whose_compiler_would_see_a_dense_model(mode):
    require = runpy.run_path(str(runner_source()))["require_sparsity"]
    good = params(mode)
    require(good, "it")
    for damage in ("sparsity", "callbacks", "share", "lora"):
        bad = params(mode)
        init = bad["trainer"]["init"]
        groups = init.get("sparsity") or init["callbacks"][-1]["MaskedLora"]["sparsity"]
        if damage == "sparsity":
            groups.clear()
        elif damage == "share":
            groups[0]["sparsity"] = 0.0
        elif damage == "lora":
            init["callbacks"].append({"Lora": {"r": 4}})
        else:
            init["callbacks"] = [one for one in init["callbacks"] if "CompleteCheckpoint" not in one]
        with pytest.raises(SystemExit, match="it: "):
            require(bad, "it")


def test_lora_is_scaled_as_the_recipe_says():
    adapter = params("sparse_lora")["trainer"]["init"]["callbacks"][-1]["MaskedLora"]
    assert adapter["alpha"] / adapter["r"] == 2.0
    assert "sparsity" not in params("sparse_lora")["trainer"]["init"]


def test_what_an_export_carries_imports_nothing_of_phoenix():
    for source in (runner_source(), masked_lora_source()):
        assert "phoenix_sparse" not in source.read_text()


def test_warmup_leaves_steps():
    with pytest.raises(PhoenixError, match="warmup"):
        check(
            TrainingSettings,
            {"mode": "static", "steps": 2, "warmup": 2, "batch_size": 1, "learning_rate": 1.0},
            "export",
        )


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 5000), st.integers(1, 5000))
def test_the_warmup_is_the_recipe_s_share_of_the_steps_that_the_job_has(share, planned, steps):
    values = {"name": "a", "model": "m", "task": "t", "finetune": {"warmup": share, "max_steps": planned}}
    recipe = check(Recipe, values, "test")
    for found, wanted in (
        (training_settings(recipe, "static", 100), planned),
        (training_settings(recipe, "static", 100, [f"steps={steps}"]), steps),
    ):
        assert found.steps == wanted
        assert 0 <= share * wanted - found.warmup < 1


def test_a_warmup_that_is_given_is_kept():
    values = {"name": "a", "model": "m", "task": "t", "finetune": {"warmup": 0.1, "max_steps": 1000}}
    recipe = check(Recipe, values, "test")
    assert training_settings(recipe, "static", 100, ["warmup=7"]).warmup == 7
    assert training_settings(recipe, "static", 100, ["steps=20", "warmup=0"]).warmup == 0
    with pytest.raises(PhoenixError, match="warmup: 30 steps of 20"):
        training_settings(recipe, "static", 100, ["steps=20", "warmup=30"])
    with pytest.raises(PhoenixError, match="steps='few' should be a valid integer"):
        training_settings(recipe, "static", 100, ["steps=few"])
