"""A comparison: its words, its ranks, what fails in it, and how it is taken up again."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from phoenix_sparse import comparing, pipeline
from phoenix_sparse.comparing import FILE, compare, comparison_recipes, parse_spec
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_json, write_json
from phoenix_sparse.pruning import importance


@pytest.fixture(autouse=True)
def breaking(monkeypatch):
    """An importance of somebody's own that fails."""
    monkeypatch.setattr(importance, "_REGISTRY", dict(importance._REGISTRY))

    @importance.register_importance("breaks")
    def breaks(weight, seen):
        raise ZeroDivisionError("somebody's fault\nand more of it")


@pytest.mark.parametrize(
    ("text", "name", "settings"),
    [
        ("wanda", "wanda", {"importance": "wanda"}),
        ("breaks", "breaks", {"importance": "breaks"}),
        ("wanda+owl", "wanda-owl", {"importance": "wanda", "allocation": "owl"}),
        ("sparsegpt", "sparsegpt", {"update": "sparsegpt"}),
        ("magnitude+2:4", "magnitude-2of4", {"importance": "magnitude", "pattern": "2:4"}),
        ("ria+dsnot+16x1", "ria-dsnot-16x1", {"importance": "ria", "update": "dsnot", "pattern": "16x1"}),
        ("alps+evolutionary+taylor", "alps-evolutionary-taylor", None),
        ("structured", "structured", {"pattern": "structured"}),
    ],
)
def test_specs_are_read(text, name, settings):
    spec = parse_spec(text)
    assert (spec.text, spec.name) == (text, name)
    assert settings is None or spec.settings == settings


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("wand", r"'wand' in 'wand' is no importance \(.*wanda.*\), update \(dsnot, .*\), allocation \(owl, .*pattern"),
        ("wanda+", "'' in 'wanda.' is no importance"),
        ("wanda+uniform", "'uniform' in"),
        ("wanda+ria", "names two of a kind, wanda and ria"),
        ("2:4+4:8", "names two of a kind, 2:4 and 4:8"),
        ("4:2", "'4:2' is no pattern"),
        ("wanda+sparsegpt", "sparsegpt scores the weights itself; leave wanda out"),
    ],
)
def test_specs_are_refused(text, words):
    with pytest.raises(PhoenixError, match=words):
        parse_spec(text)


VALUES: dict[str, Any] = {"model": "m", "task": "t", "sparsify": {"sparsity": 0.5}}


@pytest.mark.parametrize(
    ("spec", "importance", "update"),
    [
        ("owl", "wanda", "sparsegpt"),
        ("2:4", "wanda", "sparsegpt"),
        ("16x1", "wanda", "none"),
        ("structured", "wanda", "none"),
        ("dsnot", "wanda", "dsnot"),
        ("wanda", "wanda", "none"),
        ("magnitude+2:4", "magnitude", "none"),
        ("evolutionary+taylor", "taylor", "none"),
    ],
)
def test_what_a_spec_leaves_out_is_as_in_a_recipe(spec, importance, update):
    sparsify = comparison_recipes(VALUES, [spec])[spec].sparsify
    assert (sparsify.importance, sparsify.update) == (importance, update)


WORDS = (
    ("", "wanda", "magnitude"),
    ("", "2:4", "16x1", "structured"),
    ("", "dsnot", "sparsegpt", "alps"),
    ("", "owl", "evolutionary"),
)


@pytest.mark.parametrize("group", ["", "row", "layer", "global"])
@pytest.mark.parametrize("keep_group", [True, False])
def test_whatever_an_error_says_to_leave_out_can_be_left_out(group, keep_group):
    """As long as errors come, they name something that is there and is not needed."""
    for words in itertools.product(*WORDS):
        spec, beside = list(filter(None, words)), {"group": group} if group else {}
        while spec:
            try:
                comparison_recipes(VALUES, ["+".join(spec)], [f"group={beside['group']}"] if beside else [])
                break
            except PhoenixError as error:
                (said,) = re.findall("; leave (.*)$", str(error))
                first, _, other = said.partition(" out, or ")
                if first.removesuffix(" out") == "group" and not (keep_group and other):
                    del beside["group"]
                else:
                    for word in (other or first.removesuffix(" out")).split(" and "):
                        spec.remove(word)


def test_recipes_differ_in_the_pruning_alone():
    recipes = comparison_recipes(VALUES, ["wanda", "sparsegpt+owl"], ["calibration.samples=3", "finetune.epochs=2"])
    one, two = recipes.values()
    assert (one.sparsify.importance, two.sparsify.update, two.sparsify.allocation) == ("wanda", "sparsegpt", "owl")
    assert one.sparsify.calibration.samples == two.sparsify.calibration.samples == 3
    assert one.finetune == two.finetune
    assert (one.finetune.ranks, one.finetune.epochs, one.finetune.max_steps) == ((32,), 2, None)
    assert comparison_recipes(VALUES, ["wanda"])["wanda"].finetune.max_steps == 100
    assert comparison_recipes(VALUES, ["wanda"], ["finetune.max_steps=7"])["wanda"].finetune.max_steps == 7
    assert one.evaluate.split == "validation"
    assert one.evaluate.baselines == ("pruned",)
    assert (one.search.bounds, one.search.hill_climb, one.search.nsga2) == (False, 0, 0)
    assert (one.name, two.name) == ("wanda", "sparsegpt-owl")


@pytest.mark.parametrize(
    ("specs", "overrides", "words"),
    [
        (["wanda", "wanda"], [], "'wanda' and 'wanda' are the same"),
        (["sparsegpt+owl", "owl"], [], "'sparsegpt.owl' and 'owl' are the same"),
        (["wanda"], ["update=dsnot"], "compare: update can't be set; name it in a spec"),
        (["wanda"], ["sparsify.pattern=2:4"], "compare: pattern can't be set"),
        (["wanda"], ["evaluate.split=test"], "evaluate needs split: validation"),
        (["wanda"], ["evaluate.baselines=[]"], "and pruned among its baselines"),
        (["wanda", "owl"], ["evolution.budget=5"], "compare: evolution: it is for allocation=evolutionary"),
        (["wanda"], ["evaluate.dense_lora_learning_rate=1"], "compare: evaluate.dense_lora_learning_rate: no dense"),
        (["wanda"], ["finetune.epoch=1"], "compare: finetune.epoch is no field; did you mean finetune.epochs"),
        (["wanda"], ["sparsity=0.7", "calibration.samples=0"], "sparsify.calibration.samples=0 should be greater"),
        (["wanda", "2:4"], ["sparsity=0.7"], "compare: 2:4: sparsify.pattern: 2:4 is sparsity 0.5; set sparsity to"),
        (["structured+owl"], [], "compare: structured.owl: sparsify.allocation: the pattern structured gives each"),
    ],
)
def test_what_does_not_fit_is_refused(specs, overrides, words):
    with pytest.raises(PhoenixError, match=words):
        comparison_recipes(VALUES, specs, overrides)


def test_settings_of_the_search_are_for_the_spec_that_searches():
    recipes = comparison_recipes(VALUES, ["wanda", "wanda+evolutionary"], ["evolution.budget=5"])
    assert recipes["wanda+evolutionary"].sparsify.evolution.budget == 5
    comparison_recipes(VALUES, ["random"], ["calibration.samples=5"])  # wanda may be added to it later


@pytest.fixture
def played(monkeypatch, model_directory, task_directory):
    """Runs that write accuracies given for them, (before, after) by name, and fail where none are."""
    scores: dict[str, tuple[float, float]] = {}
    runs: list[tuple[str, bool]] = []

    def score(value: float) -> dict[str, Any]:
        more = {"stderr": 0.05, "metric": "acc,none", "task": "sums", "split": "validation", "num_fewshot": 0}
        return {"phoenix": {"accuracy": value, "examples": 10, **more}}

    def run(recipe, out: Path, *, resume, progress, announce):
        runs.append((recipe.name, resume))
        write_json(out / "manifest.json", {"stages": {"sparsify": {"seconds": 2.0}, "report": {"seconds": 1.0}}})
        if recipe.name not in scores:
            raise PhoenixError("sparsify: it can't be done")
        before, after = scores[recipe.name]
        write_json(out / "allocation.json", {"sparsity": 0.5})
        write_json(out / "baselines/pruned/eval.json", score(before))
        write_json(out / "eval.json", score(after))
        return out

    monkeypatch.setattr(pipeline, "run", run)

    def recipes(*specs, overrides=()):
        values = {"model": str(model_directory), "task": str(task_directory), "sparsify": {"sparsity": 0.5}}
        return comparison_recipes(values, specs, overrides)

    return scores, runs, recipes


def test_ranks_are_by_the_accuracy_after(played, tmp_path):
    scores, _, recipes = played
    scores |= {"wanda": (0.5, 0.6), "ria": (0.1, 0.9), "random": (0.0, 0.6), "owl": (0.4, 0.1)}
    told = []
    result = compare(recipes("wanda", "breaks", "ria", "random", "owl"), tmp_path, announce=told.append)
    assert result == read_json(tmp_path / FILE)
    shown = [(e["spec"], e.get("rank_before"), e.get("rank_after")) for e in result["specs"]]
    assert shown == [("ria", 3, 1), ("wanda", 1, 2), ("random", 4, 2), ("owl", 2, 4), ("breaks", None, None)]
    first, last = result["specs"][0], result["specs"][-1]
    assert last["error"] == "sparsify: it can't be done"
    assert (first["seconds"], first["pruning_seconds"], first["sparsity"]) == (3.0, 2.0, 0.5)
    assert first["settings"]["importance"] == "ria"
    assert (first["before"]["accuracy"], first["after"]["accuracy"], first["after"]["stderr"]) == (0.1, 0.9, 0.05)
    assert result["close"] == []
    scores |= {"magnitude": (0.2, 0.8)}
    assert compare(recipes("magnitude"), tmp_path)["close"] == ["magnitude"]  # 0.1 is less than 2 · √2 · 0.05


def test_a_comparison_goes_on_and_grows(played, tmp_path):
    scores, runs, recipes = played
    scores |= {"wanda": (0.5, 0.6)}
    compare(recipes("wanda", "ria"), tmp_path)
    scores |= {"ria": (0.5, 0.7), "owl": (0.5, 0.5)}
    result = compare(recipes("ria", "owl"), tmp_path)
    assert runs == [("wanda", False), ("ria", False), ("ria", True), ("owl", False)]
    assert [entry["spec"] for entry in result["specs"]] == ["ria", "wanda", "owl"]
    with pytest.raises(PhoenixError, match=r"other settings: finetune\.max_steps is 100 there and 3 here"):
        compare(recipes("alps", overrides=["finetune.max_steps=3"]), tmp_path)
    assert result == read_json(tmp_path / FILE)
    write_json(tmp_path / FILE, [1])
    with pytest.raises(PhoenixError, match=r"compare\.json is no comparison"):
        compare(recipes("wanda"), tmp_path)


def test_a_comparison_of_other_data_is_not_gone_on_with(played, tmp_path, task_directory):
    scores, _, recipes = played
    scores |= {"wanda": (0.5, 0.6)}
    task = tmp_path / "task"
    task.mkdir()
    for path in task_directory.iterdir():
        (task / path.name).write_bytes(path.read_bytes())
    moved = [f"task.name={task}"]
    compare(recipes("wanda", overrides=moved), tmp_path / "out")
    with (task / "validation.jsonl").open("a") as file:
        file.write('{"question": "7+7+7", "answer": "21"}\n')
    with pytest.raises(PhoenixError, match=r"task\.sources\.validation\.jsonl is .* there"):
        compare(recipes("wanda", overrides=moved), tmp_path / "out")


def test_what_all_would_fail_by_is_told_before_any_run(played, tmp_path):
    _, runs, recipes = played
    for overrides, words in (
        (["model=./nowhere"], "nowhere is not a directory"),
        (["task.validation=0"], "no examples to validate with"),
        (["calibration.source=text", "calibration.text=nowhere.txt"], r"calibration\.text: nowhere\.txt can't be read"),
    ):
        with pytest.raises(PhoenixError, match=words):
            compare(recipes("wanda", overrides=overrides), tmp_path / "out")
    assert runs == []
    assert not (tmp_path / "out").exists()


def test_initialisations_are_really_run(tmp_path, model_directory, task_directory):
    values = {"model": str(model_directory), "task": str(task_directory), "sparsify": {"sparsity": 0.5}}
    few = ["calibration.samples=2", "calibration.length=16", "finetune.max_steps=1", "finetune.ranks=[2]"]
    recipes = comparison_recipes(values, ["2:4", "breaks", "7x1"], few)
    told: list[tuple[str, str]] = []
    result = compare(recipes, tmp_path, announce=lambda *words: told.append(words))
    good, broken, bad = result["specs"]
    assert good["spec"] == "2:4"
    assert good["sparsity"] == 0.5
    for moment, place in (("before", "baselines/pruned"), ("after", ".")):
        measured = read_json(tmp_path / "2of4" / place / "eval.json")["phoenix"]
        assert measured["split"] == good[moment]["split"] == "validation"
        assert measured["examples"] == good[moment]["examples"] == 10
        assert measured["accuracy"] == good[moment]["accuracy"]
    assert read_json(tmp_path / "2of4/certificate.json")["off_mask_nonzeros"] == 0
    assert "breaks: its function fails at model.layers.0." in broken["error"]
    assert "(ZeroDivisionError: somebody's fault, test_comparing.py:" in broken["error"]
    assert bad["error"].startswith("sparsify.pattern: 7x1 does not divide model.layers.0.")
    assert ("2:4: finetune", "started") in told
    told.clear()
    again = compare(recipes, tmp_path, announce=lambda *words: told.append(words))
    assert {state for stage, state in told if stage.startswith("2:4: ")} == {"kept"}
    assert again["specs"][0] == good
    assert comparing.FILE == "compare.json"
