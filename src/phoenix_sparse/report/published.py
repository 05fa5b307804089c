"""Published figures that ours stand beside, with their sources, and what differs from a run of ours."""

from collections.abc import Sequence
from dataclasses import dataclass

from phoenix_sparse.report.series import Row, by_merge, counted, grouped, mean_and_interval, standard_error

SQFT = "SQFT, arXiv 2501.16372, Table 2"
SHEARS = "README of Shears, IntelLabs"
ISSUE = "issue 39 of its repository, IntelLabs"
# The task of the figure by our name, or None where it is an average over tasks.
SAME_TASK = {"GSM8K": "gsm8k", "MAWPS": "mawps", "SVAMP": "svamp"}
TALK = (
    "The Phoenix talk's setting is two models, three tasks, unstructured, structured and random masks, 0 to 90% in "
    "steps of 10%, sparse-to-sparse and sparse-to-dense: 360 runs, which recipes/sweep-360.yaml lays out. No accuracy "
    "of it is published in a form that could be cited here, so none stands in the table."
)


@dataclass(frozen=True)
class Figure:
    """An accuracy that somebody published."""

    source: str
    model: str
    parameters: float  # billions
    task: str
    sparsity: float
    method: str
    accuracy: float  # per cent


def _shears(task: str, *values: float) -> list[Figure]:
    kinds = ((0.0, "dense LoRA"), (0.4, "Shears"), (0.5, "Shears"))
    return [
        Figure(SHEARS, "LLaMA-7B", 6.7, task, sparsity, method, value)
        for (sparsity, method), value in zip(kinds, values, strict=True)
    ]


FIGURES = [
    Figure(SQFT, "Mistral-7B-v0.3", 7.2, "GSM8K", 0.0, "dense, untuned", 36.0),
    Figure(SQFT, "Mistral-7B-v0.3", 7.2, "GSM8K", 0.5, "LoRA on the sparse base", 44.1),
    Figure(SQFT, "Mistral-7B-v0.3", 7.2, "GSM8K", 0.5, "Shears", 45.1),
    Figure(SQFT, "Mistral-7B-v0.3", 7.2, "GSM8K", 0.5, "SQFT + SparsePEFT", 50.1),
    Figure(ISSUE, "Llama-3-8B", 8.0, "GSM8K", 0.5, "Shears", 52.2),
    *_shears("GSM8K", 37.5, 36.8, 36.1),
    *_shears("MAWPS", 79.0, 83.2, 78.6),
    *_shears("SVAMP", 52.1, 47.7, 44.5),
    *_shears("math, average of 4", 46.9, 46.9, 45.3),
    *_shears("commonsense, average of 8", 74.7, 74.9, 72.5),
    *(
        Figure(SHEARS, "MPT-7B", 6.6, "GSM8K", sparsity, "Shears" if sparsity else "dense LoRA", value)
        for sparsity, value in ((0.0, 36.1), (0.4, 35.7), (0.5, 33.4), (0.6, 30.4), (0.7, 22.8))
    ),
]


@dataclass(frozen=True)
class Beside:
    """Published figures of one task, kind of model and sparsity, with our runs of the same."""

    task: str
    sparsity: float
    theirs: list[Figure]
    ours: list[str]  # one line a model, method and kind of merge; empty where we have none
    differs: list[str]


def beside(rows: Sequence[Row]) -> list[Beside]:
    """All published figures, with what we measured that comes nearest. Nothing of ours is filled in or scaled."""
    groups: dict[tuple[str, float, str], list[Figure]] = {}
    for figure in FIGURES:
        groups.setdefault((figure.task, figure.sparsity, _column(figure)), []).append(figure)
    found = []
    for (task, sparsity, column), figures in groups.items():
        near = [
            row
            for row in rows
            if row.get(column) is not None
            and row.get("task") == SAME_TASK.get(task)
            and (column != "accuracy" or abs((row.get("target_sparsity") or 0) - sparsity) < 1e-6)
        ]
        found.append(Beside(task, sparsity, figures, _ours(near, column), _differs(figures, near)))
    return found


def _column(figure: Figure) -> str:
    """Which of our accuracies stands beside a figure."""
    return {"dense, untuned": "accuracy_dense", "dense LoRA": "accuracy_dense_lora"}.get(figure.method, "accuracy")


def _ours(rows: Sequence[Row], column: str) -> list[str]:
    lines = []
    if column != "accuracy":  # a baseline is the model's, whatever was pruned beside it
        for (model,), group in grouped(rows, "model").items():
            by_seed = {row.get("seed"): 100 * row[column] for row in group}
            lines.append(f"{_spread(list(by_seed.values()))}: {model}, {column.removeprefix('accuracy_')}")
        return [line.replace("dense_lora", "dense LoRA") for line in lines]
    for (model, method), group in grouped(rows, "model", "method").items():
        for merge, part in by_merge(group).items():
            lines.append(f"{_spread([100 * row['accuracy'] for row in part])}: {model}, {method}, {merge}")
    return lines


def _spread(values: Sequence[float]) -> str:
    mean, error = mean_and_interval(values)[0], standard_error(values)
    return f"{mean:.1f} (one seed)" if error is None else f"{mean:.1f} ± {error:.1f} ({len(values)} seeds)"


def _differs(figures: Sequence[Figure], rows: Sequence[Row]) -> list[str]:
    """What keeps theirs and ours from being one measurement."""
    if not rows:
        return []
    theirs = " and ".join(dict.fromkeys(f"{one.model} ({one.parameters:g} billion parameters)" for one in figures))
    sizes = sorted({row["parameters"] for row in rows if row.get("parameters")})
    ours = " and ".join(_millions(size) for size in sizes) or "not recorded"
    found = [f"the model: {theirs} there, {ours} here"]
    shots = sorted({row["num_fewshot"] for row in rows if row.get("num_fewshot") is not None})
    examples = sorted({row["examples"] for row in rows if row.get("examples")})
    of_test = " and ".join(counted(count, "example") for count in examples)
    ways = f"{', '.join(map(str, shots))}-shot on {of_test}"
    metrics = ", ".join(sorted({str(row["metric"]) for row in rows if row.get("metric")}))
    found.append(f"the measurement: ours is {ways} by lm-eval ({metrics}), theirs as the source says")
    if any(one.source == SHEARS and one.model == "LLaMA-7B" for one in figures):
        found.append("the training data: a mixture of tasks for LLaMA-7B there, the task's own training split here")
    return found


def _millions(parameters: float) -> str:
    return f"{parameters / 1e9:.1f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.1f} million"
