"""Recipes: what is refused, in which words; overrides; the shipped recipes."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.evaluation.settings import EvaluateSettings
from phoenix_sparse.finetuning.settings import FinetuneSettings, SearchSettings
from phoenix_sparse.pruning.settings import CalibrationSettings, SparsifySettings
from phoenix_sparse.recipe import Recipe, check, dump_recipe, load_recipe, override, without_idle
from phoenix_sparse.sweep.matrix import load_sweep
from phoenix_sparse.tasks.settings import TaskSettings

RECIPES = sorted(
    path for path in (Path(__file__).parents[1] / "recipes").glob("*.yaml") if not path.stem.startswith("sweep")
)
LEAST = {"name": "a", "model": "models/a", "task": "gsm8k"}


def refusal(action) -> str:
    """The one line that something is refused with."""
    with pytest.raises(PhoenixError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        # unknown fields, at every depth
        ("sparsfy={}", "sparsfy is no field; did you mean sparsify?"),
        ("sparsity=0.5", "sparsity is no field; did you mean sparsify.sparsity?"),
        ("batch_size=8", "batch_size is no field; did you mean finetune.batch_size or evaluate.batch_size?"),
        ("sparsify.sparsty=0.5", "sparsify.sparsty is no field; did you mean sparsify.sparsity?"),
        ("sparsify.calibration.sampels=5", "did you mean sparsify.calibration.samples?"),
        ("evaluate.perplexity={text: a, contxt_length: 8}", "did you mean evaluate.perplexity.context_length?"),
        ("task.nam=gsm8k", "task.nam is no field; did you mean task.name?"),
        ("task.mixture=[{name: mawps, dat: /x}]", "task.mixture.0.dat is no field; did you mean task.mixture.0.data?"),
        ("evaluate.also=[{nam: mawps}]", "evaluate.also.0.nam is no field; did you mean evaluate.also.0.name?"),
        ("finetune.distill={logit: 1}", "finetune.distill.logit is no field; did you mean finetune.distill.logits?"),
        ("sparsify.sparsity=no", "sparsify.sparsity: false is no number; give one"),
        ("finetune.max_steps=on", "finetune.max_steps: true is no number; give one"),
        ("seed=true", "seed: true is no number; give one"),
        ("search.zzz=1", "search.zzz is no field; known here: bounds, hill_climb, nsga2, population, examples"),
        # values
        ("sparsify.sparsity=1.0", "sparsify.sparsity=1.0 should be less than 1"),
        ("sparsify.sparsity=-0.1", "sparsify.sparsity=-0.1 should be greater than or equal to 0"),
        ("sparsify.sparsity=half", "sparsify.sparsity='half' should be a valid number"),
        ("sparsify.pattern=4:2", "sparsify.pattern='4:2': '4:2' is no pattern; use unstructured, N:M with N < M"),
        ("sparsify.pattern=1:2:4", "sparsify.pattern='1:2:4': '1:2:4' is no pattern"),
        ("seed=1:30", "seed='1:30' should be a valid integer"),
        ("sparsify.importance=wand", "sparsify.importance='wand': 'wand' is not known; use one of"),
        ("finetune.epochs=0", "finetune.epochs=0 should be greater than 0"),
        ("finetune.learning_rate=.nan", "finetune.learning_rate=nan should be"),
        ("finetune.max_steps=1.5", "finetune.max_steps=1.5 should be a valid integer"),
        ("finetune.ranks=[]", "finetune.ranks=[]: needs one or more different whole numbers from 1 up"),
        ("finetune.ranks=[8, 8]", "finetune.ranks=[8, 8]: needs one or more different"),
        ("finetune.ranks=[8, 0]", "finetune.ranks=[8, 0]: needs one or more different"),
        ("finetune.ranks=8", "finetune.ranks=8: needs one or more different whole numbers"),
        ("finetune.ranks=[many]", "finetune.ranks=['many']: needs one or more different"),
        ("evaluate.baselines=[dens]", "evaluate.baselines.0='dens' should be 'dense', 'pruned' or 'dense_lora'"),
        ("evaluate.baselines=[dense, pruned, dense]", "dense stands twice; give each baseline once"),
        # what would do nothing
        ("search.population=4", "search.population: it is a setting of nsga2, which evaluates nothing; set nsga2"),
        ("search={hill_climb: 0, pool: 2}", "search.pool: it is a setting of hill_climb, which evaluates nothing"),
        ("search={hill_climb: 0, neighbours: 2}", "search.neighbours: it is a setting of hill_climb"),
        ("finetune.distill={logits: 0, hidden: 1, temperature: 2}", "finetune.distill.temperature: it divides logits"),
        ("task.holdout=1", "task.holdout=1 should be less than 1"),
        ("task.data=5", "task.data=5 should be a path"),
        ("task=''", "task.name='': the task has no name; give a built-in task or a folder"),
        ("seed=-1", "seed=-1 should be greater than or equal to 0"),
        ("dtype=float16", "dtype='float16' should be 'auto', 'float32' or 'bfloat16'"),
        ("name=runs/a", "name='runs/a': use letters, digits"),
        ("name=..", "name='..': use letters, digits"),
        ("model=", "model=(empty) should be a valid string"),
        ("name=" + 500 * "x" + "/", "...: use letters, digits"),
        # a value where a section belongs
        ("sparsify=0.5", "sparsify=0.5 should be a section with keys such as sparsity"),
        ("finetune=", "finetune=(empty) should be a section with keys such as mode"),
        ("task=5", "task=5 should be a section with keys such as name"),
        ("evaluate.perplexity=text.txt", "evaluate.perplexity='text.txt' should be a section with keys such as text"),
        # fields that don't go together
        ("finetune.dropout=0.1", "finetune.dropout: the masked update has one product with the input"),
        ("finetune.dense_merge=remask", "finetune.dense_merge: belongs to mode: sparse_to_dense"),
        ("finetune.micro_batch_size=3", "finetune.micro_batch_size: 3 does not divide batch_size 32"),
        ("sparsify.calibration.source=text", "sparsify.calibration.source: text needs text: FILE"),
        ("sparsify.calibration.text=a.txt", "sparsify.calibration.source: text needs text: FILE"),
        # overrides that are none
        ("seed", "'seed' is not key=value; write for example sparsify.sparsity=0.6"),
        ("=1", "'=1' is not key=value"),
        ("sparsify..sparsity=1", "'sparsify..sparsity=1' is not key=value"),
        ("seed=[1", "seed: '[1' is not a YAML value"),
        ("seed=2025-13-01", "seed: '2025-13-01' is not a YAML value"),
        ("model.path=a", "model is a value ('models/a') and has no fields; set it as a whole"),
    ],
)
def test_a_refusal_names_the_field_and_what_would_be_right(tmp_path, change, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(LEAST))
    message = refusal(lambda: load_recipe(path, [change]))
    assert words in message
    assert len(message) < 300 + len(str(path))


@pytest.mark.parametrize(
    ("finetune", "words"),
    [
        ({"ranks": [8]}, "search.nsga2: finetune.ranks gives one rank, so there is one candidate"),
        ({"ranks": {"q_proj": [8], "*": [4]}}, "search.nsga2: finetune.ranks gives one rank"),
        ({"method": "full"}, "search.nsga2: method: full has no ranks"),
    ],
)
def test_evaluations_of_nsga2_need_ranks_to_search(finetune, words):
    values = LEAST | {"finetune": finetune}
    assert words in refusal(lambda: check(Recipe, values | {"search": {"nsga2": 4}}, "test"))
    check(Recipe, values, "test")  # hill climbing, which is on unless turned off, passes over it
    check(Recipe, values | {"search": {"nsga2": 4}, "finetune": {"ranks": {"q_proj": [8], "*": [4, 2]}}}, "test")


IDLE = [
    (
        {"sparsify": {"importance": "random", "calibration": {"samples": 4}}},
        "sparsify.calibration: random measures nothing on it",
    ),
    (
        {"sparsify": {"importance": "magnitude", "calibration": {"source": "text", "text": "a.txt"}}},
        "sparsify.calibration: magnitude measures nothing on it; leave calibration out, or prune by what does",
    ),
    (
        {"sparsify": {"importance": "taylor", "calibration": {"source": "text", "text": "a.txt"}}},
        "sparsify.calibration: the gradients of taylor are of the task's examples, not of a text; leave source",
    ),
    ({"sparsify": {"evolution": {"budget": 4}}}, "sparsify.evolution: it is for allocation=evolutionary, and this one"),
    (
        {"evaluate": {"dense_lora_learning_rate": 0.1, "baselines": ["dense"]}},
        "evaluate.dense_lora_learning_rate: no dense LoRA is trained; leave its rate out, or add dense_lora to",
    ),
]


@pytest.mark.parametrize(("values", "words"), IDLE)
def test_settings_that_a_run_does_not_look_at_are_refused_for_it(values, words):
    recipe = check(Recipe, LEAST | values, "test")  # of several runs, another may look at them
    assert refusal(lambda: without_idle(recipe, [])).startswith(words)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"sparsify": {"importance": "random"}},
        {"sparsify": {"calibration": {"samples": 4}}},
        {"sparsify": {"importance": "magnitude", "update": "dsnot", "calibration": {"samples": 4}}},
        {"sparsify": {"importance": "magnitude", "allocation": "owl", "calibration": {"samples": 4}}},
        {"sparsify": {"importance": "taylor", "calibration": {"samples": 4}}},
        {"sparsify": {"importance": "gblm", "calibration": {"source": "text", "text": "a.txt"}}},
        {"sparsify": {"allocation": "evolutionary", "evolution": {"budget": 4}}},
        {"evaluate": {"dense_lora_learning_rate": 0.1}},
        {"evaluate": {"dense_lora_learning_rate": 0.1, "baselines": []}, "finetune": {"distill": {}}},
    ],
)
def test_settings_that_a_run_looks_at_are_not(values, tmp_path):
    recipe = check(Recipe, LEAST | values, "test")
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))  # every default written out
    assert without_idle(load_recipe(path), []) == recipe


FEW = {"sparsify": {"calibration": {"samples": 4}}}
SEARCHED = {"sparsify": {"allocation": "evolutionary", "evolution": {"budget": 4}}}
OWN_RATE = {"evaluate": {"dense_lora_learning_rate": 0.1}}


@pytest.mark.parametrize(
    ("there", "changes", "idle"),
    [
        (FEW, ["sparsify.importance=random"], []),
        (FEW, ["sparsify.importance=random", "sparsify.calibration.length=9"], ["sparsify.calibration"]),
        (FEW, ["sparsify={importance: random, calibration: {samples: 4}}"], ["sparsify.calibration"]),
        (SEARCHED, ["sparsify.allocation=uniform"], []),
        (SEARCHED, ["sparsify.allocation=owl", "sparsify.evolution.budget=5"], ["sparsify.evolution"]),
        (OWN_RATE, ["evaluate.baselines=[]"], []),
        (OWN_RATE, ["evaluate={baselines: [], dense_lora_learning_rate: 2}"], ["evaluate.dense_lora_learning_rate"]),
        # a choice that wasn't changed here: the file itself says what does nothing
        ({"sparsify": FEW["sparsify"] | {"importance": "random"}}, ["sparsify.sparsity=0.7"], ["sparsify.calibration"]),
        ({"evaluate": OWN_RATE["evaluate"] | {"baselines": []}}, ["seed=1"], ["evaluate.dense_lora_learning_rate"]),
    ],
)
def test_what_a_changed_choice_has_no_use_for_goes_with_the_choice_before(there, changes, idle):
    named = [text.partition("=")[0] for text in changes]
    recipe = check(Recipe, override(LEAST | there, changes), "test")
    if idle:
        assert refusal(lambda: without_idle(recipe, named)).startswith(f"{idle[0]}: ")
    else:
        assert without_idle(recipe, named) == check(Recipe, override(LEAST, changes), "test")
    assert without_idle(recipe, [], shared=True).idle == {}


def test_a_sweep_and_a_recipe_are_told_apart(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump({"name": "a", "models": ["demo"], "tasks": ["demo"], "methods": {}}))
    assert f"{path} is a sweep of many runs; give it to `phx sweep run`" in refusal(lambda: load_recipe(path))
    path.write_text(yaml.safe_dump(LEAST))
    assert f"{path} is the recipe of one run; give it to `phx run`" in refusal(lambda: load_sweep(path))


def test_what_does_not_fit_is_told_all_at_once():
    message = refusal(lambda: check(Recipe, {"name": "a", "seed": -1, "sparsify": {"sparsity": 2}}, "a.yaml"))
    assert message.startswith("a.yaml: ")
    for words in (
        "model is missing (a Hugging Face model directory, a hub name, or demo)",
        "task is missing (a built-in task or a folder with task.yaml, or a section with name)",
        "seed=-1",
        "sparsify.sparsity=2",
    ):
        assert words in message


SECTIONS = [
    Recipe,
    TaskSettings,
    SparsifySettings,
    CalibrationSettings,
    FinetuneSettings,
    SearchSettings,
    EvaluateSettings,
]


@pytest.mark.parametrize("section", SECTIONS)
def test_a_required_field_says_what_it_is(section):
    """Its description is what the refusal says."""
    assert all(field.description for field in section.model_fields.values() if field.is_required())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- name: a\n", "must hold keys and values, such as model: and task:"),
        ("", "must hold keys and values"),
        ("just words", "must hold keys and values"),
        ("name: [a\nmodel: b\n", "is not YAML (while parsing a flow sequence"),
        ("name: a\nmodel: !!python/object:os.system x\n", "is not YAML (could not determine a constructor"),
        ("seed: 2025-13-01\n", "is not YAML (month must be in 1..12)"),
        ("5: 6\n", "5=5: keys should be strings"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    message = refusal(lambda: load_recipe(path))
    assert words in message
    assert str(path) in message


def test_a_file_that_can_not_be_read(tmp_path):
    assert "none.yaml can't be read (FileNotFoundError)" in refusal(lambda: load_recipe(tmp_path / "none.yaml"))
    assert "can't be read (IsADirectoryError)" in refusal(lambda: load_recipe(tmp_path))
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert "can't be read (UnicodeDecodeError)" in refusal(lambda: load_recipe(tmp_path / "latin.yaml"))


def test_overrides(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: a\nmodel: b\ntask: gsm8k\nfinetune: {epochs: 5}\nsearch:\n")
    changes = [
        "task.data=some/where",
        "finetune.ranks=[4, 16, 8]",
        "finetune.learning_rate=3e-4",
        "finetune.targets=[q_proj]",
        "evaluate.perplexity.text=a.txt",
        "evaluate.baselines=[]",
        "evaluate.perplexity.max_tokens=100",
        "search.bounds=no",
        "seed=3",
        "seed=4",
    ]
    recipe = load_recipe(path, changes)
    assert (recipe.task.name, recipe.task.data) == ("gsm8k", Path("some/where"))
    assert recipe.finetune.ranks == (16, 8, 4)
    assert (recipe.finetune.learning_rate, recipe.finetune.epochs) == (3e-4, 5)
    assert recipe.finetune.targets == ("q_proj",)
    assert recipe.evaluate.perplexity is not None
    assert recipe.evaluate.perplexity.max_tokens == 100
    assert recipe.evaluate.baselines == ()
    assert recipe.search.bounds is False
    assert recipe.seed == 4
    again = load_recipe(path, [*changes, "evaluate.perplexity=null", "task=boolq", "finetune.targets=null"])
    assert again.evaluate.perplexity is None
    assert (again.task.name, again.task.data, again.finetune.targets) == ("boolq", None, None)


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.75)])
def test_n_of_m_is_read_as_it_is_written(tmp_path, pattern, sparsity):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: a\nmodel: b\ntask: gsm8k\nsparsify: {{pattern: {pattern}, sparsity: {sparsity}}}\n")
    assert load_recipe(path).sparsify.pattern == pattern
    path.write_text("name: a\nmodel: b\ntask: gsm8k\n")
    changes = [f"sparsify.pattern={pattern}", f"sparsify.sparsity={sparsity}"]
    assert load_recipe(path, changes).sparsify.pattern == pattern


@pytest.mark.parametrize(
    ("there", "changes", "update"),
    [
        ({}, ["sparsify.importance=magnitude"], "none"),
        ({"update": "sparsegpt"}, ["sparsify.importance=magnitude"], "none"),
        ({"update": "alps"}, ["sparsify.group=layer"], "none"),
        ({"update": "alps"}, ["sparsify.importance=ria", "sparsify.update=sparsegpt"], "sparsegpt"),
        ({"update": "alps", "allocation": "evolutionary"}, ["sparsify.importance=ria"], "alps"),
        ({"update": "dsnot"}, ["sparsify.importance=ria"], "dsnot"),
        ({"update": "alps"}, ["sparsify.sparsity=0.6"], "alps"),
        ({"update": "alps"}, ["sparsify.group=null"], "alps"),
    ],
)
def test_an_importance_takes_the_place_of_what_would_ignore_it(there, changes, update):
    values = {"name": "x", "model": "demo", "task": "demo", "sparsify": there}
    assert check(Recipe, override(values, changes), "x").sparsify.update == update
    assert values["sparsify"] == there


def test_a_section_set_to_a_value_is_refused_in_one_line():
    values = override(LEAST, ["sparsify.importance=ria", "sparsify=5"])
    assert "sparsify" in refusal(lambda: check(Recipe, values, "x"))


def test_overrides_change_a_copy():
    values = {"sparsify": {"sparsity": 0.5}, "task": "gsm8k"}
    changed = override(values, ["sparsify.sparsity=0.7", "task.max_test=3", "finetune.epochs=1"])
    assert values == {"sparsify": {"sparsity": 0.5}, "task": "gsm8k"}
    assert changed == {
        "sparsify": {"sparsity": 0.7},
        "task": {"name": "gsm8k", "max_test": 3},
        "finetune": {"epochs": 1},
    }


POSITIVE = st.floats(min_value=1e-9, max_value=1e9)
TEXT = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1)  # YAML keeps no control characters


@given(
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
    model=TEXT,
    seed=st.integers(0, 2**32 - 1),
    sparsity=st.floats(0, 1, exclude_max=True),
    ranks=st.lists(st.integers(1, 512), min_size=1, unique=True),
    rate=POSITIVE,
    epochs=POSITIVE,
    targets=st.none() | st.lists(TEXT, min_size=1),
    data=st.none() | st.from_regex(r"[\w /.-]+", fullmatch=True),
    pruning=st.sampled_from([{}, {"importance": "random"}, {"group": "row"}, {"pattern": "16x1"}, {"update": "alps"}]),
)
def test_a_dumped_recipe_is_read_back(
    tmp_path_factory, name, model, seed, sparsity, ranks, rate, epochs, targets, data, pruning
):
    values = {
        "name": name,
        "model": model,
        "task": {"name": "gsm8k", "data": data},
        "seed": seed,
        "sparsify": {"sparsity": sparsity, **pruning},
        "finetune": {"ranks": ranks, "learning_rate": rate, "epochs": epochs, "targets": targets},
    }
    recipe = check(Recipe, values, "values")
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert dump_recipe(load_recipe(path)) == dump_recipe(recipe)


def test_a_dump_holds_every_field():
    def leaves(kind, values):
        assert list(values) == list(kind.model_fields)

    values = yaml.safe_load(dump_recipe(check(Recipe, LEAST, "least")))
    leaves(Recipe, values)
    for section in ("sparsify", "finetune", "search", "evaluate", "task"):
        leaves(Recipe.model_fields[section].annotation, values[section])


def test_recipes_are_shipped():
    assert "demo" in [path.stem for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_right(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert load_recipe(path, ["sparsify.sparsity=0.7"]).sparsify.sparsity == 0.7
    assert recipe.sparsify.update == SparsifySettings().update == "sparsegpt"
    assert load_recipe(path, ["sparsify.importance=magnitude"]).sparsify.update == "none"
