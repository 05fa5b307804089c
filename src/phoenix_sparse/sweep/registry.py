"""The registry: every cell's settings, results and provenance as one table, CSV and Parquet."""

from collections.abc import Sequence
from typing import Any

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import atomic_path
from phoenix_sparse.report.run_rows import run_row, settings_columns
from phoenix_sparse.runs import MANIFEST
from phoenix_sparse.sweep.matrix import Cell
from phoenix_sparse.sweep.places import Places, attempts
from phoenix_sparse.sweep.status import Standing

# What a cell is, is said by the sweep, also where there is no run of it.
FIRST = ("cell", "state", "reason", "attempts", "process_seconds", "begun", "node")


def registry_rows(places: Places, cells: Sequence[Cell], found: Sequence[Standing]) -> list[dict[str, Any]]:
    """One row a cell. Results stand only in the rows of runs that are done; nothing is filled in.

    Args:
        places: of the sweep.
        cells: of the sweep.
        found: where each of them stands, in the same order.
    """
    rows = []
    for cell, one in zip(cells, found, strict=True):
        tried = attempts(places.cell(cell.name))
        row: dict[str, Any] = {
            "cell": cell.name,
            "state": one.state,
            "reason": one.reason,
            "attempts": one.attempts,
            "process_seconds": one.seconds,
            "begun": tried[0]["begun"] if tried else None,
            "node": tried[-1]["host"] if tried else None,
        }
        directory = places.run(cell.name)
        if one.state == "done":
            try:
                row |= run_row(directory) | settings_columns(directory)
            except PhoenixError as error:  # a damaged file is this cell's matter, not the table's
                row |= {"state": "failed", "reason": str(error)}
        row |= {axis: value for axis, value in cell.axes.items() if axis != "sparsity"}
        row |= {"target_sparsity": cell.axes["sparsity"], "mode": cell.recipe.finetune.mode}
        row |= {"has_run": (directory / MANIFEST).is_file()}
        rows.append(row)
    return rows


def write_registry(places: Places, cells: Sequence[Cell], found: Sequence[Standing]) -> None:
    """Write registry.csv and registry.parquet."""
    import pandas

    table = pandas.DataFrame(registry_rows(places, cells, found))
    settings = sorted(name for name in table.columns if name.startswith("settings."))
    others = [name for name in table.columns if name not in FIRST and name not in settings]
    table = table[[*FIRST, *others, *settings]].convert_dtypes()
    with atomic_path(places.out / "registry.csv") as temporary:
        table.to_csv(temporary, index=False)
    with atomic_path(places.out / "registry.parquet") as temporary:
        table.to_parquet(temporary, index=False)
