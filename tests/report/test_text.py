"""How figures are written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.report.records import Accuracy, Allocation
from phoenix_sparse.report.text import (
    accuracy,
    difference,
    ending,
    flatten,
    percent,
    pruning,
    scaled,
    seconds,
    size,
    times,
)


def measured(value: float, stderr: float | None) -> Accuracy:
    return Accuracy(accuracy=value, stderr=stderr, metric="acc", task="t", split="test", examples=10, num_fewshot=0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.0%"), (1, "100.0%"), (0.5, "50.0%"), (0.12345, "12.3%"), (0.99999, "99.999%"), (0.000002, "0.0002%")],
)
def test_percent(value: float, text: str) -> None:
    assert percent(value) == text


@given(st.floats(1e-6, 1 - 1e-6))
def test_percent_keeps_nearly_all_apart_from_all(share: float) -> None:
    assert percent(share) not in ("100.0%", "0.0%")
    assert float(percent(share).rstrip("%")) == pytest.approx(100 * share, abs=0.0501)


def test_accuracy() -> None:
    assert accuracy(None) == "not measured"
    assert accuracy(measured(0.4117, 0.0136)) == "41.2% ± 1.4"
    assert accuracy(measured(0.4117, None)) == "41.2%"


def test_a_paired_difference_has_its_own_error() -> None:
    assert difference(measured(0.42, 0.04), measured(0.30, 0.03), (0.12, 0.021)) == "+12.0 ± 2.1 points"


def test_only_the_end_of_a_long_prompt_is_shown() -> None:
    assert ending(" a question ") == "a question"
    assert ending("x" * 500 + "?", 10) == "… " + "x" * 9 + "?"


def test_difference_adds_the_variances() -> None:
    assert difference(measured(0.30, 0.03), measured(0.42, 0.04)) == "−12.0 ± 5.0 points"
    assert difference(measured(0.42, None), measured(0.30, 0.04)) == "+12.0 points"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (1234, "1.23 k"), (999_900, "1 M"), (5.67e12, "5.67 T"), (2e15, "2 P")],
)
def test_scaled(value: float, text: str) -> None:
    assert scaled(value) == text


@given(st.floats(1, 1e17))
def test_scaled_is_the_value_to_three_digits(value: float) -> None:
    number, _, prefix = scaled(value).partition(" ")
    factor = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}[prefix]
    assert float(number) * factor == pytest.approx(value, rel=0.0051)
    assert "e" not in number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not measured"),
        (0.04, "0.0 s"),
        (59.9, "59.9 s"),
        (59.96, "1 min 00 s"),
        (3599.7, "1 h 00 min"),
        (7325, "2 h 02 min"),
    ],
)
def test_seconds(value: float | None, text: str) -> None:
    assert seconds(value) == text


def test_size_and_times() -> None:
    assert [size(0), size(1023), size(1536), size(8 * 2**30)] == ["0 bytes", "1023 bytes", "1.5 KiB", "8.0 GiB"]
    assert [times(None), times(1.847)] == ["–", "1.85×"]


def test_flatten() -> None:
    settings = {"a": {"b": 1, "c": {"d": [1, "x"], "e": {}}}, "f": None, "g": True}
    assert list(flatten(settings)) == [
        ("a.b", "1"),
        ("a.c.d", "1, x"),
        ("a.c.e", "{}"),
        ("f", "none"),
        ("g", "true"),
    ]


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({}, "allocation uniform"),
        (
            {
                "importance": "wanda",
                "update": "none",
                "pattern": "2:4",
                "calibration_sequences": 128,
                "calibration_length": 2048,
            },
            "importance wanda, pattern 2:4, allocation uniform, measured on 128 sequences of 2,048 tokens",
        ),
        (
            {"importance": "wanda", "update": "alps", "pattern": "unstructured", "method": "owl"},
            "update alps, pattern unstructured, allocation owl",
        ),
        (
            {"importance": "ria", "update": "sparsegpt", "pattern": "unstructured", "method": "evolutionary"},
            "importance ria (in the search), update sparsegpt, pattern unstructured, allocation evolutionary",
        ),
        (
            {"importance": "taylor", "update": "dsnot", "pattern": "unstructured", "calibration_examples": 64},
            "importance taylor, update dsnot, pattern unstructured, allocation uniform, gradients of 64 examples",
        ),
        (
            {"importance": "magnitude", "update": "none", "pattern": "unstructured", "group": "global"},
            "importance magnitude, pattern unstructured, allocation by one threshold for all layers",
        ),
        ({"pattern": "16x1", "method": "explicit"}, "pattern 16x1, allocation written down"),
    ],
)
def test_pruning_is_said_in_words(facts, text) -> None:
    assert pruning(Allocation.model_validate({"sparsity": 0.5, "method": "uniform", "layers": {}} | facts)) == text
