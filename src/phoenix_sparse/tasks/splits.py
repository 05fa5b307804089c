"""Who trains, who validates, who tests: pure functions over rows of a task, each with its question's key.

A key is the question's text in small letters without punctuation and blanks, so that copies of one question that
differ in spelling only count as the same.
"""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]
Key = Callable[[Row], str]


def question_key(texts: Iterable[Any]) -> str:
    """The normalised text of a question that may consist of several fields."""
    return " ".join(" ".join(re.findall(r"\w+", str(text).casefold())) for text in texts)


def without(rows: list[Row], others: Iterable[Row], key: Key) -> list[Row]:
    """The rows whose question isn't among the others."""
    known = {key(row) for row in others}
    return [row for row in rows if key(row) not in known]


def hold_out(rows: list[Row], share: float, key: Key) -> tuple[list[Row], list[Row]]:
    """Split rows into (kept, held out) by a hash of the question.

    The seed plays no part: every run of a task must be tested on the same examples. Copies of a question have one
    hash and go to the same side.
    """
    order = sorted({key(row) for row in rows}, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    chosen = set(order[: round(share * len(order))])
    return [row for row in rows if key(row) not in chosen], [row for row in rows if key(row) in chosen]


def carve(rows: list[Row], count: int, key: Key, seed: int) -> tuple[list[Row], list[Row]]:
    """Take `count` random rows out: (kept, taken). Only questions that stand once are taken, so none is in both."""
    copies = Counter(key(row) for row in rows)
    single = [index for index, row in enumerate(rows) if copies[key(row)] == 1]
    taken = sample(single, count, seed)
    chosen = set(taken)
    return [row for index, row in enumerate(rows) if index not in chosen], [rows[index] for index in taken]


def sample(items: list[Any], count: int | None, seed: int) -> list[Any]:
    """A random sample in the order of the whole; everything where `count` is None or not below the whole."""
    if count is None or count >= len(items):
        return items
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), count))]
