"""The analysis over runs: means, intervals, fronts and pairs by hand; pages that show what the files say."""

import csv
import json
import math
import random
import re
import statistics
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from many_runs import accuracy, write_runs
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.report.overview import PAGE, PUBLISHED, SUMMARY, accuracy_table, build_overview, sections
from phoenix_sparse.report.published import FIGURES, beside
from phoenix_sparse.report.run_rows import find_runs, method_name, run_row
from phoenix_sparse.report.series import (
    counted,
    front,
    kind_of_merge,
    mean_and_interval,
    merge_costs,
    seeds_of,
    series,
    student,
    wilson,
)
from phoenix_sparse.report.sweep_plots import flops_plot, method_plot, mode_plot


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=40))
def test_intervals_are_student_s(values):
    mean, half = mean_and_interval(values)
    assert mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    exact = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    assert exact * 0.999 - 1e-9 <= half <= exact * 1.03 + 1e-9


def test_quantiles_are_never_too_small():
    assert all(student(n) >= stats.t.ppf(0.975, n) - 5e-4 for n in range(1, 200))


def test_one_value_has_no_interval():
    assert mean_and_interval([0.3]) == (0.3, None)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=30))
def test_the_front_is_what_nothing_beats(points):
    kept = front(points)
    beaten = {p for p in points if any(o != p and o[0] >= p[0] and o[1] >= p[1] for o in points)}
    assert set(kept) == set(points) - beaten
    assert kept == sorted(kept)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)), max_size=30))
def test_on_the_front_no_point_is_beaten_by_one_of_about_its_own_speed(points):
    kept = front(points, 0.1)
    assert set(kept) <= set(front(points))
    for x, y in kept:
        assert not any(other > y and place >= 0.9 * x for place, other in points)
    for x, y in set(points) - set(kept):
        assert any((place > x and other >= y) or (place >= 0.9 * x and other > y) for place, other in points)


@given(st.integers(1, 400), st.data())
def test_the_interval_of_a_share_is_that_of_the_score_test(examples, data):
    hits = data.draw(st.integers(0, examples))
    low, high = wilson(hits / examples, examples)
    exact = stats.binomtest(hits, examples).proportion_ci(0.95, method="wilson")
    assert (low, high) == (pytest.approx(exact.low, abs=1e-4), pytest.approx(exact.high, abs=1e-4))


def test_one_seed_has_the_interval_of_its_examples_and_several_have_their_own():
    rows = [{"target_sparsity": 0.5, "accuracy": 0.4, "examples": 50}]
    (one,) = series(rows, "accuracy", examples="examples")
    assert (one.low, one.high) == wilson(0.4, 50)
    more = [*rows, rows[0] | {"accuracy": 0.5}, rows[0] | {"target_sparsity": 0.7}]
    two, other = series(more, "accuracy", examples="examples")
    assert (two.low, two.high) == (0, 1)  # of two seeds the interval by Student's t is wider than shares can be
    (wide,) = series(more[:2], "accuracy")
    assert wide.high == pytest.approx(0.45 + mean_and_interval([0.4, 0.5])[1])
    assert other.low is None  # no second kind of interval beside the first


def test_a_series_leaves_out_what_was_not_measured():
    rows = [{"target_sparsity": 0.5, "accuracy": one} for one in (0.1, None, 0.3)]
    rows += [{"target_sparsity": 0.2, "accuracy": 0.4}, {"target_sparsity": 0.9, "accuracy": None}]
    found = series(rows, "accuracy")
    assert [(point.x, point.seeds) for point in found] == [(0.2, 1), (0.5, 2)]
    assert found[0].low is None
    assert found[1].mean == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("sparsify", "name"),
    [
        ({"importance": "wanda"}, "wanda"),
        ({"importance": "wanda", "update": "none", "allocation": "owl", "pattern": "2:4"}, "wanda+owl+2:4"),
        ({"importance": "wanda", "update": "sparsegpt", "allocation": "uniform"}, "sparsegpt"),
        ({"importance": "ria", "update": "dsnot"}, "ria+dsnot"),
        ({"importance": "magnitude", "allocation": [0.1, 0.2], "group": "layer"}, "magnitude+explicit"),
        ({}, "unknown"),
    ],
)
def test_methods_are_named_in_the_words_of_compare(sparsify, name):
    assert method_name(sparsify) == name


def test_merge_costs_pair_runs_that_differ_in_the_mode_alone(tmp_path, files):
    rows = [run_row(one) for one in write_runs(tmp_path, files)]
    random.Random(0).shuffle(rows)
    costs = merge_costs(rows)
    assert len(costs) == 2 * 3 * 2
    for one in costs:
        expected = [
            accuracy(one["method"], mode, one["target_sparsity"], one["seed"]) for mode in ("sparse_to_dense", "")
        ]
        assert one["difference"] == pytest.approx(expected[0] - expected[1])
        assert one["off_mask_nonzeros"] == round(1e5 * one["target_sparsity"])
    alone = merge_costs([row for row in rows if row["mode"] == "sparse_to_dense"])
    assert {one["difference"] for one in alone} == {None}


def test_pages_show_the_runs(tmp_path, files):
    runs = write_runs(tmp_path / "runs", files)
    page = build_overview(tmp_path / "runs", tmp_path / "out", command="phx report runs --out out").read_text()
    rows = list(csv.DictReader((tmp_path / "out" / SUMMARY).open()))
    assert len(rows) == len(runs)
    for row in rows:
        expected = accuracy(row["method"], row["mode"], float(row["target_sparsity"]), int(row["seed"]))
        assert float(row["accuracy"]) == pytest.approx(expected)
        assert row["decode_tokens_per_second"] == ""  # never measured
    assert "<script" not in page
    assert "phx report runs --out out" in page
    for heading in ("Accuracy against sparsity", "Methods at a glance", "What sparse-to-dense costs"):
        assert heading in page
    values = [100 * accuracy("wanda", "sparse_to_sparse", 0.5, seed) for seed in (0, 1)]
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(2)
    assert f"{mean:.1f} ± {error:.1f} (" in page
    assert "means over 2 seeds" in page
    identities = re.findall(r'\bid="([^"]+)"', page)
    assert len(identities) == len(set(identities))
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ET.fromstring(svg)
        assert "%" in svg or "training tokens a second" in svg  # units


def test_an_unfinished_run_is_named_and_left_out(tmp_path, files):
    runs = write_runs(tmp_path / "runs", files)
    (runs[0] / "eval.json").unlink()
    manifest = (runs[0] / "manifest.json").read_text()
    for status, words in (("failed", " (failed)."), ("interrupted", " (interrupted)."), ("running", ".")):
        (runs[0] / "manifest.json").write_text(
            manifest.replace('"report": {"status": "done"', f'"report": {{"begun": "3000", "status": "{status}"')
        )
        page = build_overview(tmp_path / "runs", tmp_path / "out").read_text()
        assert f"1 of {len(runs)} runs didn’t finish and is left out: {runs[0].name}{words}" in page
        rows = {row["directory"]: row for row in csv.DictReader((tmp_path / "out" / SUMMARY).open())}
        assert rows[runs[0].name]["status"] == {"running": "unfinished"}.get(status, status)


def test_cells_of_a_sweep_without_a_run_are_named(tmp_path, files):
    runs = write_runs(tmp_path / "runs", files, methods=["wanda"], sparsities=[0.5])
    for name in [*(run.name for run in runs), "waits"]:
        cell = tmp_path / "cells" / name
        cell.mkdir(parents=True)
        axes = {"model": "m", "task": "t", "method": "wanda", "sparsity": 0.5, "mode": "s2s", "seed": 3}
        (cell / "cell.json").write_text(json.dumps(axes))
    told: list[str] = []
    page = build_overview(tmp_path, tmp_path / "out", tell=told.append).read_text()
    assert told == ["1 run: 1 missing"]
    assert f"1 of {len(runs) + 1} runs didn’t finish and is left out: waits (missing)." in page
    row = list(csv.DictReader((tmp_path / "out" / SUMMARY).open()))[-1]
    assert (row["directory"], row["status"], row["target_sparsity"], row["accuracy"]) == ("waits", "missing", "0.5", "")
    assert f"{len(runs)} runs" in (tmp_path / "out" / PUBLISHED).read_text()
    told.clear()
    build_overview(tmp_path / "runs", tmp_path / "out", tell=told.append)  # which is no sweep's directory
    assert told == []


def test_of_many_unfinished_runs_a_few_are_named(tmp_path, files):
    runs = write_runs(tmp_path / "runs", files)
    for run in runs[1:]:
        path = run / "manifest.json"
        path.write_text(path.read_text().replace('"report": {"status": "done"', '"report": {"status": "failed"'))
    page = build_overview(tmp_path / "runs", tmp_path / "out").read_text()
    assert f" and {len(runs) - 6} more, which <code>summary.csv</code> names." in page
    assert sum(f"{run.name}," in page or f"{run.name} and" in page for run in runs[1:]) == 5


@pytest.mark.parametrize(("file", "text"), [("eval.json", "{}"), ("manifest.json", "[1"), ("bench.json", "7")])
def test_a_damaged_run_is_named_with_its_file_and_left_out(tmp_path, files, file, text):
    runs = write_runs(tmp_path / "runs", files, methods=["wanda"], sparsities=[0.5])
    (runs[0] / file).write_text(text)
    told: list[str] = []
    page = build_overview(tmp_path / "runs", tmp_path / "out", tell=told.append).read_text()
    (what,) = told
    assert what.startswith(f"{runs[0].name}/{file}: ")
    assert f"1 of {len(runs)} runs has a file that can’t be read and is left out: {runs[0].name} (" in page
    assert f"{runs[0].name}/{file}" in page
    assert "didn’t finish" not in page
    rows = {row["directory"]: row for row in csv.DictReader((tmp_path / "out" / SUMMARY).open())}
    assert rows[runs[0].name]["damaged"] == what
    assert rows[runs[0].name]["accuracy"] == ""
    assert [row["damaged"] for name, row in rows.items() if name != runs[0].name] == [""] * (len(runs) - 1)


def test_where_every_run_is_damaged_it_is_told(tmp_path, files):
    for run in write_runs(tmp_path / "runs", files, methods=["wanda"], sparsities=[0.5], seeds=[0]):
        (run / "manifest.json").write_text("")
    with pytest.raises(PhoenixError, match=r"2 runs, and none has come to an accuracy.*damaged: .*manifest\.json"):
        build_overview(tmp_path / "runs", tmp_path / "out")


def test_one_is_written_in_the_singular(tmp_path, files):
    write_runs(tmp_path / "runs", files, methods=["wanda"], sparsities=[0.5], modes=["sparse_to_sparse"], seeds=[0])
    page = build_overview(tmp_path / "runs", tmp_path / "out").read_text()
    text = re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", page, flags=re.DOTALL)
    assert "<summary>1 setting</summary>" in text
    assert "<li>1 run: " in text
    assert not re.search(r"(?<![\d.,])1 (runs|settings|examples|seeds)\b", text)
    assert [counted(number, noun) for number, noun in ((1, "run"), (0, "run"), (2, "retry"))] == [
        *("1 run", "0 runs", "2 retries")
    ]


def test_markers_at_the_edges_of_a_plot_are_whole(tmp_path, files):
    rows = [run_row(one) for one in write_runs(tmp_path / "runs", files, seeds=[0], modes=["sparse_to_sparse"])]
    for row in rows:
        row["accuracy"] = 0.0
    for svg in (method_plot(rows, "m", "title"), flops_plot(rows, "f")):
        assert svg is not None
        markers = re.findall(r"<use [^>]*>", svg)
        assert markers
        clipped = re.findall(r"<g[^>]*clip-path[^>]*>.*?</g>", svg, flags=re.DOTALL)
        assert not [one for one in clipped if "<use" in one and "fill-opacity" not in one]  # bands may be clipped


def test_runs_measured_in_different_ways_share_no_plot(tmp_path, files):
    write_runs(tmp_path / "runs", files, sparsities=[0.5], seeds=[0], modes=["sparse_to_sparse"])
    one = tmp_path / "runs" / "base-65m-gsm8k-wanda-50-parse-0" / "eval.json"
    one.write_text(one.read_text().replace('"examples": 1319', '"examples": 20'))
    page = build_overview(tmp_path / "runs", tmp_path / "out").read_text()
    section = page[page.index('id="accuracy"') : page.index('id="methods"')]
    assert "<svg" not in section
    assert "in different ways" in section


def test_names_of_a_run_stay_text(tmp_path, files):
    write_runs(tmp_path / "runs", files, methods=["wanda"], sparsities=[0.5])
    recipe = next((tmp_path / "runs").glob("*/recipe.yaml"))
    recipe.write_text(recipe.read_text().replace("models/base-65m", "models/<script>alert(1)</script>"))
    page = build_overview(tmp_path / "runs", tmp_path / "out").read_text()
    assert "<script" not in page


def test_published_figures_stand_beside_ours_with_what_differs(tmp_path, files):
    rows = [run_row(one) for one in write_runs(tmp_path / "runs", files)]
    found = beside(rows)
    assert sum(len(one.theirs) for one in found) == len(FIGURES)
    half = next(one for one in found if one.task == "GSM8K" and one.sparsity == 0.5)
    assert {figure.accuracy for figure in half.theirs} >= {50.1, 45.1, 52.2}
    assert any("wanda, sparse-to-sparse" in line for line in half.ours)
    assert any(line.startswith("the model: Mistral-7B-v0.3") for line in half.differs)
    lora = next(one for one in found if one.theirs[0].method == "dense LoRA" and one.task == "GSM8K")
    assert lora.ours[0].startswith("51.0")
    assert all(not one.ours for one in found if one.task != "GSM8K")  # nothing of ours is filled in
    build_overview(tmp_path / "runs", tmp_path / "out")
    assert "50.1" in (tmp_path / "out" / PUBLISHED).read_text()


def test_where_there_are_no_runs_it_is_told(tmp_path, files):
    with pytest.raises(PhoenixError, match="no such directory"):
        find_runs(tmp_path / "nowhere")
    with pytest.raises(PhoenixError, match="no run lies in it"):
        find_runs(tmp_path)
    (run,) = write_runs(
        tmp_path / "runs", files, methods=["wanda"], sparsities=[0.5], modes=["sparse_to_sparse"], seeds=[0]
    )
    (run / "eval.json").unlink()
    with pytest.raises(PhoenixError, match="none has come to an accuracy"):
        build_overview(tmp_path / "runs", tmp_path / "out")
    assert (tmp_path / "out" / SUMMARY).is_file()
    assert not (tmp_path / "out" / PAGE).exists()


def test_kinds_of_merge():
    assert kind_of_merge({"mode": "sparse_to_sparse", "dense_merge": "dense"}) == "sparse-to-sparse"
    assert kind_of_merge({"mode": "sparse_to_dense", "dense_merge": "remask"}) == "sparse-to-dense, masked again"


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6))
def test_intervals_of_shares_are_shares_and_no_narrower_than_by_the_examples(hits):
    """Seeds that agree by chance were tested on the same examples, which is where the error is then."""
    rows = [{"target_sparsity": 0.5, "accuracy": one / 50, "examples": 50} for one in hits]
    (point,) = series(rows, "accuracy", examples="examples")
    low, high = wilson(point.mean, 50)
    assert 0 <= point.low <= low <= high <= point.high <= 1
    if len(hits) > 1:
        spread = stats.sem([one / 50 for one in hits]) * stats.t.ppf(0.975, len(hits) - 1)
        assert point.high >= min(1, point.mean + spread) - 1e-3


def test_no_plot_of_accuracies_goes_beyond_all_examples(tmp_path, files):
    """With two seeds that differ the interval over them would end far above 100%."""
    rows = [run_row(one) for one in write_runs(tmp_path, files)]
    worst = [row | {"accuracy": 0.95 if row["seed"] else 0.45} for row in rows]
    for plot in (method_plot(worst, "m", "m"), mode_plot(worst, "a", "a")):
        ticks = [float(text) for text in re.findall(r"<text[^>]*>(\d+)</text>", plot)]
        assert max(ticks) == 100


def test_methods_of_one_sparsity_do_not_hide_each_other(tmp_path, files):
    rows = [run_row(one) for one in write_runs(tmp_path, files, sparsities=[0.5])]
    few = {"accuracy": 0.04, "accuracy_dense": 0.0, "accuracy_dense_lora": None, "examples": 1000}
    plot = method_plot([row | few for row in rows], "m", "m")
    methods = {row["method"] for row in rows}
    assert re.findall(r"<text[^>]*>([4-9]\d)</text>", plot) == ["50"]
    assert "LineCollection" in plot  # a band over one place would be no wider than a point
    marks = re.findall(r'<use xlink:href="#[^"]+" x="([\d.]+)" y="([\d.]+)"', plot)
    heights = [y for _, y in marks]
    level = max(set(heights), key=heights.count)
    assert len({x for x, y in marks if y == level}) >= len(methods) > 1


def test_counted_flops_are_not_called_speed(tmp_path, files):
    rows = [run_row(one) for one in write_runs(tmp_path, files, sparsities=[0.5])]
    headings = [heading for _, heading, _ in sections(rows)]
    assert "Accuracy against FLOPs" in headings
    timed = [row | {"decode_tokens_per_second": 2.0, "decode_tokens_per_second_dense": 1.0} for row in rows]
    assert "Accuracy against speed" in [heading for _, heading, _ in sections(timed)]
    # Seeds are those of the runs that were timed.
    some = [row if row["seed"] == 0 else other for row, other in zip(timed, rows, strict=True)]
    captions = [plot.caption for identity, _, plots in sections(some) if identity == "pareto" for plot in plots]
    assert [caption.split("; ")[1].split(".")[0] for caption in captions] == ["one seed", "means over 2 seeds"]


def test_the_dense_model_has_no_error_over_seeds(tmp_path, files):
    rows = [run_row(one) for one in write_runs(tmp_path, files)]
    for line in accuracy_table([row | {"accuracy_dense": 0.2, "stderr_dense": 0.011} for row in rows]):
        assert line["accuracy_dense"] == "20.0 (1.1)"
        assert re.fullmatch(r"\d+\.\d ± \d+\.\d \(\d+\.\d\)", line["accuracy"])


def test_the_documented_columns_are_those_of_the_summary(tmp_path, files):
    documentation = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text(encoding="utf-8")
    table = documentation.split("| column | unit |")[1].split("\n\n")[0]
    names = re.findall(r"`([a-z_]+)`", " ".join(line.split("|")[1] for line in table.splitlines() if "`" in line))
    columns = set(run_row(write_runs(tmp_path, files)[0]))
    assert set(names) - {"process_seconds"} <= columns  # of the registry
    axes = {"run", "directory", "finished", "model", "task", "method", "mode", "dense_merge", "seed"}
    made = "created|phoenix|git_commit|(host|version)_.*|model_sha256|train_examples"
    rest = {re.sub("_(pruned|dense|dense_lora)$", "", name) for name in columns - axes if not re.fullmatch(made, name)}
    assert rest <= set(names)


def test_seeds_are_counted_where_the_means_are():
    rows = [{"method": "wanda", "target_sparsity": 0.5, "seed": seed} for seed in (0, 1, 2)]
    assert seeds_of(rows) == "3 seeds"
    assert seeds_of([*rows, rows[0] | {"target_sparsity": 0.7}]) == "1 to 3 seeds"
    assert seeds_of(rows[:1]) == "1 seed"
