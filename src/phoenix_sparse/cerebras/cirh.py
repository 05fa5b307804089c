"""The sparsity that the compiler saw, from the CIRH that its front end writes."""

import math
import re
from collections.abc import Mapping
from typing import Any

ATTRIBUTES = re.compile(r"\{[^{}]*tf\.resource_name = \"([^\"]+)\"[^{}]*\}")
SPARSITY = re.compile(r"\bcs\.sparsity = ([0-9.eE+-]+) : f32")
PREFIX = "state.model."
TOLERANCE = 1e-6  # the front end keeps shares as float32


def annotations(text: str) -> dict[str, float | None]:
    """`cs.sparsity` of every weight and buffer among the program's arguments, None where there is none.

    Args:
        text: of cirh.mlir: an argument's attributes are one dictionary with its `tf.resource_name`.

    Returns:
        By name, without the Trainer's `model.`.
    """
    found: dict[str, float | None] = {}
    for match in ATTRIBUTES.finditer(text):
        if not match[1].startswith(PREFIX):
            continue
        name = match[1].removeprefix(PREFIX).removeprefix("model.")
        share = SPARSITY.search(match[0])
        # An output carries the name of its argument too; what is said of one holds for both.
        found[name] = float(share[1]) if share else found.get(name)
    return found


def compared(seen: Mapping[str, float | None], wanted: Mapping[str, float]) -> dict[str, Any]:
    """Compare what the compiler saw with what is true.

    Args:
        seen: from `annotations`.
        wanted: the true sparsity of every pruned weight.

    Returns:
        `weights`: sparsity, compiler_sparsity and verdict (`right`, `wrong` or `missing`) by name; `right`: how many;
        `valid`: whether all are.
    """
    weights = {}
    for name, share in wanted.items():
        found = seen.get(name)
        if found is None:
            verdict = "missing"
        else:
            verdict = "right" if math.isclose(found, share, rel_tol=0, abs_tol=TOLERANCE) else "wrong"
        weights[name] = {"sparsity": share, "compiler_sparsity": found, "verdict": verdict}
    right = sum(weight["verdict"] == "right" for weight in weights.values())
    return {"weights": weights, "right": right, "valid": bool(weights) and right == len(weights)}
