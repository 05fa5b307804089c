"""Plots as inline SVG: text stays text, colours come from the page's style sheet, so they follow dark mode.

Every plot can be read in black and white: series differ in line style, marker or hatching, and cells print their
number.
"""

import io
import re
from collections.abc import Mapping
from typing import Any

from phoenix_sparse.report.facts import ROLE_NAMES
from phoenix_sparse.report.records import Accuracy, Search, Tune
from phoenix_sparse.report.text import accuracy as accuracy_text

# Colours that matplotlib writes and that become variables of the style sheet.
INK, MUTED, GRID, ACCENT, SECOND, PAPER = "#010203", "#020304", "#030405", "#040506", "#050607", "#060708"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", ACCENT: "accent", SECOND: "second", PAPER: "paper"}
WIDTH = 4.6  # inches: narrow, so that the text stays legible when a phone shrinks the plot
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "hatch.color": PAPER,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def accuracy_plot(accuracies: Mapping[str, Accuracy], names: Mapping[str, str] = ROLE_NAMES) -> str:
    """Bars with standard errors, one for each model that was measured."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(0.55 + 0.42 * len(accuracies))
        roles = list(accuracies)
        ends = []
        for row, role in enumerate(roles):
            value, error = 100 * accuracies[role].accuracy, 100 * (accuracies[role].stderr or 0)
            chosen = role == "tuned"
            axes.barh(
                row, value, 0.62, color=ACCENT if chosen else SECOND, hatch=None if chosen else "////", linewidth=0
            )
            if error:
                # A wider line in the paper's colour below, so that the error shows on a dark bar as well.
                axes.errorbar(value, row, xerr=error, color=PAPER, capsize=4, capthick=3.4, linewidth=3.4)
                axes.errorbar(value, row, xerr=error, color=INK, capsize=3, linewidth=1.1)
            ends.append(value + error)
        room = max(max(ends), 1)
        for row, role in enumerate(roles):
            axes.text(ends[row] + 0.02 * room, row, accuracy_text(accuracies[role]), va="center")
        axes.set_xlim(0, 1.42 * room)
        axes.set_xticks([tick for tick in axes.get_xticks() if tick <= min(100, 1.05 * room)])
        axes.set_yticks(range(len(roles)), [names[role] for role in roles])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set_xlabel("accuracy, %")
        return _svg(figure, "accuracy")


def sparsity_plot(sparsities: Mapping[str, float]) -> str | None:
    """A heat map, one row for a block and one column for a linear; None where the names don't form such a grid."""
    cells = {}
    for name, value in sparsities.items():
        match = re.fullmatch(r"(?:.*\.)?(\d+)\.(.+)", name)
        if match is None:
            return None
        cells[int(match[1]), match[2].rsplit(".", 1)[-1]] = value
    rows, columns = sorted({row for row, _ in cells}), list(dict.fromkeys(column for _, column in cells))
    if not cells or len(cells) != len(sparsities) or len(columns) > 8:
        return None
    import matplotlib
    from matplotlib.patches import Rectangle

    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(0.55 + 0.25 * len(rows))
        low, span = min(cells.values()), max(max(cells.values()) - min(cells.values()), 0.1)
        for (row, column), value in cells.items():
            x, y = columns.index(column), rows.index(row)
            # Never stronger than half, so that the number stays legible on it in light and dark.
            shade = 0.06 + 0.44 * (value - low) / span
            axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=ACCENT, alpha=shade, linewidth=0))
            axes.text(x, y, f"{100 * value:.1f}", ha="center", va="center", fontsize=8)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(range(len(columns)), [column.removesuffix("_proj") for column in columns])
        axes.set_yticks(range(len(rows)), [str(row) for row in rows])
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("decoder block")
        return _svg(figure, "sparsity")


def loss_plot(tunes: Mapping[str, Tune]) -> str | None:
    """Training loss by optimizer step; None where no step was logged."""
    series = {
        role: [(entry.step, entry.loss) for entry in tune.log if entry.loss is not None] for role, tune in tunes.items()
    }
    series = {role: points for role, points in series.items() if points}
    if not series:
        return None
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(2.7)
        for role, points in series.items():
            steps, losses = [step for step, _ in points], [loss for _, loss in points]
            color, line = (ACCENT, "-") if role == "tuned" else (SECOND, "--")
            label = "Sparse, tuned" if role == "tuned" else ROLE_NAMES[role]
            if len(points) > 60:
                axes.plot(steps, losses, color=color, alpha=0.3, linewidth=0.7)
                losses = _moving_mean(losses, len(points) // 20)
            marker = "o" if len(points) == 1 else None
            axes.plot(steps, losses, color=color, linestyle=line, marker=marker, linewidth=1.8, label=label)
        axes.margins(y=0.1)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("training loss")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
        return _svg(figure, "loss")


def search_plot(search: Search) -> str:
    """Every candidate's accuracy against its adapter's parameters, the front joined, the choice marked."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(3.0)
        # A number below 10,000 is written out; above, in thousands or millions.
        largest = max((candidate.parameters for candidate in search.candidates), default=0)
        factor, unit = (1e6, ", millions") if largest >= 1e6 else (1e3, ", thousands") if largest >= 1e4 else (1.0, "")
        places = {c.id: (c.parameters / factor, 100 * c.accuracy, 100 * (c.stderr or 0)) for c in search.candidates}
        x, y, errors = zip(*places.values(), strict=True)
        if any(errors):
            axes.errorbar(x, y, yerr=errors, fmt="none", color=MUTED, alpha=0.35, linewidth=0.9)
        axes.scatter(x, y, s=20, facecolors=PAPER, edgecolors=SECOND, linewidths=1, label="candidate", zorder=3)
        front = sorted(places[name] for name in search.front)
        style: dict[str, Any] = {"color": ACCENT, "linewidth": 1.6, "marker": "o", "markersize": 4.5, "zorder": 4}
        axes.plot([point[0] for point in front], [point[1] for point in front], label="front", **style)
        chosen = places[search.choice]
        axes.scatter(
            chosen[0],
            chosen[1],
            s=170,
            marker="*",
            color=ACCENT,
            edgecolors=INK,
            linewidths=0.8,
            label="choice",
            zorder=5,
        )
        axes.margins(0.08, 0.1)
        axes.grid()
        axes.set_xlabel(f"adapter parameters{unit}")
        axes.set_ylabel("validation accuracy, %")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=3, columnspacing=1.4, handletextpad=0.4)
        return _svg(figure, "search")


def _figure(height: float) -> tuple[Any, Any]:
    # Not through pyplot, which keeps figures and a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _moving_mean(values: list[float], width: int) -> list[float]:
    """Mean over a window centred on each value, shorter at both ends."""
    half = width // 2
    windows = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _svg(figure: Any, name: str) -> str:
    """Render to an `<svg>` element that can stand beside others in one page. Matplotlib escapes the text in it."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # The width comes from the page; ids must differ between the plots of one page.
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg
