"""The pre-training text: right sums, never the task's form, the same for the same key."""

import itertools
import re

import pytest

from phoenix_sparse.demo.language import FORBIDDEN, KINDS, documents
from phoenix_sparse.demo.stories import draw_event, draw_numbers
from phoenix_sparse.demo.words import MOST, OPERATIONS, Dice

SUM = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(itertools.islice(documents("test"), 20_000))


def test_no_text_has_the_tasks_form(texts):
    assert "###" in FORBIDDEN
    for text in texts:
        assert not any(form in text for form in FORBIDDEN), text
        assert not SUM.search(text.partition("How many")[2]), "a question is never followed by worked sums"


def test_every_sum_is_right(texts):
    found = 0
    for text in texts:
        for left, sign, right, result in SUM.findall(text):
            found += 1
            values = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}
            assert values.get(sign, int(left) / int(right)) == int(result), text
    assert found > len(texts) / 2


def test_words_for_sums_are_right(texts):
    signs = {"plus": "+", "minus": "-", "times": "*", "divided by": "/"}
    pattern = re.compile(r"(\d+) (plus|minus|times|divided by) (\d+) is (\d+)")
    found = [match for text in texts for match in pattern.findall(text)]
    assert {word for _, word, _, _ in found} == set(signs)
    for left, word, right, result in found:
        assert OPERATIONS[signs[word]](int(left), int(right)) == int(result)


def test_every_field_is_filled(texts):
    assert not any(mark in text for text in texts for mark in "{}")


def test_text_follows_from_the_key(texts):
    assert list(itertools.islice(documents("test"), 100)) == texts[:100]
    assert list(itertools.islice(documents("other"), 100)) != texts[:100]


def test_documents_are_short(texts):
    assert all(0 < len(text) < 600 for text in texts)


@pytest.mark.parametrize("kind", sorted(set(KINDS), key=lambda kind: kind.__name__))
def test_every_kind_varies(kind):
    dice = Dice(kind.__name__)
    assert len({kind(dice) for _ in range(50)}) > 40


@pytest.mark.parametrize("sign", sorted(OPERATIONS))
def test_drawn_numbers_have_a_result_in_range(sign):
    dice = Dice(sign)
    for _ in range(2000):
        a, b = draw_numbers(dice, sign)
        assert min(a, b) >= 2
        assert 2 <= OPERATIONS[sign](a, b) <= MOST
        assert sign != "/" or a % b == 0


@pytest.mark.parametrize("state", range(2, MOST + 1))
def test_events_keep_a_quantity_in_range(state):
    dice = Dice(str(state))
    for _ in range(50):
        _, sign, number = draw_event(dice, state)
        assert 2 <= OPERATIONS[sign](state, number) <= MOST
        assert sign != "/" or state % number == 0
