"""The multiple-choice tasks that are lm-eval's own: what is trained on is what lm-eval scores."""

import json

import pytest

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.tasks import TaskSettings, load_task
from phoenix_sparse.tasks.definition import load_definition

LETTERS = {"text": ["wood", "air", "milk", "iron"], "label": ["A", "B", "C", "D"]}
NUMBERS = {"text": ["wood", "air"], "label": ["1", "2"]}


def arc(number):
    choices = NUMBERS if number % 2 else LETTERS
    return {"question": f"What is log {number}?", "choices": choices, "answerKey": choices["label"][number % 2]}


ROWS = {
    "arc_easy": arc,
    "arc_challenge": arc,
    "openbookqa": lambda n: {"question_stem": f"Log {n} is made of", "choices": LETTERS, "answerKey": "ABCD"[n % 4]},
    "piqa": lambda n: {"goal": f"cut log {n}", "sol1": "with a saw", "sol2": "with a spoon", "label": n % 2},
    "boolq": lambda n: {"passage": f"Log {n} floats.", "question": f"does log {n} float", "label": n % 2},
    "hellaswag": lambda n: {
        "activity_label": "Sawing",
        "ctx_a": f"A man saws log {n}. [title] Then",
        "ctx_b": "he",
        "endings": ["sings [laughs] loudly.", "rests.", "[step] saws on.", "sleeps."],
        "label": str(n % 4),
    },
    "winogrande": lambda n: {
        "sentence": f"Ann gave Eve log {n}, so _ had it.",
        "option1": "Ann",
        "option2": "Eve",
        "answer": str(n % 2 + 1),
    },
}


@pytest.fixture
def load(tmp_path):
    def loaded(name, rows=None, **settings):
        rows = rows or ROWS[name]
        config = load_definition(name).config
        splits = {config["training_split"]: range(8), config["validation_split"]: range(8, 12)}
        if config.get("test_split"):
            splits[config["test_split"]] = range(12, 16)
        for split, numbers in splits.items():
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(rows(n)) + "\n" for n in numbers))
        return load_task(TaskSettings(name=name, data=tmp_path, validation=2, **settings), seed=0)

    return loaded


@pytest.mark.parametrize("name", ROWS)
def test_the_completion_is_what_lm_eval_scores(load, name):
    """Of an example, prompt and completion are the request whose likelihood lm-eval wants highest."""
    task = load(name)
    harness = task.harness_task("validation")
    assert len(task.validation) == 2
    for document, example in zip(harness.validation_docs(), task.validation, strict=True):
        context = harness.fewshot_context(document, num_fewshot=0)
        requests = harness.construct_requests(document, context, metadata=(name, 0, 1))
        gold = harness.doc_to_text(document) if harness.multiple_input else harness.doc_to_target(document)
        gold = gold if isinstance(gold, int) else harness.doc_to_choice(document).index(gold)
        scored = [request.args for request in requests]
        assert scored[gold] == (example.prompt, example.completion)
        assert len({continuation for _, continuation in scored}) > 1 or len({context for context, _ in scored}) > 1


def test_hellaswag_is_cleaned_up_as_lm_eval_does_it(load):
    task = load("hellaswag")
    texts = [example.prompt + example.completion for example in task.train + task.validation]
    assert all(text.startswith("Sawing: A man saws log ") for text in texts)
    assert all(". Then He" in text and "[" not in text for text in texts)


def test_winogrande_fills_the_right_name_in(load):
    task = load("winogrande")
    for example in task.train:
        number = int(example.prompt.split("log ")[1].split(",")[0])
        assert example.prompt.endswith(f", so {['Ann', 'Eve'][number % 2]}")
        assert example.completion == " had it."


@pytest.mark.parametrize("name", ["hellaswag", "winogrande"])
def test_a_missing_field_is_told_by_the_name_it_is_stored_under(load, name):
    field = {"hellaswag": "ctx_b", "winogrande": "option2"}[name]
    with pytest.raises(PhoenixError, match=f"jsonl:1: the field '{field}'"):
        load(name, rows=lambda n: {key: value for key, value in ROWS[name](n).items() if key != field})


def test_a_goal_with_other_solutions_is_another_question(load):
    def rows(number):
        return {"goal": "cut a log", "sol1": f"with saw {number % 10}", "sol2": "with a spoon", "label": 0}

    assert load("piqa", rows=rows).dropped_overlap == 2  # of the tested 8 to 11, two have the solutions of 0 and 1
