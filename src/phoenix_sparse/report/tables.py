"""Tables for the terminal: how a run ended, a count of FLOPs, a plan, a comparison of initialisations."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.report.facts import ROLES, read_facts
from phoenix_sparse.report.records import Accuracy, Flops
from phoenix_sparse.report.text import MISSING, accuracy, left_out, number, percent, scaled, seconds, size, times

if TYPE_CHECKING:
    from rich.table import Table


def summary_table(run_directory: Path) -> "Table":
    """The four accuracies, the sparsity that the certificate measured, and the FLOPs of a run.

    Raises:
        PhoenixError: not a run directory, or a damaged one.
    """
    from rich.table import Table
    from rich.text import Text

    facts = read_facts(run_directory)
    # Text objects, as rich would read a [name] in a plain string as its own markup.
    table = Table(title=Text(facts.manifest.name), show_header=False, title_justify="left", caption_justify="left")
    table.add_column(style="dim")
    table.add_column(justify="right")
    for role in ROLES:
        style = "bold" if role == "tuned" else ""
        value = accuracy(facts.accuracies.get(role))
        table.add_row(
            Text(f"accuracy, {facts.role_names[role].lower().replace('lora', 'LoRA')}"), Text(value, style=style)
        )
    if any(role in facts.accuracies for role in ROLES):
        table.caption = "±: standard error by the evaluated examples"
    certificate, flops = facts.certificate, facts.flops
    table.add_section()
    table.add_row("sparsity after the merge", percent(certificate.sparsity) if certificate else MISSING)
    table.add_row("non-zeros off the mask", number(certificate.off_mask_nonzeros) if certificate else MISSING)
    table.add_section()
    for name, part in (("read the prompt", flops and flops.prefill), ("write one token", flops and flops.decode)):
        cost = part.total if part else None
        text = f"{scaled(cost.dense)} → {scaled(cost.sparse)} ({times(cost.reduction)})" if cost else MISSING
        table.add_row(f"FLOPs to {name}", text)
    if (short := left_out(facts)) is not None:
        table.add_section()
        table.add_row("training examples left out", short)
    return table


def flops_table(counted: Mapping[str, Any]) -> "Table":
    """FLOPs by part, dense and sparse, from what `count_flops` gives.

    Raises:
        PhoenixError: the figures are not those of `count_flops`.
    """
    from rich.table import Table

    try:
        flops = Flops.model_validate(counted)
    except ValidationError as error:
        raise PhoenixError(f"flops: {error.errors()[0]['loc']} is wrong or missing; count them anew") from error
    table = Table(title="FLOPs", title_justify="left")
    table.add_column("")
    for heading in ("dense", "sparse", "fewer"):
        table.add_column(heading, justify="right")
    prompt, context = number(flops.prompt_length), number(flops.context_length)
    for name, part in (
        (f"a prompt of {prompt} tokens", flops.prefill),
        (f"one token at a context of {context}", flops.decode),
    ):
        for label, cost in (("linears", part.linears), ("lm_head", part.lm_head)):
            table.add_row(f"{name}: {label}", scaled(cost.dense), scaled(cost.sparse), times(cost.reduction))
        table.add_row(f"{name}: attention", scaled(part.attention), scaled(part.attention), times(1.0))
        total = part.total
        table.add_row(f"{name}: total", scaled(total.dense), scaled(total.sparse), times(total.reduction), style="bold")
        table.add_section()
    if (training := counted.get("training")) is not None:
        each = scaled(training["per_token"])  # dense products, whatever the mask
        table.add_row(f"one token of training, rank {training['rank']}", each, each, times(1.0))
        table.add_section()
    weights, sizes = flops.parameters, flops.bytes
    fewer = weights.total / weights.nnz if weights.nnz else None
    table.add_row("non-zero parameters", scaled(weights.total), scaled(weights.nnz), times(fewer))
    fewer = sizes.dense / sizes.nonzero_values_and_bitmask if sizes.nonzero_values_and_bitmask else None
    table.add_row("weights, with a bit mask", size(sizes.dense), size(sizes.nonzero_values_and_bitmask), times(fewer))
    return table


def projection_table(counted: Mapping[str, Any]) -> "Table":
    """Tokens a second by machine, from the `projected` part of flops.json."""
    from rich.table import Table

    table = Table(
        title="Projected tokens a second: a roofline, an upper bound, not measured",
        title_justify="left",
        caption=counted["projected"]["note"],
        caption_justify="left",
    )
    table.add_column("")
    for heading in ("sequences", "prefill, dense", "packed", "decode, dense", "packed"):
        table.add_column(heading, justify="right")
    for row in counted["projected"]["rows"]:
        ways = [row[kind] and row[kind][part] for part in ("prefill", "decode") for kind in ("dense", "packed")]
        rates = ["does not fit" if way is None else scaled(way["tokens_per_second"]) for way in ways]
        table.add_row(row["system"], number(row["batch"]), *rates)
    return table


def plan_table(figures: Mapping[str, Mapping[str, float]]) -> "Table":
    """What a recipe would need, from `plan.estimate`: groups of figures, written by the group's unit."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Plan (estimates)", title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column()
    table.add_column(justify="right")
    titles = {"memory_bytes": "memory of training", "search_bytes": "memory of the search", "disk_bytes": "disk"}
    titles |= {"pruning_bytes": "memory of pruning", "seconds": "time"}
    for group, values in figures.items():
        for index, (name, value) in enumerate(values.items()):
            if group in titles:
                text = seconds(value) if group == "seconds" else size(value)
            else:
                text = scaled(value) if value >= 1e9 else number(value)
            table.add_row(titles.get(group, group) if index == 0 else "", Text(name), text)
        table.add_section()
    return table


def compare_table(compared: Mapping[str, Any]) -> "Table":
    """A comparison of initialisations, from what `compare` writes: the best after the fine-tune first."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    title = f"Accuracy (± standard error) on the {compared['split']} split before and after the fine-tune, with ranks"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("initialisation", overflow="fold")
    for heading in ("sparsity", "before", "", "after", "", "pruning"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in compared["specs"]:
        name = Text(entry["spec"])
        if "error" in entry:
            table.add_row(name, Text("failed", style="red"))
            continue
        table.add_row(
            name,
            percent(entry["sparsity"]),
            *(accuracy(Accuracy.model_validate(entry["before"])), f"{entry['rank_before']}."),
            *(Text(accuracy(Accuracy.model_validate(entry["after"])), style="bold"), f"{entry['rank_after']}."),
            seconds(entry["pruning_seconds"]),
        )
    return table
