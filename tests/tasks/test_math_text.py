import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.tasks.math_text import (
    INVALID,
    filter_flexible,
    filter_strict,
    flexible_answer,
    numbers_agree,
    read_number,
    score_number,
    strict_answer,
    tidy_expression,
    tidy_number,
    worked_answer,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e12, max_value=1e12)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (22.0, "22"),
        (18, "18"),
        ("1,000", "1000"),
        (1.8333333333333335, "1.833"),
        (0.6666666666666666, "0.6667"),
        (-0.04545, "-0.04545"),
        (0.0, "0"),
        (-0.0, "0"),
        (100.0, "100"),
        (0.99999, "1"),
        (117094.56, "117094.56"),
        (1e-7, "0.0000001"),
    ],
)
def test_tidy_number(value, text):
    assert tidy_number(value) == text


@pytest.mark.parametrize("value", [math.nan, math.inf, "eight", "", True, None])
def test_tidy_number_refuses(value):
    with pytest.raises(ValueError, match="not a number"):
        tidy_number(value)


@given(FINITE)
def test_the_written_number_agrees_with_the_number(value):
    written = tidy_number(value)
    assert numbers_agree(float(written), value)
    assert "e" not in written
    assert tidy_number(written) == written


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**6))
def test_another_whole_number_is_another_answer(gold, distance):
    assert not numbers_agree(gold + distance, gold)
    assert numbers_agree(float(gold), gold)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("18.0", 18),
        ("1,000", 1000),
        ("$18", 18),
        ("-3.5", -3.5),
        ("−7", -7),
        ("$ 2.50", 2.5),
        ("3/4", 0.75),
    ],
)
def test_read_number(text, value):
    assert read_number(text) == value


@pytest.mark.parametrize("text", ["", INVALID, "1/0", "nan", "inf", "--5", "9" * 400])
def test_read_number_finds_none(text):
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (" 3 * 6 = 18. The answer is 18.", 18, 18),
        (" 3 * 6 = 18. The answer is 18.0", 18, 18),
        ("The answer is $1,234.50 dollars.", 1234.5, 1234.5),
        ("the answer is: -5 apples", -5, -5),
        ("The answer is 3/4.", 0.75, 4),
        ("The answer is 7. The answer is 8.", 7, 8),
        ("so 12 - 5 = 7", None, 7),
        ("10-5", None, 5),
        ("it fell to −4 degrees", None, -4),
        ("(6)-2", None, 2),
        ("1,000, 2,000", None, 2000),
        ("between 3 and .5", None, 0.5),
        ("1,2", None, 2),
        ("12345,678", None, 678),
        ("no number", None, None),
        ("The answer is unknown, maybe 4", None, 4),
        ("", None, None),
    ],
)
def test_numbers_in_text(text, strict, flexible):
    assert read_number(strict_answer(text)) == strict
    assert read_number(flexible_answer(text)) == flexible


@given(FINITE, FINITE)
def test_both_ways_find_the_number_of_a_completion(first, answer):
    text = f" {tidy_number(first)} = {tidy_number(answer)}. The answer is {tidy_number(answer)}."
    assert strict_answer(text) == flexible_answer(text) == tidy_number(answer)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("((22.0-14.0)/4.0)", "(22 - 14) / 4"),
        ("3*6", "3 * 6"),
        ("( ( 4.0 + 13.0 ) * 15.0 )", "(4 + 13) * 15"),
        ("3-1.1666666666666667", "3 - 1.167"),
        ("(4.0+-3.0)/2.0", "(4 + -3) / 2"),
        ("8.0-(3.0-2.0)", "8 - (3 - 2)"),
        ("2.0x + 3.0", "2x + 3"),
        ("05+1", "5+1"),
        ("__import__('os').system('echo')", "__import__('os').system('echo')"),
    ],
)
def test_tidy_expression(source, text):
    assert tidy_expression(source) == text


_EXPRESSION = st.recursive(
    st.integers(0, 999).map(lambda number: f"{number}.0"),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda parts: f"({''.join(parts)})"),
    max_leaves=6,
)


@given(_EXPRESSION)
def test_tidying_keeps_the_value(expression):
    assert eval(tidy_expression(expression)) == eval(expression)


@pytest.mark.parametrize(
    ("equation", "answer", "text"),
    [
        ("X=((22.0-14.0)/4.0)", 2, "(22 - 14) / 4 = 2. The answer is 2."),
        ("miles=4.0/30.0*48.0", 6.4, "4 / 30 * 48 = 6.4. The answer is 6.4."),
        ("( 4.0 - 3.0 )", 1.0, "4 - 3 = 1. The answer is 1."),
        ("(6.0+x)*(x-6.0)=189.0", -15, "(6 + x) * (x - 6) = 189. The answer is -15."),
        ("7=3+X", 4, "7 = 3 + x. The answer is 4."),
    ],
)
def test_worked_answer(equation, answer, text):
    assert worked_answer({"equation": equation, "answer": answer}) == text
    assert worked_answer({"Equation": equation, "Answer": str(answer)}) == text


@pytest.mark.parametrize("doc", [{"equation": "x=", "answer": 1}, {"equation": "x=1", "answer": "one"}])
def test_worked_answer_refuses(doc):
    with pytest.raises(ValueError, match=r"empty side|not a number"):
        worked_answer(doc)


@pytest.mark.parametrize("said", ["18", "18.0", "$18", "18.0004"])
def test_score(said):
    assert score_number({"answer": 18.0}, [said]) == {"exact_match": 1.0}


@pytest.mark.parametrize("said", ["19", "18.01", "-18", "1,018", INVALID])
def test_score_of_a_wrong_answer(said):
    assert score_number({"answer": 18.0}, [said]) == {"exact_match": 0.0}


def test_filters_keep_the_shape_of_the_responses():
    responses = [["The answer is 3.", "4"], ["none"]]
    assert filter_strict(responses, None) == [["3", INVALID], [INVALID]]
    assert filter_flexible(responses, None) == [["3", "4"], [INVALID]]
