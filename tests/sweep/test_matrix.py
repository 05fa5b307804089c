"""The matrix of a sweep: every cell checked, what is left out left out, mistakes told with the cell's name."""

import itertools
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.settings import SparsifySettings
from phoenix_sparse.recipe import Recipe, check, dump_recipe, without_idle
from phoenix_sparse.sweep.matrix import load_sweep, resolve
from phoenix_sparse.sweep.planning import shared_counts
from phoenix_sparse.sweep.settings import SweepSettings

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = {
    "name": "small",
    "base": {"finetune": {"ranks": [8], "epochs": 2}, "task": {"validation": 7}},
    "models": ["demo"],
    "tasks": {"sums": "demo", "other": {"task": {"name": "demo", "max_test": 5}, "finetune.epochs": 4}},
    "methods": {"plain": {"importance": "magnitude"}, "chance": {"sparsify.importance": "random"}},
    "sparsities": [0, 0.5],
    "modes": ["sparse_to_sparse", "sparse_to_dense"],
}


def write(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    return path


def test_every_combination_is_a_cell_with_its_settings(tmp_path):
    sweep = load_sweep(write(tmp_path))
    assert len(sweep.cells) == len({cell.name for cell in sweep.cells}) == 2 * 2 * 2 * 2
    cell = next(cell for cell in sweep.cells if cell.name == "demo-other-chance-50-s2d-s0")
    assert cell.recipe.sparsify.importance == "random"
    assert cell.recipe.sparsify.sparsity == 0.5
    assert cell.recipe.finetune.mode == "sparse_to_dense"
    assert (cell.recipe.finetune.epochs, cell.recipe.finetune.ranks) == (4, (8,))
    assert (cell.recipe.task.max_test, cell.recipe.task.validation) == (5, 7)
    other = next(cell for cell in sweep.cells if cell.name == "demo-sums-plain-0-s2s-s0")
    assert (other.recipe.finetune.epochs, other.recipe.task.max_test) == (2, None)


def test_an_override_of_one_field_leaves_its_section(tmp_path):
    sweep = load_sweep(write(tmp_path), ["tasks.other.finetune.max_steps=3", "base.finetune.batch_size=16"])
    recipe = next(cell.recipe for cell in sweep.cells if cell.axes["task"] == "other")
    assert (recipe.finetune.max_steps, recipe.finetune.ranks, recipe.finetune.batch_size) == (3, (8,), 16)


@given(
    sparsities=st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True),
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True),
    out=st.sets(st.tuples(st.integers(0, 9), st.sampled_from(["plain", "chance"])), max_size=5),
)
def test_exclusions_take_away_what_they_name(sparsities, seeds, out):
    shares = [one / 10 for one in sparsities]
    exclude = [{"sparsity": one / 10, "method": method} for one, method in sorted(out) if one in sparsities]
    settings = SweepSettings.model_validate(
        {**SMALL, "tasks": ["demo"], "sparsities": shares, "seeds": seeds, "exclude": exclude}
    )
    whole = set(itertools.product(sparsities, seeds, ["plain", "chance"], ["s2s", "s2d"]))
    expected = {cell for cell in whole if (cell[0], cell[2]) not in out}
    if not expected:
        with pytest.raises(PhoenixError, match="nothing is left"):
            resolve(settings, SMALL["base"])
        return
    cells, excluded = resolve(settings, SMALL["base"])
    found = {
        (round(10 * cell.axes["sparsity"]), cell.axes["seed"], cell.axes["method"], cell.axes["mode"]) for cell in cells
    }
    assert found == expected
    assert excluded == len(whole) - len(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sparsities": [0.5, 1.5]},
            "8 of 16 cells are wrong: demo-other-chance-150-s2s-s0 and 7 more: sparsify.sparsity=1.5",
        ),
        ({"methods": {"x": {"importanc": "wanda"}}}, "importanc is no field"),
        ({"methods": ["wanda"]}, "needs labels with settings of sparsify"),
        (
            {"exclude": [{"method": "plian", "sparsity": [0.5, 0]}]},
            "exclude: method: plian, sparsity: 0.5, 0 matches no cell; method is one of chance, plain",
        ),
        ({"exclude": [{"sparsity": 0.7}]}, "sparsity: 0.7 matches no cell; sparsity is one of 0, 0.5"),
        ({"sparsities": []}, "sparsities=[]: needs a list of one or more numbers, such as [0.3, 0.5]"),
        ({"seeds": []}, "seeds=[]: needs a list of one or more numbers, such as [0, 1]"),
        ({"seeds": 3}, "seeds=3: needs a list of one or more numbers"),
        ({"name": "a b"}, "name='a b': use letters, digits, dots, dashes and underscores"),
        ({"base": {"name": "mine"}}, "leave out its name (mine); a run is named by its cell"),
        ({"base": {"seed": 3}}, "seeds are an axis of their own, such as seeds: [3]"),
        (
            {"models": {"small": {"model": "demo", "name": "x"}}},
            "leave out the name in small; a run is named by its cell",
        ),
        ({"engine": {"gpus": [-1]}}, "engine.gpus=[-1]: '-1' is no GPU; give numbers from 0 on"),
        ({"engine": {"gpus": [0, True]}}, "'True' is no GPU"),
        ({"engine": {"gpus": 0}}, "needs a list of GPUs"),
        ({"exclude": [{"methods": "plain"}]}, "an exclusion names one or more of model, task, method"),
        ({"sparsities": [0.5, 0.5]}, "a value stands there twice"),
        ({"models": {"../x": "demo"}}, "goes into names of directories"),
        ({"models": ["a/same", "b/same"]}, "two values have the label 'same'"),
        ({"models": []}, "is empty"),
        ({"engine": {"kind": "inline", "provider": {"kind": "slurm"}}}, "the inline engine knows this machine only"),
        ({"engine": {"gpus": [0, 0]}}, "names a GPU twice"),
        ({"engine": {"provider": {"kind": "pbs", "walltime": "1h"}}}, "needs hours, minutes and seconds in quotes"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml can't be read"),
        # what no run looks at
        (
            {"base": {"sparsify": {"calibration": {"samples": 4}}}},
            "base.sparsify.calibration: no run of the sweep has use for it; leave it out",
        ),
        (
            {"base": {"evaluate": {"dense_lora_learning_rate": 1, "baselines": []}}},
            "base.evaluate.dense_lora_learning_rate: no run",
        ),
        (
            {"methods": {"chance": {"importance": "random", "calibration": {"samples": 4}}}},
            "8 of 8 cells are wrong: demo-other-chance-0-s2s-s0 and 7 more: sparsify.calibration: random measures",
        ),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(PhoenixError) as caught:
        load_sweep(write(tmp_path, **changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("gpus", [[0, 1], ["GPU-1a2b", "MIG-3c/4/5"], ["0,1", "2,3"]])
def test_gpus_are_what_cuda_visible_devices_takes(tmp_path, gpus):
    assert load_sweep(write(tmp_path, engine={"gpus": gpus})).settings.engine.gpus == tuple(map(str, gpus))


def test_a_pattern_of_a_method_needs_no_quotes(tmp_path):
    path = write(tmp_path, sparsities=[0.5])
    path.write_text(path.read_text() + "modes: [sparse_to_sparse]\nmethods:\n  pairs: {pattern: 2:4}\n")
    assert {cell.recipe.sparsify.pattern for cell in load_sweep(path).cells} == {"2:4"}
    assert {cell.axes["method"] for cell in load_sweep(path).cells} == {"pairs"}


@pytest.mark.parametrize(("base", "update"), [({}, "sparsegpt"), ({"importance": "ria"}, "none")])
def test_a_method_that_names_no_importance_takes_the_base_s_or_the_default(tmp_path, base, update):
    methods = {"pairs": {"pattern": "2:4"}, "blocks": {"pattern": "16x1"}, "alps": {"update": "alps"}}
    sweep = load_sweep(write(tmp_path, base={"sparsify": base}, methods=methods, sparsities=[0.5]))
    found = {cell.axes["method"]: cell.recipe.sparsify.update for cell in sweep.cells}
    assert found == {"pairs": update, "blocks": "none", "alps": "alps"}


def test_methods_prune_as_they_say_whatever_the_base_says(tmp_path):
    """As where it is a run's recipe.yaml, which names all."""
    (tmp_path / "base.yaml").write_text(dump_recipe(check(Recipe, {"name": "x", "model": "demo", "task": "demo"}, "x")))
    methods = {"usual": {"pattern": "2:4"}, "wanda": {"importance": "wanda"}, "alps": {"update": "alps"}}
    sweep = load_sweep(write(tmp_path, base="base.yaml", methods=methods, sparsities=[0.5]))
    found = {cell.axes["method"]: cell.recipe.sparsify.update for cell in sweep.cells}
    assert found == {"usual": "sparsegpt", "wanda": "none", "alps": "alps"}


def test_what_methods_share_is_for_those_that_look_at_it(tmp_path):
    pruning = {"calibration": {"samples": 4}, "evolution": {"budget": 4}}
    methods = {
        "plain": {"importance": "magnitude"},
        "wanda": {"importance": "wanda"},
        "searched": {"allocation": "evolutionary"},
    }
    sweep = load_sweep(write(tmp_path, base={"sparsify": pruning}, methods=methods))
    found = {
        cell.axes["method"]: (cell.recipe.sparsify.calibration.samples, cell.recipe.sparsify.evolution.budget)
        for cell in sweep.cells
    }
    usual = SparsifySettings()
    assert found["plain"] == (usual.calibration.samples, usual.evolution.budget)
    assert found["wanda"][0] == 4
    assert found["searched"] == (4, 4)
    for cell in sweep.cells:  # so that each cell's recipe is one that `phx run` takes
        assert without_idle(cell.recipe, []) == cell.recipe
    tasks = {"trained": {"task.name": "demo", "evaluate.baselines": ["dense_lora"]}, "plain": "demo"}
    load_sweep(write(tmp_path, tasks=tasks, base={"evaluate": {"dense_lora_learning_rate": 1, "baselines": []}}))


def test_a_base_may_be_a_recipe_beside_the_sweep(tmp_path):
    (tmp_path / "base.yaml").write_text("name: x\nmodel: y\ntask: z\nseed: 9\nfinetune: {epochs: 5}\n")
    sweep = load_sweep(write(tmp_path, base="base.yaml", tasks=["demo"]))
    assert {(cell.recipe.finetune.epochs, cell.recipe.model, cell.recipe.seed) for cell in sweep.cells} == {
        (5, "demo", 0)
    }


def test_the_shipped_sweeps_are_whole():
    assert len(load_sweep(RECIPES / "sweep-360.yaml").cells) == 360
    assert len(load_sweep(RECIPES / "sweep-demo.yaml").cells) == 60


def test_the_plan_counts_what_is_shared():
    sweep = load_sweep(RECIPES / "sweep-360.yaml")
    counts = shared_counts(sweep)
    # Wanda's masks and the structured ones depend on the task; random ones don't: (3 + 3 + 1) x 2 models x 10.
    assert counts["sparsify"] == (360, 140)
    assert counts["baseline dense"] == counts["baseline dense_lora"] == (360, 6)
    assert counts["baseline pruned"] == (360, 180)
    alone = load_sweep(RECIPES / "sweep-360.yaml", ["share=false"])
    assert set(shared_counts(alone).values()) == {(360, 360)}
