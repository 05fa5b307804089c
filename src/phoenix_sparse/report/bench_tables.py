"""Tables of measured speed, from what `runtime.bench.measure` gives."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from phoenix_sparse.report.series import counted
from phoenix_sparse.report.text import size

if TYPE_CHECKING:
    from rich.table import Table


def bench_tables(record: Mapping[str, Any]) -> list["Table"]:
    """Tokens per second by batch size, and training and single linears where they were measured."""
    tables = [_throughput(record)]
    if record.get("training"):
        tables.append(_training(record))
    return [*tables, _layers(record)] if record["layers"] else tables


def _throughput(record: Mapping[str, Any]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    weights = record["weight_bytes"]
    title = (
        f"{record['model']}: weights {size(weights['dense'])} dense, {size(weights['sparse'])} packed "
        f"({record['values']} values{_kept(record)}); {record['dtype']}, {counted(record['threads'], 'thread')}"
    )
    table = Table(
        title=Text(title),
        title_justify="left",
        caption=Text("tokens a second: median [quartiles]; sparse / dense: median of the turns' ratios"),
        caption_justify="left",
    )
    peaks = any(value is not None for row in record["throughput"] for value in row.get("peak_bytes", {}).values())
    memory = ("peak memory, dense", "sparse") if peaks else ()
    for heading in ("batch", "phase", "dense", "sparse", "sparse / dense", *memory):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    for row in record["throughput"]:
        for phase in ("prefill", "decode"):
            found = row[phase]["tokens_per_second"]
            table.add_row(
                str(row["batch"]),
                phase,
                Text(_spread(found["dense"])),
                Text(_spread(found["sparse"])),
                Text(f"{row[phase]['ratio']:.2f}x", style="bold"),
                *(size(row["peak_bytes"][form]) if phase == "decode" else "" for form in ("dense", "sparse") if peaks),
            )
    return table


def _kept(record: Mapping[str, Any]) -> str:
    """What packed linears kept for prompts, if anything: the weights then count it."""
    prefill = record.get("prefill", "packed")
    if prefill == "packed":
        return ""
    return f", prefill={prefill}, which kept {' and '.join(record.get('copies', ())) or 'nothing'}"


def _training(record: Mapping[str, Any]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    rows = record["training"]
    table = Table(
        title=Text(f"fine-tuning, LoRA of rank {rows[0]['rank']} on all linears, {rows[0]['length']} tokens a sample"),
        title_justify="left",
        caption=Text("samples a second: median [quartiles]; dense: the mask taken off, the zeros lost at the merge"),
        caption_justify="left",
    )
    for heading in ("batch", "dense", "masked", "masked / dense", "peak memory, dense", "masked"):
        table.add_column(heading, justify="right")
    for row in rows:
        found, peaks = row["samples_per_second"], row["peak_bytes"]
        table.add_row(
            str(row["batch"]),
            Text(_spread(found["dense"])),
            Text(_spread(found["masked"])),
            Text(f"{row['ratio']:.2f}x", style="bold"),
            *("–" if peaks[way] is None else size(peaks[way]) for way in ("dense", "masked")),
        )
    return table


def _spread(found: Mapping[str, float]) -> str:
    digits = 1 if found["median"] < 100 else 0
    return f"{found['median']:,.{digits}f} [{found['low']:,.{digits}f}–{found['high']:,.{digits}f}]"


def _layers(record: Mapping[str, Any]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    bandwidth = record["layers"][0]["bandwidth"] / 1e9
    table = Table(
        title=Text(f"single linears; reading memory at {bandwidth:.1f} GB/s"),
        title_justify="left",
        caption=Text("ms: median [quartiles]; bandwidth: bytes of weights a second over that"),
        caption_justify="left",
    )
    for heading in ("out x in", "batch", "kind", "ms", "bandwidth", "sparse is"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for row in record["layers"]:
        sparse = row["kinds"]["sparse"]["seconds"]["median"]
        for kind, found in row["kinds"].items():
            seconds = found["seconds"]
            table.add_row(
                f"{row['shape'][0]}x{row['shape'][1]}",
                str(row["batch"]),
                kind,
                Text(f"{seconds['median'] * 1e3:.3f} [{seconds['low'] * 1e3:.3f}–{seconds['high'] * 1e3:.3f}]"),
                f"{found['bandwidth_share']:.0%}",
                "" if kind == "sparse" else f"{seconds['median'] / sparse:.2f}x",
            )
    return table
