"""The demo's task: short word problems in GSM8K's form, made by templates.

A record is {"question", "answer"}; the answer's lines are worked steps, the last is `#### n` (Cobbe et al.,
"Training Verifiers to Solve Math Word Problems", https://arxiv.org/abs/2110.14168). A problem belongs to a split by
the hash of its sums alone, so that neither other names nor another template bring a test problem's sums into training.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from phoenix_sparse.demo.words import MOST, OPERATIONS, Dice, cast
from phoenix_sparse.files import write_text

SIZES = {"train": 2000, "validation": 200, "test": 300}
SEED = 7


@dataclass(frozen=True)
class Template:
    """A kind of problem.

    `numbers` gives each number's range. A step is (left, operation, right, sentence): left and right name a number, or
    an earlier step's result as r1, r2, …; `{sum}` in the sentence becomes `left operation right = result`.
    """

    name: str
    numbers: dict[str, tuple[int, int]]
    question: str
    steps: tuple[tuple[str, str, str, str], ...]


@dataclass(frozen=True)
class Problem:
    template: str
    sums: tuple[str, ...]
    question: str
    answer: str


SMALL, MIDDLE, LARGE, TIMES = (2, 12), (3, 30), (10, 50), (2, 9)

TEMPLATES = (
    Template(
        "find_give",
        {"a": MIDDLE, "b": MIDDLE, "c": MIDDLE},
        "{A} had {a} {things}. {She} found {b} more and gave {c} to {B}. How many {things} does {A} have now?",
        (("a", "+", "b", "{A} had {sum} {things}."), ("r1", "-", "c", "{She} kept {sum} {things}.")),
    ),
    Template(
        "two_days",
        {"a": MIDDLE, "b": MIDDLE, "c": MIDDLE},
        "{A} collected {a} {things} on {day} and {b} on {day2}. {She} sold {c} of them. How many {things} are left?",
        (("a", "+", "b", "{A} collected {sum} {things}."), ("r1", "-", "c", "There are {sum} {things} left.")),
    ),
    Template(
        "groups_use",
        {"a": TIMES, "b": TIMES, "c": MIDDLE},
        "{A} has {a} {holders} with {b} {things} in each. {She} uses {c} {things}. How many {things} are left?",
        (("a", "*", "b", "The {holders} hold {sum} {things}."), ("r1", "-", "c", "There are {sum} {things} left.")),
    ),
    Template(
        "groups_more",
        {"a": TIMES, "b": TIMES, "c": MIDDLE},
        "There are {a} {holders} with {b} {things} in each. {A} brings {c} more {things}. "
        "How many {things} are there now?",
        (("a", "*", "b", "The {holders} hold {sum} {things}."), ("r1", "+", "c", "Now there are {sum} {things}.")),
    ),
    Template(
        "colours_share",
        {"a": MIDDLE, "b": MIDDLE, "c": TIMES},
        "{A} had {a} {colour} {things} and {b} {colour2} {things}. {She} shared them equally among {c} {group}. "
        "How many {things} did each get?",
        (("a", "+", "b", "{A} had {sum} {things}."), ("r1", "/", "c", "Each got {sum} {things}.")),
    ),
    Template(
        "more_together",
        {"a": MIDDLE, "b": MIDDLE},
        "{B} has {a} {things}. {A} has {b} more than {B}. How many {things} do they have together?",
        (("a", "+", "b", "{A} has {sum} {things}."), ("a", "+", "r1", "Together they have {sum} {things}.")),
    ),
    Template(
        "fewer_together",
        {"a": LARGE, "b": MIDDLE},
        "{B} has {a} {things}. {A} has {b} fewer than {B}. How many {things} do they have together?",
        (("a", "-", "b", "{A} has {sum} {things}."), ("a", "+", "r1", "Together they have {sum} {things}.")),
    ),
    Template(
        "times_lose",
        {"a": MIDDLE, "b": (2, 5), "c": MIDDLE},
        "{B} had {a} {things}. {A} had {b} times as many as {B} and lost {c}. How many {things} does {A} have now?",
        (("a", "*", "b", "{A} had {sum} {things}."), ("r1", "-", "c", "{She} kept {sum} {things}.")),
    ),
    Template(
        "price_change",
        {"a": (20, 90), "b": TIMES, "c": TIMES},
        "{A} had {a} coins. {She} bought {b} {things} for {c} coins each. How many coins does {A} have left?",
        (("b", "*", "c", "The {things} cost {sum} coins."), ("a", "-", "r1", "{She} has {sum} coins left.")),
    ),
    Template(
        "sell_spend",
        {"a": TIMES, "b": TIMES, "c": MIDDLE},
        "{A} sold {a} {things} for {b} coins each. {She} gave {c} coins to {B}. How many coins does {A} have now?",
        (("a", "*", "b", "{A} got {sum} coins."), ("r1", "-", "c", "{She} kept {sum} coins.")),
    ),
    Template(
        "half_find",
        {"a": LARGE, "b": (2, 2), "c": MIDDLE},
        "{A} had {a} {things}. {She} gave half of them to {B} and then found {c} more. "
        "How many {things} does {A} have now?",
        (("a", "/", "b", "{She} kept {sum} {things}."), ("r1", "+", "c", "Now {A} has {sum} {things}.")),
    ),
    Template(
        "lose_pack",
        {"a": LARGE, "b": MIDDLE, "c": TIMES},
        "{A} had {a} {things} and lost {b}. {She} put the rest equally into {c} {holders}. "
        "How many {things} are in each {holder}?",
        (("a", "-", "b", "{A} kept {sum} {things}."), ("r1", "/", "c", "Each {holder} holds {sum} {things}.")),
    ),
    Template(
        "groups_share",
        {"a": TIMES, "b": TIMES, "c": TIMES},
        "{A} opened {a} {holders} with {b} {things} in each and shared them equally among {c} {group}. "
        "How many {things} did each get?",
        (("a", "*", "b", "{A} had {sum} {things}."), ("r1", "/", "c", "Each got {sum} {things}.")),
    ),
    Template(
        "each_day",
        {"a": LARGE, "b": SMALL, "c": TIMES},
        "{A} had {a} {things}. {She} used {b} each day for {c} days. How many {things} are left?",
        (("b", "*", "c", "{A} used {sum} {things}."), ("a", "-", "r1", "There are {sum} {things} left.")),
    ),
    Template(
        "need_more",
        {"a": MIDDLE, "b": MIDDLE, "c": (20, 90)},
        "{A} wants {c} {things}. {She} has {a} and {B} gives {her} {b} more. How many {things} does {A} still need?",
        (("a", "+", "b", "{A} has {sum} {things}."), ("c", "-", "r1", "{She} still needs {sum} {things}.")),
    ),
    Template(
        "three_events",
        {"a": MIDDLE, "b": MIDDLE, "c": MIDDLE, "d": MIDDLE},
        "{A} had {a} {things}. {She} bought {b}, gave {c} to {B} and found {d}. How many {things} does {A} have now?",
        (
            ("a", "+", "b", "{A} had {sum} {things}."),
            ("r1", "-", "c", "{She} kept {sum} {things}."),
            ("r2", "+", "d", "Now {A} has {sum} {things}."),
        ),
    ),
    Template(
        "two_groups",
        {"a": TIMES, "b": TIMES, "c": TIMES, "d": TIMES},
        "{A} has {a} {holders} with {b} {things} in each. {B} has {c} {holders} with {d} {things} in each. "
        "How many {things} are there in all?",
        (
            ("a", "*", "b", "{A} has {sum} {things}."),
            ("c", "*", "d", "{B} has {sum} {things}."),
            ("r1", "+", "r2", "In all there are {sum} {things}."),
        ),
    ),
    Template(
        "colours_lose_sell",
        {"a": MIDDLE, "b": MIDDLE, "c": MIDDLE, "d": MIDDLE},
        "{A} had {a} {colour} {things} and {b} {colour2} {things}. {She} lost {c} and sold {d}. "
        "How many {things} are left?",
        (
            ("a", "+", "b", "{A} had {sum} {things}."),
            ("r1", "-", "c", "{She} kept {sum} {things}."),
            ("r2", "-", "d", "There are {sum} {things} left."),
        ),
    ),
)


def draw(template: Template, dice: Dice) -> Problem:
    """Draw one problem of a template; numbers whose steps leave 2..MOST or don't divide are drawn again."""
    while (worked := _work(template, {name: dice.between(*span) for name, span in template.numbers.items()})) is None:
        pass
    values, sums = worked
    words: dict[str, object] = {**cast(dice), **values}
    lines = [step[3].format(**words, sum=text) for step, text in zip(template.steps, sums, strict=True)]
    answer = "\n".join([*lines, f"#### {values[f'r{len(sums)}']}"])
    return Problem(template.name, sums, template.question.format(**words), answer)


def _work(template: Template, values: dict[str, int]) -> tuple[dict[str, int], tuple[str, ...]] | None:
    """Compute the steps: all values, and each step as `a + b = c`; None where the numbers don't suit."""
    sums = []
    for index, (left, sign, right, _) in enumerate(template.steps, start=1):
        a, b = values[left], values[right]
        result = OPERATIONS[sign](a, b)
        if not 2 <= result <= MOST or (sign == "/" and a % b):
            return None
        values[f"r{index}"] = result
        sums.append(f"{a} {sign} {b} = {result}")
    return values, tuple(sums)


def split_of(sums: tuple[str, ...]) -> str:
    """The split that a chain of sums belongs to, in the proportions of SIZES."""
    bucket = int.from_bytes(hashlib.sha256(";".join(sums).encode()).digest()[:8], "big") % sum(SIZES.values())
    for split, size in SIZES.items():
        if bucket < size:
            return split
        bucket -= size
    raise AssertionError("a bucket lies below the sum of the sizes")


def make_problems(seed: int = SEED) -> dict[str, list[Problem]]:
    """Make the three splits. No split holds the same template with the same sums twice."""
    dice = Dice(f"task {seed}")
    problems: dict[str, list[Problem]] = {split: [] for split in SIZES}
    seen: set[tuple[str, tuple[str, ...]]] = set()
    while any(len(problems[split]) < size for split, size in SIZES.items()):
        problem = draw(dice.pick(TEMPLATES), dice)
        split = split_of(problem.sums)
        if len(problems[split]) < SIZES[split] and (problem.template, problem.sums) not in seen:
            seen.add((problem.template, problem.sums))
            problems[split].append(problem)
    return problems


def write_task(directory: Path, seed: int = SEED) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl; other files in the directory stay."""
    for split, problems in make_problems(seed).items():
        lines = [json.dumps({"question": problem.question, "answer": problem.answer}) for problem in problems]
        write_text(Path(directory) / f"{split}.jsonl", "\n".join(lines) + "\n")
