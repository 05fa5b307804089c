"""The demo's task: the committed files, the splits' disjointness, the arithmetic of the answers."""

import json
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.demo import task_directory
from phoenix_sparse.demo.task import SIZES, TEMPLATES, Problem, draw, make_problems, split_of, write_task
from phoenix_sparse.demo.words import MEN, WOMEN, Dice

SUM = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
NAMES = re.compile(r"\b(" + "|".join(WOMEN + MEN) + r")\b")


def read(split: str) -> list[dict[str, str]]:
    lines = (task_directory() / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def evaluate(left: str, sign: str, right: str) -> Fraction:
    a, b = Fraction(left), Fraction(right)
    return {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]


def check_answer(question: str, answer: str) -> None:
    """Every step is one right sum, fed by the question and by earlier steps; the last result is the answer."""
    *steps, last = answer.split("\n")
    known = set(re.findall(r"\d+", question)) | ({"2"} if "half" in question else set())
    unused = set(known)
    for step in steps:
        [(left, sign, right, result)] = SUM.findall(step)
        assert evaluate(left, sign, right) == int(result), step
        assert {left, right} <= known, step
        assert int(result) >= 2
        known.add(result)
        unused -= {left, right}
    assert not unused, "a number of the question is used by no step"
    assert last == f"#### {result}"
    assert 2 <= len(steps) <= 3


def test_the_committed_files_are_what_the_generator_makes(tmp_path):
    write_task(tmp_path)
    for split in SIZES:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (task_directory() / f"{split}.jsonl").read_bytes()


def test_sizes_and_fields():
    for split, size in SIZES.items():
        records = read(split)
        assert len(records) == size
        assert all(set(record) == {"question", "answer"} for record in records)


def test_every_committed_answer_is_right():
    for split in SIZES:
        for record in read(split):
            check_answer(**record)


@given(st.sampled_from(TEMPLATES), st.integers())
def test_every_template_makes_right_answers(template, seed):
    problem = draw(template, Dice(str(seed)))
    check_answer(problem.question, problem.answer)
    assert "{" not in problem.question + problem.answer
    assert [" ".join((left, sign, right, "=", n)) for left, sign, right, n in SUM.findall(problem.answer)] == list(
        problem.sums
    )


def test_a_wrong_answer_is_found():
    question = "Mia had 4 pens. She found 3 more and gave 2 to Ben. How many pens does Mia have now?"
    check_answer(question, "Mia had 4 + 3 = 7 pens.\nShe kept 7 - 2 = 5 pens.\n#### 5")
    for wrong in (
        "Mia had 4 + 3 = 8 pens.\nShe kept 8 - 2 = 6 pens.\n#### 6",
        "Mia had 4 + 3 = 7 pens.\nShe kept 7 - 2 = 5 pens.\n#### 6",
        "Mia had 4 + 3 = 7 pens.\nShe kept 7 - 3 = 4 pens.\n#### 4",
    ):
        with pytest.raises(AssertionError):
            check_answer(question, wrong)


def test_splits_share_no_sums_and_no_question():
    sums = {split: {tuple(SUM.findall(record["answer"])) for record in read(split)} for split in SIZES}
    texts = {split: {NAMES.sub("NAME", record["question"]) for record in read(split)} for split in SIZES}
    for found in (sums, texts):
        assert not found["train"] & found["test"]
        assert not found["train"] & found["validation"]
        assert not found["validation"] & found["test"]


def test_no_problem_stands_twice_in_a_split():
    for split, problems in make_problems(seed=3).items():
        keys = [(problem.template, problem.sums) for problem in problems]
        assert len(set(keys)) == len(keys) == SIZES[split]
        assert all(split_of(problem.sums) == split for problem in problems)


def test_every_template_is_in_every_split():
    for problems in make_problems().values():
        assert {problem.template for problem in problems} == {template.name for template in TEMPLATES}


def test_the_seed_decides():
    assert make_problems(1) == make_problems(1)
    assert make_problems(1) != make_problems(2)


def test_names_of_templates_differ():
    assert len({template.name for template in TEMPLATES}) == len(TEMPLATES) >= 12
    assert isinstance(draw(TEMPLATES[0], Dice("x")), Problem)
