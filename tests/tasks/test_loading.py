import json
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.tasks import Example, TaskSettings, load_task
from phoenix_sparse.tasks.splits import question_key

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data isn't here")

TASK = {
    "output_type": "generate_until",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
    "metric_list": [{"metric": "exact_match"}],
}


def rows(first, count):
    return [{"question": f"What is {number} + 1?", "answer": str(number + 1)} for number in range(first, first + count)]


def write_split(folder, split, content):
    text = "".join(json.dumps(row) + "\n" for row in content)
    (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """A task folder with 20 training, 6 validation and 8 test examples, all different."""
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK))
    for split, first, count in (("train", 0, 20), ("validation", 100, 6), ("test", 200, 8)):
        write_split(tmp_path, split, rows(first, count))
    return tmp_path


def load(folder, seed=0, **options):
    return load_task(TaskSettings(name=str(folder), **options), seed=seed)


def prompts(examples):
    return [example.prompt for example in examples]


def requests(task, split, limit=None):
    harness = task.harness_task(split, limit)
    harness.build_all_requests()
    return harness.instances


def test_examples_of_a_folder(folder):
    task = load(folder)
    assert task.train[0] == Example("Question: What is 0 + 1?\nAnswer:", " 1")
    assert (len(task.train), len(task.validation), task.test_size, task.dropped_overlap) == (20, 6, 8, 0)
    assert task.name == folder.name
    assert task.metric == "exact_match,none"
    record = task.record()
    assert {key: record[key] for key in ("train", "validation", "test", "dropped_overlap")} == {
        "train": 20,
        "validation": 6,
        "test": 8,
        "dropped_overlap": 0,
    }
    assert set(record["sources"]) == {"train.jsonl", "validation.jsonl", "test.jsonl"}
    json.dumps(record)


def test_overlap_with_the_test_split_is_dropped(folder):
    same = {"question": "what is  3 + 1 ?", "answer": "4"}
    write_split(folder, "test", [*rows(200, 2), same])
    write_split(folder, "validation", [*rows(100, 2), *rows(5, 1), same])
    task = load(folder)
    assert (len(task.train), task.dropped_overlap) == (19, 1)
    assert len(task.validation) == 2  # one is trained on, one is tested with
    kept = load(folder, drop_overlap=False)
    assert (len(kept.train), kept.dropped_overlap) == (20, 0)


def test_validation_is_carved_out_of_train(folder):
    (folder / "validation.jsonl").unlink()
    task = load(folder, validation=5)
    assert (len(task.train), len(task.validation), task.test_size) == (15, 5, 8)
    assert set(prompts(task.train)).isdisjoint(prompts(task.validation))
    assert sorted(prompts(task.train) + prompts(task.validation)) == sorted(
        f"Question: {row['question']}\nAnswer:" for row in rows(0, 20)
    )
    assert load(folder, validation=5).validation == task.validation
    assert load(folder, seed=1, validation=5).validation != task.validation


def test_without_a_test_split_validation_is_tested(folder):
    (folder / "test.jsonl").unlink()
    task = load(folder, validation=4)
    assert (len(task.train), len(task.validation), task.test_size) == (16, 4, 6)


def test_holdout(folder):
    (folder / "test.jsonl").unlink()
    (folder / "validation.jsonl").unlink()
    with pytest.raises(PhoenixError, match=r"no test split.*task\.holdout"):
        load(folder)
    task = load(folder, holdout=0.3, validation=4)
    assert (len(task.train), len(task.validation), task.test_size) == (10, 4, 6)
    other = load(folder, seed=1, holdout=0.3, validation=4)
    assert other.rows["test"] == task.rows["test"]  # every run is tested on the same examples
    with pytest.raises(PhoenixError, match="leaves 20 to train with and 0 to test with"):
        load(folder, holdout=0.01)


def test_holdout_beside_a_test_split_is_refused(folder):
    with pytest.raises(PhoenixError, match=r"remove task\.holdout"):
        load(folder, holdout=0.3)


def test_limits(folder):
    task = load(folder, max_train=7, max_test=3, validation=2)
    assert (len(task.train), len(task.validation), task.test_size) == (7, 2, 3)
    assert prompts(load(folder).validation)[:2] == prompts(task.validation)
    assert [request.args[0] for request in requests(task, "test")] == [
        f"Question: {row['question']}\nAnswer:" for row in rows(200, 3)
    ]
    assert len(requests(task, "test", limit=2)) == 2
    assert prompts(task.train) != prompts(load(folder).train)[:7]  # a sample, not the beginning


def test_training_prompts_are_the_prompts_of_the_evaluation(folder):
    task = load(folder)
    assert [request.args[0] for request in requests(task, "validation")] == prompts(task.validation)


def test_multiple_choice_completes_with_the_text_that_is_scored(folder):
    config = {key: value for key, value in TASK.items() if key not in ("generation_kwargs", "doc_to_target")}
    config |= {"output_type": "multiple_choice", "doc_to_choice": "{{options}}", "doc_to_target": "gold"}
    (folder / "task.yaml").write_text(yaml.safe_dump(config | {"metric_list": [{"metric": "acc"}]}))
    for split, first in (("train", 0), ("validation", 100), ("test", 200)):
        numbered = enumerate(rows(first, 6))
        write_split(folder, split, [row | {"options": ["one", "two", "six"], "gold": i % 3} for i, row in numbered])
    task = load(folder)
    scored = requests(task, "validation")
    assert [example.completion for example in task.validation] == [" one", " two", " six"] * 2
    for index, example in enumerate(task.validation):
        gold = scored[3 * index + index % 3]
        assert gold.args == (example.prompt, example.completion)


def test_few_shot_examples_come_from_train(folder):
    harness = load(folder).harness_task("test")
    harness.set_fewshot_seed(0)
    prompt = harness.fewshot_context(rows(200, 1)[0], num_fewshot=3)
    *shown, asked = prompt.split("\n\n")
    known = {f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows(0, 20)}
    assert len(shown) == 3
    assert set(shown) <= known
    assert asked == "Question: What is 200 + 1?\nAnswer:"


def test_no_validation_wanted(folder):
    task = load(folder, validation=0)
    assert task.validation == []
    with pytest.raises(PhoenixError, match=r"task\.validation"):
        task.harness_task("validation")


@pytest.mark.parametrize(
    ("split", "content", "message"),
    [
        ("train", [{"question": "?"}], r"train\.jsonl:1: the field 'answer'"),
        ("test", [*rows(0, 2), {"answer": "3"}], r"test\.jsonl:3: the field 'question'"),
        ("train", [{"question": "What?", "answer": None}], r"train\.jsonl:1: the field 'answer'"),
        ("train", [{"question": "What?", "answer": " "}], "is empty or not text"),
        ("train", rows(200, 8), "no training examples are left"),
    ],
)
def test_bad_records(folder, split, content, message):
    write_split(folder, split, content)
    with pytest.raises(PhoenixError, match=message):
        load(folder)


def test_missing_places(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(PhoenixError, match=r"there is no train\.jsonl"):
        load(folder, data=empty)
    with pytest.raises(PhoenixError, match="its data, .*, is not a folder"):
        load(folder, data=empty / "no")
    (folder / "train.jsonl").unlink()
    with pytest.raises(PhoenixError, match="names no dataset_path"):
        load(folder)


def test_data_beside_the_definition(folder, tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    write_split(data, "train", rows(1000, 4))
    write_split(data, "test", rows(2000, 2))
    task = load(folder, data=data, validation=1)
    assert (len(task.train), len(task.validation), task.test_size) == (3, 1, 2)


def test_the_hub_is_asked_where_there_are_no_files(monkeypatch):
    import datasets

    train = [{"question": f"{n} plus 1", "equation": f"x={n}+1", "result_float": n + 1.0} for n in range(6)]
    asked = []

    def fake(path, name):
        asked.append((path, name))
        return {"train": train, "validation": train[:0], "test": [{**train[0], "question": "9 plus 1"}]}

    monkeypatch.setattr(datasets, "load_dataset", fake)
    task = load_task(TaskSettings(name="mawps", validation=2), seed=0)
    assert asked == [("MU-NLPC/Calc-mawps", None)]
    assert (len(task.train), len(task.validation), task.test_size) == (4, 2, 1)
    assert task.train[0].completion.endswith(f"The answer is {task.rows['train'][0]['answer']:.0f}.")
    assert all(len(digest) == 64 for digest in task.record()["sources"].values())


def test_the_hub_out_of_reach(monkeypatch):
    import datasets

    def fail(*_names):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(PhoenixError, match=r"svamp.*hub \(no route\); give a folder.*task\.data"):
        load_task(TaskSettings(name="svamp"), seed=0)


def test_settings():
    assert TaskSettings.model_validate("gsm8k") == TaskSettings(name="gsm8k")
    assert TaskSettings.model_validate(Path("my/task")).name == "my/task"
    for bad in ({"name": " "}, {"max_train": 0}, {"validation": -1}, {"holdout": 1.0}, {"num_fewshot": -1}, {"x": 1}):
        with pytest.raises(ValidationError):
            TaskSettings.model_validate({"name": "gsm8k"} | bad)


def full_marks(task, split, count):
    """Score the gold completions themselves, without a model."""
    harness = task.harness_task(split, count)
    harness.build_all_requests()
    for request in harness.instances:
        request.resps = [f"{task.definition.config.get('target_delimiter', ' ')}{harness.doc_to_target(request.doc)}"]
    harness.apply_filters()
    return [
        harness.process_results(request.doc, [response])["exact_match"]
        for request in harness.instances
        for response in request.filtered_resps.values()
    ]


@needs_data
@pytest.mark.parametrize(("name", "options"), [("gsm8k", {}), ("mawps", {}), ("svamp", {"holdout": 0.3})])
def test_gold_completions_get_full_marks(name, options):
    settings = TaskSettings(name=name, data=SHARED / name, max_train=50, **options)
    task = load_task(settings, seed=0)
    scores = full_marks(task, "test", 400)
    assert len(scores) == 2 * min(400, task.test_size)  # under both filters
    assert set(scores) == {1.0}


@needs_data
def test_mawps_shares_27_questions_with_its_test_split():
    task = load_task(TaskSettings(name="mawps", data=SHARED / "mawps"), seed=0)
    assert (len(task.train), task.test_size, task.dropped_overlap) == (1898 - 27, 238, 27)
    tested = {question_key([row["question"]]) for row in task.rows["test"]}
    for split in ("train", "validation"):
        assert tested.isdisjoint(question_key([row["question"]]) for row in task.rows[split])


@needs_data
def test_boolq_is_tested_on_its_validation_split():
    settings = TaskSettings(name="boolq", data=SHARED / "boolq", max_train=20, validation=10, max_test=5)
    task = load_task(settings, seed=0)
    assert (len(task.train), len(task.validation), task.test_size, len(task.rows["test"])) == (20, 10, 5, 3270)
    assert {example.completion for example in task.train + task.validation} == {" no", " yes"}
    scored = requests(task, "validation")
    for index, (row, example) in enumerate(zip(task.rows["validation"], task.validation, strict=True)):
        assert scored[2 * index + row["label"]].args == (example.prompt, example.completion)


def test_an_answer_is_right_though_a_blank_stands_before_it(folder):
    """A completion begins with the delimiter, and most tokenizers give it back: ' 201' is the right answer."""
    task = load(folder)
    assert set(full_marks(task, "test", 8)) == {1.0}


@pytest.mark.parametrize(
    ("change", "score"),
    [
        ({"filter_list": [{"name": "none", "filter": [{"function": "take_first"}]}]}, "gives ' 201', and the target"),
        ({"target_delimiter": "\n"}, "''"),
        ({"doc_to_target": "It is {{answer}}", "generation_kwargs": {"until": [" is"]}}, "' It'"),
    ],
)
def test_a_task_whose_own_answers_score_nothing_is_refused(folder, change, score):
    (folder / "task.yaml").write_text(yaml.safe_dump(TASK | change))
    with pytest.raises(PhoenixError, match=rf"task.yaml: right answers score 0: .*{score}.*; change doc_to_target"):
        load(folder)


def test_a_filter_that_some_answers_pass_is_let_through(folder):
    digits = [{"function": "regex", "regex_pattern": r"(\d*[02468])$"}, {"function": "take_first"}]
    (folder / "task.yaml").write_text(yaml.safe_dump(TASK | {"filter_list": [{"name": "even", "filter": digits}]}))
    assert set(full_marks(load(folder), "test", 8)) == {0.0, 1.0}


DOCUMENTED = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", range(DOCUMENTED.count("```yaml")))
def test_the_tasks_in_the_documentation_are_tasks(tmp_path, number):
    (tmp_path / "task.yaml").write_text(DOCUMENTED.split("```yaml\n")[number + 1].split("```")[0])
    for split, first, count in (("train", 0, 20), ("validation", 100, 6), ("test", 200, 8)):
        content = [
            row | {"answer": f"It is #### {row['answer']}", "choices": ["one", row["answer"]], "label": 1}
            for row in rows(first, count)
        ]
        write_split(tmp_path, split, content)
    task = load(tmp_path)
    assert (len(task.train), len(task.validation), task.test_size) == (20, 6, 8)
    assert task.train[0].completion in (" It is #### 1", " 1")


def test_loading_a_task_says_nothing(folder, capfd):
    load(folder)
    assert capfd.readouterr() == ("", "")
