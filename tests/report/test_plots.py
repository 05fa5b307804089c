"""Plots show the values that they are given."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phoenix_sparse.report.plots import accuracy_plot, loss_plot, search_plot, sparsity_plot
from phoenix_sparse.report.records import Accuracy, Search, Tune


def texts(svg: str | None) -> list[str]:
    assert svg is not None
    return [found.strip() for found in re.findall(r"<text[^>]*>(.*?)</text>", svg, flags=re.DOTALL)]


def measured(accuracy: float, stderr: float | None) -> Accuracy:
    return Accuracy(accuracy=accuracy, stderr=stderr, metric="acc", task="t", split="test", examples=10, num_fewshot=0)


@pytest.mark.parametrize("values", [(0.0, None), (1.0, 0.0), (0.5, 0.3)])
def test_accuracy(values: tuple[float, float | None]) -> None:
    found = texts(accuracy_plot({"dense": measured(*values), "tuned": measured(0.25, 0.01)}))
    assert {"Dense base", "Sparse, tuned, merged", "25.0% ± 1.0", f"{100 * values[0]:.1f}%"} <= {
        text if "±" not in text or "25" in text else text.split(" ±")[0] for text in found
    }
    assert "Dense LoRA" not in found
    # An accuracy ends at 100 %: the axis has no number above it.
    assert max(float(text) for text in found if text.replace(".", "").isdigit()) <= 100


def test_sparsity_prints_every_cell() -> None:
    cells = {
        f"model.layers.{block}.mlp.{name}": (block * 2 + row) / 10
        for block in range(3)
        for row, name in enumerate(("up_proj", "fc2"))
    }
    found = texts(sparsity_plot(cells))
    assert {"up", "fc2", "0", "1", "2"} <= set(found)
    assert {f"{100 * value:.1f}" for value in cells.values()} <= set(found)


@pytest.mark.parametrize(
    "names", [[], ["lm_head"], ["a.0.b.up", "a.0.c.up"], [f"layers.0.linear{index}" for index in range(9)]]
)
def test_sparsity_without_a_grid_has_no_plot(names: list[str]) -> None:
    assert sparsity_plot(dict.fromkeys(names, 0.5)) is None


@pytest.mark.parametrize("steps", [1, 2, 61, 500])
def test_loss(steps: int) -> None:
    tune = Tune.model_validate({"log": [{"step": step, "loss": 2.0} for step in range(1, steps + 1)]})
    found = texts(loss_plot({"tuned": tune}))
    assert {"Sparse, tuned", "optimizer step", "training loss"} <= set(found)
    assert "Dense LoRA" not in found


def test_no_loss_has_no_plot() -> None:
    assert loss_plot({"tuned": Tune.model_validate({"log": [{"step": 1, "loss": None}]})}) is None
    assert loss_plot({}) is None


@given(count=st.integers(1, 30), parameters=st.integers(0, 10**9), stderr=st.none() | st.floats(0, 0.1))
@settings(deadline=None, max_examples=10)
def test_search_marks_each_candidate(count: int, parameters: int, stderr: float | None) -> None:
    candidate: dict[str, Any] = {"origin": "nsga2", "ranks": {}, "accuracy": 0.5, "stderr": stderr}
    search = Search.model_validate(
        {
            "space": [8],
            "method": "nsga2",
            "budget": count,
            "validation_examples": 4,
            "candidates": [{"id": index, "parameters": parameters + index, **candidate} for index in range(count)],
            "front": [0],
            "choice": 0,
            "rule": "the only one",
        }
    )
    svg = search_plot(search)
    assert {"candidate", "front", "choice", "validation accuracy, %"} <= set(texts(svg))
    # The candidates' markers are uses of one path: `count` of them, and one in the legend.
    collection = re.search(r'id="search-PathCollection_1">(.*?)</g>\s*</g>', svg, flags=re.DOTALL)
    assert collection is not None
    assert collection[1].count("<use") == count
