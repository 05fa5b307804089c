"""Tables in the terminal."""

import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.report import bench_tables, build_report, compare_table, flops_table, plan_table, summary_table
from phoenix_sparse.report.run_rows import run_row

Write = Callable[[dict[str, Any]], Path]


def printed(table: Table) -> str:
    stream = StringIO()
    Console(file=stream, width=100).print(table)
    return stream.getvalue()


def test_summary(files: dict[str, Any], write_run: Write) -> None:
    text = printed(summary_table(write_run(files)))
    for expected in ("41.2% ± 1.4", "12.0% ± 0.9", "42.5% ± 1.4", "3.2% ± 0.5", "50.1%", "dense LoRA", "×)"):
        assert expected in text
    assert "not measured" not in text


def test_examples_that_were_too_long_are_told(files: dict[str, Any], write_run: Write) -> None:
    assert "left out" not in printed(summary_table(write_run(files)))
    files["tune.json"]["examples_left_out"] = 0
    assert "left out" not in printed(summary_table(write_run(files)))
    files["tune.json"]["examples_left_out"] = 1234
    directory = write_run(files)
    train = f"{files['manifest.json']['inputs']['task']['train']:,}"
    words = f"1,234 of {train}, too long for finetune.max_length"
    text = " ".join(printed(summary_table(directory)).split())
    assert f"training examples left out │ {words}" in text
    build_report(directory)
    assert f"Training examples left out: {words}." in (directory / "report.html").read_text()
    assert "Training examples left out: 1,234 of" in (directory / "README.md").read_text()
    assert run_row(directory)["train_examples_left_out"] == 1234


def test_nothing_is_filled_in(files: dict[str, Any], write_run: Write) -> None:
    text = printed(summary_table(write_run({"manifest.json": files["manifest.json"]})))
    assert text.count("not measured") == 8
    assert "%" not in text


def test_a_name_is_no_markup(files: dict[str, Any], write_run: Write) -> None:
    files["manifest.json"]["name"] = "[red]run[/red] [/nothing]"
    assert "[red]run[/red] [/nothing]" in printed(summary_table(write_run(files)))


def test_not_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(PhoenixError, match="give a run directory"):
        summary_table(tmp_path)


def test_flops(files: dict[str, Any]) -> None:
    counted = files["flops.json"]
    text = printed(flops_table(counted))
    assert f"{counted['decode']['total']['reduction']:.2f}×" in text
    assert "a prompt of 1,024 tokens: total" in text
    with pytest.raises(PhoenixError, match="decode"):
        flops_table({key: value for key, value in counted.items() if key != "decode"})


def test_plan() -> None:
    figures = {
        "model": {"parameters": 8_030_261_248, "layers": 224},
        "memory_bytes": {"weights": 3 * 2**30},
        "seconds": {"training, at least": 7325.0},
    }
    text = printed(plan_table(figures))
    for expected in ("8.03 G", "224", "3.0 GiB", "2 h 02 min", "memory", "time", "training, at least"):
        assert expected in text


def test_comparison() -> None:
    def score(accuracy: float) -> dict[str, Any]:
        where = {"metric": "acc,none", "task": "t", "split": "validation", "examples": 9, "num_fewshot": 0}
        return {"accuracy": accuracy, "stderr": 0.014, **where}

    done = {"sparsity": 0.5, "rank_before": 2, "rank_after": 1, "pruning_seconds": 65.0}
    entries = [
        {"spec": "wanda+owl", "before": score(0.123), "after": score(0.456), **done},
        {"spec": "[b]16x1", "error": "it does not divide"},
    ]
    text = printed(compare_table({"split": "validation", "specs": entries}))
    for expected in ("validation split", "wanda+owl", "50.0%", "12.3% ± 1.4", "2.", "45.6% ± 1.4", "1.", "1 min 05 s"):
        assert expected in text
    assert "[b]16x1" in text
    assert "failed" in text


def test_bench_tables_keep_their_brackets():
    spread = {"median": 9.0, "low": 8.0, "high": 10.0}
    both = {"tokens_per_second": {"dense": spread, "sparse": spread}, "ratio": 1.0}
    kind = {"seconds": spread, "weight_bytes": 8, "bandwidth_share": 0.5}
    record = {
        **{"model": "m", "dtype": "float32", "values": "int8", "threads": 1},
        "weight_bytes": {"dense": 2048, "sparse": 1024},
        "throughput": [{"batch": 1, "prefill": both, "decode": both}],
        "layers": [{"shape": [4, 2], "batch": 1, "bandwidth": 1e9, "kinds": {"sparse": kind, "torch int8": kind}}],
    }
    text = "".join(printed(table) for table in bench_tables(record))
    assert text.count("[quartiles]") == 2
    assert re.search(r"float32, 1\s+thread\s", text)
    assert "peak" not in text  # which is known on a GPU alone
    record["throughput"][0]["peak_bytes"] = {"dense": 3 * 2**20, "sparse": 2**20}
    text = "".join(printed(table) for table in bench_tables(record))
    assert "3.0 MiB" in text
    assert "1.0 MiB" in text
    assert "9.0 [8.0–10.0]" in text
    assert "1.00x" in text
