"""How figures are written: one way for the HTML report, the model card and the terminal."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from phoenix_sparse.report.facts import Facts
from phoenix_sparse.report.records import Accuracy, Allocation

MISSING = "not measured"


def percent(share: float, digits: int = 1) -> str:
    """0.5 as 50.0%. A share just short of 0 or 1 isn't rounded onto it."""
    text = f"{100 * share:.{digits}f}"
    if (float(text) == 100 and share < 1) or (float(text) == 0 and share > 0):
        return f"{100 * share:.6f}".rstrip("0").rstrip(".") + "%"
    return text + "%"


def accuracy(measured: Accuracy | None) -> str:
    """An accuracy with its standard error, in per cent: 41.2% ± 1.4."""
    if measured is None:
        return MISSING
    error = "" if measured.stderr is None else f" ± {100 * measured.stderr:.1f}"
    return percent(measured.accuracy) + error


def left_out(facts: Facts) -> str | None:
    """How many training examples the fine-tune left out; None where it trained on all, or isn't known to have."""
    tune, task = facts.tunes.get("tuned"), facts.manifest.inputs.task
    if tune is None or not tune.examples_left_out:
        return None
    of = f" of {number(task.train)}" if task is not None and task.train else ""
    return f"{number(tune.examples_left_out)}{of}, too long for finetune.max_length"


def number(value: float) -> str:
    """A count with its thousands apart: 1,234,567."""
    return f"{value:,.0f}"


def scaled(value: float, unit: str = "") -> str:
    """A large number in thousands, millions and so on, to three digits: 1.23 G."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999,900 is 1 M to three digits, not 1,000 k.
        if abs(value) >= 0.9995 * factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def size(count: float) -> str:
    """Bytes in binary units: 1.5 GiB."""
    value, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "bytes" else f"{value:.1f} {units[0]}"


def seconds(value: float | None) -> str:
    """A duration: 4.2 s, 3 min 05 s, 2 h 10 min."""
    if value is None:
        return MISSING
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def times(reduction: float | None) -> str:
    return "–" if reduction is None else f"{reduction:.2f}×"


def difference(one: Accuracy, other: Accuracy, paired: tuple[float, float] | None = None) -> str:
    """One accuracy minus another in points, with its standard error.

    Args:
        one: measured.
        other: measured on the same split.
        paired: mean and standard error of the difference on the same examples; without it the error is that of two
            independent measurements.
    """
    points = f"{100 * (one.accuracy - other.accuracy):+.1f}".replace("-", "−")
    if paired is not None:
        return f"{points} ± {100 * paired[1]:.1f} points"
    if one.stderr is None or other.stderr is None:
        return f"{points} points"
    return f"{points} ± {100 * math.hypot(one.stderr, other.stderr):.1f} points"


def ending(text: str, length: int = 400) -> str:
    """The last characters of a long text: of a prompt, the question."""
    return text.strip() if len(text.strip()) <= length else "… " + text.strip()[-length:]


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """A recipe's settings as rows: ("sparsify.sparsity", "0.5")."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _plain(value)


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list) and value:
        return ", ".join(_plain(item) for item in value)
    return str(value)


def pruning(allocation: Allocation) -> str:
    """How the masks were made: importance or update, pattern, allocation, and what was measured on."""
    chosen = allocation.update in ("sparsegpt", "alps")  # by scores of its own, except in an evolutionary search
    parts = []
    if allocation.importance and (not chosen or allocation.method == "evolutionary"):
        parts.append(f"importance {allocation.importance}{' (in the search)' if chosen else ''}")
    if allocation.update not in (None, "none"):
        parts.append(f"update {allocation.update}")
    if allocation.pattern:
        parts.append(f"pattern {allocation.pattern}")
    method = "written down" if allocation.method == "explicit" else allocation.method
    parts.append(f"allocation {'by one threshold for all layers' if allocation.group == 'global' else method}")
    if allocation.calibration_sequences:
        count, length = number(allocation.calibration_sequences), number(allocation.calibration_length or 0)
        parts.append(f"measured on {count} sequences of {length} tokens")
    if allocation.calibration_examples:
        parts.append(f"gradients of {number(allocation.calibration_examples)} examples")
    return ", ".join(parts)


def headline(facts: Facts) -> str:
    """What came out, in one sentence, of measured figures only."""
    parts = []
    tuned = facts.accuracies.get("tuned")
    if tuned:
        against = [
            f"{name} {percent(facts.accuracies[role].accuracy)}"
            for role, name in (("dense", "the dense base"), ("dense_lora", "dense LoRA"), ("pruned", "pruning alone"))
            if role in facts.accuracies
        ]
        against_text = f" ({', '.join(against)})" if against and facts.accuracies_compare else ""
        parts.append(f"{accuracy(tuned)} accuracy on {tuned.task}{against_text}")
    certificate = facts.certificate
    if certificate:
        off = certificate.off_mask_nonzeros
        kept = "no weight off the mask is non-zero" if off == 0 else f"{number(off)} weights off the mask are non-zero"
        parts.append(f"{percent(certificate.sparsity)} sparsity after the merge, where {kept}")
    if facts.flops and facts.flops.decode.total.reduction:
        parts.append(f"{facts.flops.decode.total.reduction:.2f} times fewer FLOPs for a token written")
    if not parts:
        return "Nothing has been measured in this run yet."
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]
