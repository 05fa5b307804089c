"""Runs put together: means over seeds with their confidence, pairs of runs, fronts. Arithmetic on rows, no drawing."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
# Two-sided 95% quantiles of Student's t, by degrees of freedom; beyond 30 the normal one is within 2%.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
NORMAL95 = 1.96
T95_MORE = {20: 2.131, 30: 2.086}  # the larger of what lies between, so that no interval is too short


@dataclass(frozen=True)
class Point:
    """A mean over seeds at one sparsity, with its 95% confidence interval: over the seeds, if there are several.

    Of a share of examples it lies within 0 and 1 and is never narrower than by the examples: seeds that happen to agree
    were tested on the same ones.
    """

    x: float
    mean: float
    low: float | None  # with one seed at every place by its examples alone; None where their number isn't known
    high: float | None
    seeds: int


def counted(count: int, noun: str) -> str:
    """A number with its noun, in the plural where it isn't one: 1 run, 2 runs, 3 retries."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun[:-1]}ies" if noun.endswith("y") else f"{count:,} {noun}s"


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its 95% confidence interval by Student's t; None for a single value.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, student(len(values) - 1) * math.sqrt(variance / len(values))


def student(freedom: int) -> float:
    """The 97.5% quantile of Student's t; never smaller than the true one."""
    if freedom <= len(T95):
        return T95[freedom - 1]
    for limit, value in T95_MORE.items():
        if freedom <= limit:
            return value
    return 2.042


def series(
    rows: Iterable[Row],
    value: str | Callable[[Row], float | None],
    x: str = "target_sparsity",
    examples: str | None = None,
) -> list[Point]:
    """Points by rising x, each over the rows that have a value there.

    Args:
        rows: the runs.
        value: what is averaged, a field or a function of a row.
        x: the field of the places.
        examples: the field of the number of examples that a value is a share of. With one seed everywhere, intervals
            are by them; with several, no narrower than by them.
    """
    measure = (lambda row: row.get(value)) if isinstance(value, str) else value
    found: dict[float, list[tuple[float, float | None]]] = {}
    for row in rows:
        measured = measure(row)
        if measured is not None and row.get(x) is not None:
            found.setdefault(float(row[x]), []).append((float(measured), row.get(examples) if examples else None))
    points = []
    alone = all(len(values) == 1 for values in found.values())
    for place in sorted(found):
        mean, half = mean_and_interval([measured for measured, _ in found[place]])
        low, high = (None, None) if half is None else (mean - half, mean + half)
        of = found[place][0][1]
        if alone and of:
            low, high = wilson(mean, int(of))
        elif of and low is not None and high is not None:
            least, most = wilson(min(max(mean, 0.0), 1.0), int(of))
            low, high = max(0.0, min(low, least)), min(1.0, max(high, most))
        points.append(Point(place, mean, low, high, len(found[place])))
    return points


def wilson(share: float, examples: int) -> tuple[float, float]:
    """The 95% interval of a share of so many examples (Wilson, 1927), which is right at 0 and 1, too."""
    z2 = NORMAL95**2 / examples
    middle = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(share * (1 - share) * z2 + z2 * z2 / 4) / (1 + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of a mean; None for a single value."""
    half = mean_and_interval(values)[1]
    return None if half is None else half / student(len(values) - 1)


def seeds_of(rows: Iterable[Row]) -> str:
    """How many seeds a mean at one place of a plot is over: 1 seed, 3 seeds, 1 to 3 seeds."""
    cells = grouped(rows, "model", "task", "method", "target_sparsity", "mode", "dense_merge").values()
    counts = {len({row["seed"] for row in cell}) for cell in cells} or {0}
    least, most = min(counts), max(counts)
    return counted(most, "seed") if least == most else f"{least} to {most} seeds"


def grouped(rows: Iterable[Row], *fields: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of fields, in the order in which those first come."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(field) for field in fields), []).append(row)
    return found


def kind_of_merge(row: Row) -> str:
    """What became of the zeros: kept by training through the mask, put back, or filled."""
    if row.get("mode") != "sparse_to_dense":
        return "sparse-to-sparse"
    return "sparse-to-dense, masked again" if row.get("dense_merge") == "remask" else "sparse-to-dense, merged dense"


def by_merge(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by their kind of merge, the one through the mask first."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: str(row.get("mode")), reverse=True):
        found.setdefault(kind_of_merge(row), []).append(row)
    return found


def measured_alike(rows: Sequence[Row]) -> bool:
    """Whether accuracies were measured in one way, so that they may stand in one plot."""
    ways = {
        tuple(row.get(field) for field in ("metric", "split", "examples", "num_fewshot"))
        for row in rows
        if row.get("accuracy") is not None
    }
    return len(ways) <= 1


def merge_costs(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Each sparse-to-dense run beside the sparse-to-sparse one that differs from it in nothing else.

    `difference` is the accuracy of sparse-to-dense minus that of sparse-to-sparse; the rest is what the merge did by
    the certificate of the sparse-to-dense run.
    """
    found = []
    for key, pair in grouped(rows, "model", "task", "method", "target_sparsity", "seed").items():
        sparse = [row for row in pair if row.get("mode") == "sparse_to_sparse" and row.get("accuracy") is not None]
        for dense in (row for row in pair if row.get("mode") == "sparse_to_dense"):
            other = sparse[0] if len(sparse) == 1 else None
            both = other is not None and dense.get("accuracy") is not None and measured_alike([other, dense])
            found.append(
                dict(zip(("model", "task", "method", "target_sparsity", "seed"), key, strict=True))
                | {
                    "merge": kind_of_merge(dense),
                    "difference": dense["accuracy"] - other["accuracy"] if both and other else None,
                }
                | {name: dense.get(name) for name in ("off_mask_nonzeros", "merged_sparsity", "argmax_agreement")}
                | {"max_abs_logit_difference": dense.get("max_abs_logit_difference")}
            )
    return found


def front(points: Iterable[tuple[float, float]], tolerance: float = 0.0) -> list[tuple[float, float]]:
    """Points that no other beats in both values (larger is better in both), by rising first value.

    Args:
        points: pairs of values.
        tolerance: share by which first values may differ and still count as equal.
    """
    kept: list[tuple[float, float]] = []
    ordered = sorted(set(points), reverse=True)
    for x, y in ordered:
        better = any(other > y and place >= x * (1 - tolerance) for place, other in ordered)
        if not better and (not kept or y > kept[-1][1]):
            kept.append((x, y))
    return kept[::-1]
