"""Mixtures: every source in its own words, and no question that any evaluation asks."""

import json

import pytest

from phoenix_sparse import pipeline
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_json
from phoenix_sparse.recipe import Recipe, check, override
from phoenix_sparse.tasks import SourceSettings, TaskSettings, load_task, mix
from phoenix_sparse.tasks.splits import question_key


def make_task(place, field, verb, numbers, test=(), validation=()):
    """Doubling (or whatever the verb says) of numbers; every task has its own field and prompt."""
    place.mkdir(parents=True)
    for split, part in {"train": numbers, "test": test, "validation": validation}.items():
        if part:
            rows = [json.dumps({field: f"{verb} {number}?", "a": str(2 * number)}) for number in part]
            (place / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    (place / "task.yaml").write_text(
        f'output_type: generate_until\ndoc_to_text: "{place.name}: {{{{{field}}}}}"\ndoc_to_target: "{{{{a}}}}"\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 3}\nmetric_list: [{metric: exact_match}]\n'
    )
    return place


@pytest.fixture
def places(tmp_path):
    """`one` is the task, `two` is evaluated as well; their questions run into each other's splits and `pool`."""
    return {
        "one": make_task(tmp_path / "one", "q", "Twice", range(20), test=range(40, 45), validation=range(50, 54)),
        "two": make_task(tmp_path / "two", "text", "TWICE", range(18, 43), test=[0, 1, 70]),
        "pool": make_task(tmp_path / "pool", "p", "twice,", range(30, 75)),
    }


def load(place):
    return load_task(TaskSettings(name=str(place), validation=4), seed=0)


def numbers_of(task, name):
    return [int(e.prompt.rstrip("?").rsplit(" ", 1)[1]) for e in task.train if e.prompt.startswith(f"{name}: ")]


def test_no_source_trains_on_what_is_evaluated(places):
    one, two = load(places["one"]), load(places["two"])
    sources = [SourceSettings(name=str(places["two"])), SourceSettings(name=str(places["pool"]))]
    mixed = mix(one, sources, [two], seed=0)
    asked = {0, 1, 70, *range(40, 45), *range(50, 54)}
    assert numbers_of(mixed, "one") == [n for n in range(20) if n not in asked]
    assert numbers_of(mixed, "two") == [n for n in range(18, 43) if n not in asked]
    assert numbers_of(mixed, "pool") == [n for n in range(30, 75) if n not in asked]
    assert mixed.train[0].completion == " 4"
    assert mixed.dropped_overlap == 2
    found = mixed.record()["mixture"]
    assert {name: (part["train"], part["dropped_overlap"]) for name, part in found.items()} == {
        "two": (22, 3),
        "pool": (35, 10),
    }
    assert list(found["pool"]["sources"]) == ["train.jsonl"]
    # What the tasks are evaluated on is as it was, and solved examples are the task's own.
    assert mixed.validation == one.validation
    assert mixed.rows["test"] == one.rows["test"]
    assert len(mixed.rows["train"]) == 18


def test_the_check_is_on_texts_whatever_their_fields():
    assert question_key(["Twice 3?"]) == question_key(["TWICE 3"]) == question_key(["twice, 3?"])


def test_overlap_can_be_kept_but_not_with_the_validation(places):
    one = load(places["one"])
    mixed = mix(one, [SourceSettings(name=str(places["pool"]))], [], seed=0, drop_overlap=False)
    assert numbers_of(mixed, "pool") == [n for n in range(30, 75) if n not in range(50, 54)]


def test_a_sample_of_a_source(places):
    one, source = load(places["one"]), SourceSettings(name=str(places["pool"]), max_train=5)
    three = [numbers_of(mix(one, [source], [], seed=seed), "pool") for seed in (0, 0, 1)]
    assert len(three[0]) == 5
    assert three[0] == three[1] != three[2]


def test_what_is_wrong_is_told(places, tmp_path):
    one = load(places["one"])
    pool = SourceSettings(name=str(places["pool"]))
    with pytest.raises(PhoenixError, match="a source stands twice"):
        mix(one, [pool, pool], [], seed=0)
    with pytest.raises(PhoenixError, match="neither built in"):
        mix(one, [SourceSettings(name="nothing")], [], seed=0)
    tested = make_task(tmp_path / "tested", "q", "Twice", range(40, 45))
    with pytest.raises(PhoenixError, match="has no example that no evaluation asks about"):
        mix(one, [SourceSettings(name=str(tested))], [], seed=0)
    eats_all = load(make_task(tmp_path / "all", "q", "Twice", range(90, 99), test=range(20)))
    with pytest.raises(PhoenixError, match=r"every training question stands in a test split of evaluate\.also"):
        mix(one, [pool], [eats_all], seed=0)


def test_a_run_on_a_mixture(tmp_path, places, model_directory):
    values = {
        "name": "mixed",
        "model": str(model_directory),
        "task": {"name": str(places["one"]), "mixture": [str(places["two"]), {"name": str(places["pool"])}]},
        "sparsify": {"importance": "magnitude"},
        "finetune": {"ranks": [2], "max_steps": 2, "batch_size": 4, "batching": "packed", "trackers": []},
        "search": {"examples": 2},
        "evaluate": {
            "also": [{"name": str(places["two"]), "validation": 4}],
            "baselines": ["pruned"],
            "prompt_length": 8,
            "context_length": 16,
        },
    }
    run = pipeline.run(check(Recipe, values, "test"), tmp_path / "run")
    for place in (run, run / "baselines" / "pruned"):
        everything = read_json(place / "eval_all.json")
        assert list(everything["tasks"]) == ["one", "two"]
        assert everything["tasks"]["one"] == read_json(place / "eval.json")["phoenix"]
        assert everything["tasks"]["two"] == read_json(place / "eval_two.json")["phoenix"]
        assert everything["tasks"]["two"]["examples"] == 3
        accuracies = [one["accuracy"] for one in everything["tasks"].values()]
        assert everything["mean_accuracy"] == pytest.approx(sum(accuracies) / 2)
    manifest = read_json(run / "manifest.json")
    assert manifest["inputs"]["task"]["mixture"]["pool"]["dropped_overlap"] == 10
    assert manifest["inputs"]["also"]["two"]["test"] == 3
    assert "eval_all.json" in manifest["stages"]["evaluate"]["outputs"]
    for change, words in (
        (f"evaluate.also=[{places['one']}]", "a task stands twice in one, one"),
        (f"evaluate.also=[{{name: {places['two']}, mixture: [gsm8k]}}]", "give what to train on as task.mixture"),
        (f"evaluate.also=[{{name: {places['two']}, max_train: 3}}]", "only evaluated on, and max_train takes nothing"),
        ("evaluate.also=[nothing]", "neither built in"),
    ):
        with pytest.raises(PhoenixError, match=words):
            pipeline.prepare(check(Recipe, override(values, [change]), "test"))


def test_the_math_mixture_of_real_data(shared):
    data = shared / "data"
    settings = TaskSettings(name="gsm8k", data=data / "gsm8k", max_train=200)
    also = [
        load_task(TaskSettings(name="mawps", data=data / "mawps"), seed=0),
        load_task(TaskSettings(name="svamp", data=data / "svamp", holdout=0.3), seed=0),
    ]
    sources = [
        SourceSettings(name="mawps", data=data / "mawps", max_train=300),
        SourceSettings(name="svamp", data=data / "svamp"),
        SourceSettings(name="math_train", data=data / "math_train", max_train=300),
    ]
    mixed = mix(load_task(settings, seed=0), sources, also, seed=0)
    found = {name: (part["train"], part["dropped_overlap"]) for name, part in mixed.mixture.items()}
    assert found["mawps"][1] >= 27  # those that its train shares with its test
    assert found["svamp"][1] >= 200  # its test split is held out of its train
    assert found["math_train"][0] == 300
    tested = {question_key([row["question_concat"]]) for row in also[1].rows["test"]}
    asked = {question_key([e.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")]) for e in mixed.train}
    assert not tested & asked
