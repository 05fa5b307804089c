from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.tasks.splits import carve, hold_out, question_key, sample, without

ROWS = st.lists(st.integers(0, 30), min_size=1, max_size=40).map(
    lambda numbers: [{"q": str(number), "id": index} for index, number in enumerate(numbers)]
)


def key(row):
    return row["q"]


def test_question_key_overlooks_spelling():
    assert question_key(["How many  apples , in TOTAL ?"]) == question_key(["how many apples, in total?"])
    assert question_key(["How many apples?"]) != question_key(["How many pears?"])
    assert question_key(["3 apples"]) != question_key(["4 apples"])


@given(ROWS, ROWS)
def test_without(rows, others):
    left = without(rows, others, key)
    assert {key(row) for row in left}.isdisjoint(key(row) for row in others)
    assert [row for row in rows if row not in left] == [row for row in rows if key(row) in {key(o) for o in others}]


@given(ROWS, st.floats(0.05, 0.95))
def test_hold_out_parts_the_rows_by_question(rows, share):
    kept, held = hold_out(rows, share, key)
    assert sorted(row["id"] for row in kept + held) == [row["id"] for row in rows]
    assert {key(row) for row in kept}.isdisjoint(key(row) for row in held)
    questions = len({key(row) for row in rows})
    assert len({key(row) for row in held}) == round(share * questions)


def test_hold_out_stays_the_same_when_rows_are_shuffled():
    rows = [{"q": str(number)} for number in range(50)]
    held = hold_out(rows, 0.3, key)[1]
    assert sorted(map(key, hold_out(rows[::-1], 0.3, key)[1])) == sorted(map(key, held))
    assert held != rows[:15]


@given(ROWS, st.integers(0, 50), st.integers(0, 5))
def test_carve(rows, count, seed):
    kept, taken = carve(rows, count, key, seed)
    assert sorted(row["id"] for row in kept + taken) == [row["id"] for row in rows]
    assert {key(row) for row in kept}.isdisjoint(key(row) for row in taken)
    single = [row for row in rows if sum(key(row) == key(other) for other in rows) == 1]
    assert len(taken) == min(count, len(single))
    assert (kept, taken) == carve(rows, count, key, seed)


def test_seeds_draw_differently():
    rows = [{"q": str(number)} for number in range(100)]
    assert carve(rows, 10, key, 0) != carve(rows, 10, key, 1)
    assert sample(rows, 10, 0) != sample(rows, 10, 1)


@given(st.lists(st.integers()), st.none() | st.integers(0, 20), st.integers(0, 3))
def test_sample_keeps_the_order(items, count, seed):
    numbered = list(enumerate(items))
    drawn = sample(numbered, count, seed)
    assert drawn == sorted(drawn, key=lambda pair: pair[0])
    assert len(drawn) == (len(items) if count is None else min(count, len(items)))
