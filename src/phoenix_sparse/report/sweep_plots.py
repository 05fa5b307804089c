"""Plots over many runs, inline SVG in the manner of `plots`. Methods differ in marker and line, not colour alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from phoenix_sparse.report.plots import ACCENT, INK, MUTED, PAPER, SECOND, STYLE, WIDTH, _figure, _svg
from phoenix_sparse.report.series import Point, Row, by_merge, front, grouped, kind_of_merge, merge_costs, series

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)), (0, (3, 1)))
COLORS = (ACCENT, INK, SECOND, MUTED)
SAME_SPEED = 0.01  # share by which speeds may differ and count as one: masks hit their sparsity to a weight a layer
LEGEND: Mapping[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "borderaxespad": 0.2, "handlelength": 3.2}


def _look(index: int) -> dict[str, Any]:
    """The marker, line and colour of the series with this number."""
    return {
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
        "color": COLORS[index % len(COLORS)],
        "markersize": 4.5,
        "linewidth": 1.5,
        "markerfacecolor": PAPER if index % 2 else COLORS[index % len(COLORS)],
        "clip_on": False,  # a point on an axis or at the upper end is drawn whole
        "zorder": 3,
    }


def _draw(axes: Any, points: Sequence[Point], label: str, index: int, factor: float = 1.0) -> None:
    """A line of means; with a band of intervals over seeds, and whiskers for those of one seed or at one place."""
    axes.plot(
        [100 * point.x for point in points], [factor * point.mean for point in points], label=label, **_look(index)
    )
    band = [point for point in points if point.low is not None]
    if len(band) == 1 or (band and all(point.seeds == 1 for point in band)):
        below = [factor * (point.mean - point.low) for point in band if point.low is not None]
        above = [factor * (point.high - point.mean) for point in band if point.high is not None]
        look = {"ecolor": COLORS[index % len(COLORS)], "elinewidth": 0.8, "capsize": 2, "alpha": 0.55}
        places = [100 * point.x for point in band]
        axes.errorbar(places, [factor * point.mean for point in band], (below, above), fmt="none", **look)
    elif band:
        axes.fill_between(
            [100 * point.x for point in band],
            [factor * point.low for point in band if point.low is not None],
            [factor * point.high for point in band if point.high is not None],
            color=COLORS[index % len(COLORS)],
            alpha=0.16,
            linewidth=0,
        )


def _sparsity_axis(axes: Any) -> None:
    axes.set_xlabel("sparsity of the pruned linears, %")
    axes.grid()


def _from_zero(axes: Any, at_least: float = 0.0) -> None:
    """Begin the axis of values at 0, with room for a marker above the largest of them and the bands."""
    top = max(axes.dataLim.y1, at_least)
    axes.set_ylim(0, 1.06 * top if top > 0 else 1)


def method_plot(rows: Sequence[Row], name: str, title: str) -> str | None:
    """Accuracy against sparsity, one line for each method; the dense baselines as level lines."""
    lines = {
        method[0]: series(group, "accuracy", examples="examples") for method, group in grouped(rows, "method").items()
    }
    return _accuracy_plot({key: points for key, points in lines.items() if points}, rows, name, title)


def mode_plot(rows: Sequence[Row], name: str, title: str) -> str | None:
    """Accuracy against sparsity of one method: each way of merging, and the pruned model before any tuning."""
    lines: dict[str, list[Point]] = {}
    for row_kind, group in by_merge(rows).items():
        lines[row_kind] = series(group, "accuracy", examples="examples")
    lines["pruned, untuned"] = series(_once(rows, "accuracy_pruned"), "accuracy_pruned", examples="examples")
    return _accuracy_plot({key: points for key, points in lines.items() if points}, rows, name, title)


def _accuracy_plot(lines: Mapping[str, list[Point]], rows: Sequence[Row], name: str, title: str) -> str | None:
    if not lines:
        return None
    import matplotlib

    places = {point.x for points in lines.values() for point in points}
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(3.3 + 0.17 * len(lines))
        if len(places) == 1:
            lines = _side_by_side(axes, lines)
        for index, (label, points) in enumerate(lines.items()):
            _draw(axes, points, label, index, 100)
        for value, label, style in (("accuracy_dense_lora", "dense LoRA", "-"), ("accuracy_dense", "dense base", ":")):
            level = [row[value] for row in rows if row.get(value) is not None]
            if level:
                height = 100 * sum(level) / len(level)
                axes.axhline(height, color=MUTED, linestyle=style, linewidth=0.9, label=label)
        _sparsity_axis(axes)
        axes.set_ylabel("accuracy, %")
        _from_zero(axes, at_least=1)
        axes.legend(title=title, alignment="left", ncols=1, **LEGEND)
        return _svg(figure, name)


def _side_by_side(axes: Any, lines: Mapping[str, list[Point]]) -> dict[str, list[Point]]:
    """Points of one sparsity beside each other, where they would hide each other, over the one tick that is right."""
    (x,) = {point.x for points in lines.values() for point in points}
    axes.set_xticks([100 * x], [f"{100 * x:g}"])
    axes.set_xlim(100 * x - len(lines), 100 * x + len(lines))
    middle = (len(lines) - 1) / 2
    return {
        label: [replace(point, x=x + (index - middle) / 100) for point in points]
        for index, (label, points) in enumerate(lines.items())
    }


def heatmap(rows: Sequence[Row], name: str) -> str | None:
    """Mean accuracies, one row for a task and method, one column for a sparsity, the numbers printed in the cells."""
    cells: dict[tuple[str, float], float] = {}
    for (task, method), group in grouped(rows, "task", "method").items():
        for point in series(group, "accuracy"):
            cells[f"{task}: {method}", point.x] = point.mean
    if not cells:
        return None
    import matplotlib
    from matplotlib.patches import Rectangle

    lines = list(dict.fromkeys(line for line, _ in cells))
    columns = sorted({column for _, column in cells})
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(0.7 + 0.26 * len(lines))
        figure.set_size_inches(max(WIDTH, 1.6 + 0.44 * len(columns)), 0.7 + 0.26 * len(lines))
        for (line, column), value in cells.items():
            x, y = columns.index(column), lines.index(line)
            shade = 0.04 + 0.46 * value
            axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=ACCENT, alpha=shade, linewidth=0))
            axes.text(x, y, f"{100 * value:.1f}", ha="center", va="center", fontsize=8)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_xticks(range(len(columns)), [f"{100 * column:g}" for column in columns])
        axes.set_yticks(range(len(lines)), lines)
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set_xlabel("sparsity, %")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return _svg(figure, name)


def flops_plot(rows: Sequence[Row], name: str) -> str | None:
    """FLOPs of the merged model as a share of the dense one's, for reading the prompt and for writing a token."""

    def share(phase: str) -> Callable[[Row], float | None]:
        def of(row: Row) -> float | None:
            sparse, dense = row.get(f"{phase}_flops"), row.get(f"{phase}_flops_dense")
            return None if sparse is None or not dense else sparse / dense

        return of

    lines = {
        f"{phase}, {merge}{model}": _bare(series(group, share(phase)))
        for merge, model, group in _by_merge_and_model(rows)
        for phase in ("prefill", "decode")
    }
    return _plain(lines, name, "FLOPs, % of the dense model's", 100)


def throughput_plot(rows: Sequence[Row], name: str, phase: str) -> str | None:
    """Tokens a second of prefill or decode that `phx bench` measured in the runs, dense and packed in turns."""
    lines: dict[str, list[Point]] = {}
    for (model, gpu, batch), group in grouped(rows, "model", "host_gpu", "bench_batch").items():
        for suffix, form in (("", "packed"), ("_dense", "dense")):
            points = series(group, f"{phase}_tokens_per_second{suffix}")
            lines[f"{form}: {model}, {gpu or 'CPU'}, batch {batch}"] = points
    return _plain(lines, name, f"tokens a second, {phase} (median)")


def training_plot(rows: Sequence[Row], name: str) -> str | None:
    """Tokens a second of the fine-tune, as the runs of one model and task measured it: means over methods and seeds."""
    lines = {merge: _bare(series(group, "train_tokens_per_second")) for merge, group in by_merge(rows).items()}
    return _plain(lines, name, "training tokens a second")


def cost_plot(rows: Sequence[Row], name: str) -> str | None:
    """Accuracy of sparse-to-dense minus that of sparse-to-sparse, by method; rows of one model and task."""
    lines = {
        method + (f" ({merge.partition(', ')[2]})" if merge else ""): series(group, "difference")
        for (method, merge), group in grouped(merge_costs(rows), "method", "merge").items()
    }
    return _plain(lines, name, "sparse-to-dense minus\nsparse-to-sparse, points", 100, zero=True)


def pareto_plot(rows: Sequence[Row], name: str, speed: str) -> str | None:
    """Accuracy against speed, one marker a method and one point a mean over seeds; the front joined.

    Args:
        rows: of one model and task.
        name: of the plot.
        speed: `measured` (decoded tokens a second over the dense model's, by phx bench) or `counted` (how many times
            fewer FLOPs a decoded token takes).
    """
    found: dict[str, list[tuple[float, float, float]]] = {}
    for (method, sparsity, _, _), group in grouped(rows, "method", "target_sparsity", "mode", "dense_merge").items():
        pairs = [
            (times, row["accuracy"])
            for row in group
            if (times := _times(row, speed)) and row.get("accuracy") is not None
        ]
        if pairs:
            x, y = (sum(values) / len(values) for values in zip(*pairs, strict=True))
            merge = kind_of_merge(group[0]).partition(", ")[2]
            found.setdefault(f"{method}, {merge}" if merge else str(method), []).append((x, 100 * y, sparsity))
    if not found:
        return None
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(3.2 + 0.17 * len(found))
        best = front([(x, y) for points in found.values() for x, y, _ in points], SAME_SPEED)
        axes.plot([x for x, _ in best], [y for _, y in best], color=MUTED, linewidth=1.2, label="front")
        for index, (method, points) in enumerate(found.items()):
            look = _look(index) | {"linestyle": "none"}
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], label=method, **look)
        named = {(x, y): sparsity for points in found.values() for x, y, sparsity in points}
        for x, y in best:
            axes.annotate(f"{100 * named[x, y]:g}%", (x, y), xytext=(3, 4), textcoords="offset points", fontsize=7.5)
        axes.grid()
        axes.margins(0.08, 0.1)
        axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
        label = "decoded tokens a second, times the dense model's (measured)"
        axes.set_xlabel(label if speed == "measured" else "times fewer FLOPs to write a token (counted, not timed)")
        axes.set_ylabel("accuracy, %")
        axes.legend(**LEGEND)
        return _svg(figure, name)


def _times(row: Row, speed: str) -> float | None:
    if speed == "measured":
        one, other = row.get("decode_tokens_per_second"), row.get("decode_tokens_per_second_dense")
    else:
        one, other = row.get("decode_flops_dense"), row.get("decode_flops")
    return None if one is None or not other else one / other


def _plain(
    lines: Mapping[str, list[Point]],
    name: str,
    label: str,
    factor: float = 1.0,
    *,
    zero: bool = False,
) -> str | None:
    lines = {key: points for key, points in lines.items() if points}
    if not lines:
        return None
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(2.8 + 0.17 * len(lines))
        for index, (title, points) in enumerate(lines.items()):
            _draw(axes, points, title, index, factor)
        _sparsity_axis(axes)
        axes.set_ylabel(label)
        if zero:
            axes.axhline(0, color=INK, linewidth=0.9)
        else:
            _from_zero(axes)
        axes.legend(**LEGEND)
        return _svg(figure, name)


def _bare(points: Sequence[Point]) -> list[Point]:
    """Means without intervals: of counts, and of what methods and machines that share themselves put in one heap."""
    return [replace(point, low=None, high=None) for point in points]


def _by_merge_and_model(rows: Sequence[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    models = grouped(rows, "model")
    for (model,), group in models.items():
        for merge, part in by_merge(group).items():
            yield merge, f" ({model})" if len(models) > 1 else "", part


def _once(rows: Sequence[Row], value: str) -> list[Row]:
    """One row for each pruned model: runs that differ in what came after it share its figures."""
    return [group[0] for group in grouped(rows, "model", "task", "method", "target_sparsity", "seed", value).values()]
