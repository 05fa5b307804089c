"""The analysis over many runs: summary.csv, one HTML page with every plot, and a page beside published figures."""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import write_text
from phoenix_sparse.report.html import environment
from phoenix_sparse.report.published import TALK, beside
from phoenix_sparse.report.run_rows import find_runs, missing_rows, run_row
from phoenix_sparse.report.series import (
    Row,
    by_merge,
    counted,
    grouped,
    kind_of_merge,
    mean_and_interval,
    measured_alike,
    merge_costs,
    seeds_of,
    standard_error,
)
from phoenix_sparse.report.sweep_plots import (
    cost_plot,
    flops_plot,
    heatmap,
    method_plot,
    mode_plot,
    pareto_plot,
    throughput_plot,
    training_plot,
)

SUMMARY, PAGE, PUBLISHED = "summary.csv", "index.html", "published.html"


@dataclass(frozen=True)
class Plot:
    """A plot of the page: its SVG, what it shows for those who can't see it, and its caption."""

    svg: Any
    alt: str
    caption: str


def build_overview(
    runs: Path, out: Path, *, command: str | None = None, tell: Callable[[str], None] | None = None
) -> Path:
    """Write summary.csv, index.html and published.html about all runs in a directory; give the page's path.

    Only what the runs' files hold is shown. Runs that didn't finish are named and counted, and their results, where
    they have some already, are in summary.csv alone. A run of which a file can't be read is named with the file, and
    nothing else of it is shown. A sweep's runs that aren't there yet are named too.

    Args:
        runs: a run directory, a sweep's directory, or one that holds runs.
        out: the directory to write.
        command: that made the pages, to be shown on them.
        tell: called with what is wrong with each damaged run, and with how many runs didn't finish.

    Raises:
        PhoenixError: there are no runs, or none of them has an accuracy.
    """
    directories = find_runs(runs)
    rows = [_row_or_damage(directory, Path(runs)) for directory in directories]
    rows += [row | {"damaged": None} for row in missing_rows(runs, directories)]
    damaged = [row for row in rows if row["damaged"]]
    unfinished = [row for row in rows if not row["finished"] and not row["damaged"]]
    if tell is not None:
        for row in damaged:
            tell(row["damaged"])
        if unfinished:
            states = Counter(row["status"] for row in unfinished)
            tell(
                f"{counted(len(unfinished), 'run')}: " + ", ".join(f"{many} {state}" for state, many in states.items())
            )
    rows.sort(key=lambda row: row.get("mode") != "sparse_to_sparse")  # the first series of every plot
    write_text(out / SUMMARY, summary(rows))
    done = [row for row in rows if row["finished"]]
    if not any(row["accuracy"] is not None for row in done):
        raise PhoenixError(
            f"{runs}: {counted(len(rows), 'run')}, and none has come to an accuracy yet; {out / SUMMARY} lists them"
            + (f"; damaged: {damaged[0]['damaged']}" if damaged else "")
        )
    shared = {"command": command, "rows": rows, "done": done, "unfinished": unfinished, "damaged": damaged}
    templates = environment(escape=True)
    templates.filters["counted"] = counted
    found = list(sections(done))
    benched = any(row.get("decode_tokens_per_second") is not None for row in done)
    page = templates.get_template("overview.html.j2").render(
        **shared,
        benched=benched,
        sections=found,
        accuracies=accuracy_table(done),
        costs=cost_table(done),
        hosts=hosts(done),
    )
    write_text(
        out / PUBLISHED, templates.get_template("published.html.j2").render(**shared, figures=beside(done), talk=TALK)
    )
    write_text(out / PAGE, page)
    return out / PAGE


def _row_or_damage(directory: Path, runs: Path) -> Row:
    """A run's row; of one with a file that can't be read only which one, its path without the way to the runs."""
    try:
        return run_row(directory) | {"damaged": None}
    except PhoenixError as error:
        what = str(error).replace(f"{runs}/", "")
        return {
            "run": directory.name,
            "directory": directory.name,
            "finished": False,
            "status": "damaged",
            "damaged": what,
        }


def summary(rows: Sequence[Row]) -> str:
    """All rows as CSV, an empty cell where nothing was measured."""
    fields = list(dict.fromkeys(field for row in rows for field in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fields, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in rows)
    return stream.getvalue()


def sections(rows: Sequence[Row]) -> Iterable[tuple[str, str, list[Plot]]]:
    """The page's sections: identity, heading and plots. A section without a plot says that nothing was measured."""
    yield "accuracy", "Accuracy against sparsity", list(_accuracy_plots(rows))
    yield "methods", "Methods at a glance", list(_heatmaps(rows))
    timed = any(row.get("decode_tokens_per_second") is not None for row in rows)
    yield "pareto", f"Accuracy against {'speed' if timed else 'FLOPs'}", list(_fronts(rows))
    flops = _plot(
        flops_plot(rows, "flops"),
        "FLOPs of the merged model against sparsity, by phase and kind of merge",
        "Counted from shapes and non-zeros, attention and lm_head included; not timed.",
    )
    yield "flops", "FLOPs against sparsity", flops
    speed = []
    for phase, what in (("prefill", "reading a prompt"), ("decode", "writing")):
        text = f"Measured tokens per second of {phase} against sparsity, dense and packed"
        caption = (
            f"Inference, {what}: measured by phx bench, dense and packed in turns; means of the runs' medians, bands "
            "where there are several runs: 95% confidence of the mean."
        )
        speed += _plot(throughput_plot(rows, f"speed-{phase}", phase), text, caption)
    for (model, task), group in grouped(rows, "model", "task").items():
        text = f"Measured training tokens per second on {task} against sparsity"
        caption = (
            f"{task}, {model}. The fine-tune, as each run measured it, means over methods and seeds; several runs may "
            "have shared the machine. Resumed ones are left out."
        )
        speed += _plot(training_plot(group, _name("t", f"{model} {task}")), text, caption)
    yield "throughput", "Throughput against sparsity", speed
    yield "cost", "What sparse-to-dense costs", [*_costs(rows)]


def _plot(svg: str | None, alt: str, caption: str) -> list[Plot]:
    from markupsafe import Markup

    return [] if svg is None else [Plot(Markup(svg), alt, caption)]


def _accuracy_plots(rows: Sequence[Row]) -> Iterable[Plot]:
    for (model, task), group in grouped(rows, "model", "task").items():
        if not measured_alike(group):
            continue
        for merge, part in by_merge(group).items():
            title = f"{task}, {model}, {merge}"
            text = f"Accuracy on {task} against sparsity, a line for each method"
            yield from _plot(method_plot(part, _name("m", title), title), text, _way(part))
        for (method,), part in grouped(group, "method").items():
            title = f"{task}, {model}, {method}"
            text = f"Accuracy on {task} against sparsity with {method}, tuned in each mode and untuned"
            yield from _plot(mode_plot(part, _name("a", title), title), text, _way(part))


def _heatmaps(rows: Sequence[Row]) -> Iterable[Plot]:
    for (model,), runs in grouped(rows, "model").items():
        for merge, group in by_merge(runs).items():
            text = f"Accuracies of {model}, {merge}, by task and method and sparsity, with the numbers in the cells"
            caption = f"{model}, {merge}: accuracy in %, {_means(group)}, stronger where it is higher."
            yield from _plot(heatmap(group, _name("h", f"{model} {merge}")), text, caption)


def _fronts(rows: Sequence[Row]) -> Iterable[Plot]:
    for (model, task), group in grouped(rows, "model", "task").items():
        if not measured_alike(group):
            continue
        timed = [row for row in group if row.get("decode_tokens_per_second") is not None]
        for speed, shown in (("measured", timed), ("counted", group)):
            text = f"Accuracy on {task} against speed, {speed}, with the front of the best trade-offs"
            caption = (
                f"{task}, {model}; {_means(shown)}. Points on the front carry their sparsity. The errors of the "
                "accuracies stand in the table."
            )
            yield from _plot(pareto_plot(shown, _name("p", f"{model} {task} {speed}"), speed), text, caption)


def _costs(rows: Sequence[Row]) -> Iterable[Plot]:
    for (model, task), group in grouped(rows, "model", "task").items():
        text = f"Accuracy on {task} of sparse-to-dense minus that of sparse-to-sparse, against sparsity"
        caption = (
            f"{task}, {model}. Below zero: training through the mask was the better way. Pairs of runs that differ in "
            f"the mode alone, {_means(group)}; a difference has the errors of both."
        )
        yield from _plot(cost_plot(group, _name("c", f"{model} {task}")), text, caption)


def _way(rows: Sequence[Row]) -> str:
    """How the accuracies of a plot were measured, and over how many seeds."""
    row = next((row for row in rows if row["accuracy"] is not None), None)
    if row is None:
        return ""
    seeds = seeds_of(rows)
    band = (
        "one seed; whiskers: 95% by its examples alone"
        if seeds == "1 seed"
        else f"means over {seeds}; bands: 95% confidence, by the seeds or by the examples, whichever is wider"
    )
    shots = f"{row['num_fewshot']}-shot, {row['metric'].replace(',', ', ')}"
    return f"{row['split'].capitalize()} split, {counted(row['examples'], 'example')}, {shots}; {band}."


def _means(rows: Sequence[Row]) -> str:
    """Over how many seeds a plot's means are."""
    seeds = seeds_of(rows)
    return "one seed" if seeds == "1 seed" else f"means over {seeds}"


def accuracy_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line for each model, task, method, kind of merge and sparsity, over its seeds."""
    lines = []
    fields = ("model", "task", "method", "merge", "target_sparsity")
    for key, group in grouped([{**row, "merge": kind_of_merge(row)} for row in rows], *fields).items():
        line = dict(zip(fields, key, strict=True)) | {"seeds": len({row["seed"] for row in group})}
        line["examples"] = next((f"{row['examples']:,}" for row in group if row["examples"] is not None), None)
        for name in ("accuracy", "accuracy_pruned", "accuracy_dense", "accuracy_dense_lora"):
            line[name] = _mean(group, name)
        lines.append(line)
    return lines


def _mean(rows: Sequence[Row], name: str) -> str | None:
    """The mean over seeds in %, ± its standard error over them, and in brackets the one by the evaluated examples."""
    measured = [row for row in rows if row[name] is not None]
    if not measured:
        return None
    values = [100 * row[name] for row in measured]
    # The dense model is the same for all seeds: that they agree about it says nothing of the figure's error.
    spread = None if name == "accuracy_dense" else standard_error(values)
    errors = [row[name.replace("accuracy", "stderr")] for row in measured]
    known = [100 * error for error in errors if error is not None]
    text = f"{mean_and_interval(values)[0]:.1f}"
    text += f" ± {spread:.1f}" if spread is not None else ""
    return text + (f" ({sum(known) / len(known):.1f})" if known else "")


def cost_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What merging sparse-to-dense did, over tasks and seeds of one sparsity."""
    lines = []
    for (model, method, merge, sparsity), group in grouped(
        merge_costs(rows), "model", "method", "merge", "target_sparsity"
    ).items():
        line: dict[str, Any] = {"model": model, "method": method, "merge": merge, "target_sparsity": sparsity}
        for name, factor, digits in (("difference", 100, 1), ("merged_sparsity", 100, 1), ("argmax_agreement", 100, 2)):
            values = [factor * one[name] for one in group if one[name] is not None]
            line[name] = f"{sum(values) / len(values):.{digits}f}" if values else None
        filled = [one["off_mask_nonzeros"] for one in group if one["off_mask_nonzeros"] is not None]
        line["off_mask_nonzeros"] = f"{sum(filled) / len(filled):,.0f}" if filled else None
        lines.append(line)
    return lines


def hosts(rows: Sequence[Row]) -> list[str]:
    """The machines and versions that the runs were made with."""
    found: dict[str, int] = {}
    for row in rows:
        versions = ", ".join(f"{name} {row.get(f'version_{name}')}" for name in ("torch", "transformers", "lm-eval"))
        commit = f", commit {row['git_commit'][:12]}" if row["git_commit"] else ""
        gpu = f", {row['host_gpu']}" if row["host_gpu"] else ""
        text = f"{row['host_cpu']}, {row['host_cores']} cores{gpu}; Phoenix {row['phoenix']}{commit}; {versions}"
        found[text] = found.get(text, 0) + 1
    return [f"{counted(count, 'run')}: {text}" for text, count in found.items()]


def _name(prefix: str, text: str) -> str:
    """An identity for an SVG of the page."""
    return prefix + "-" + re.sub(r"[^A-Za-z0-9]+", "-", text)
