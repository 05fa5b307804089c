"""A run as one row of a table: what it was, and what was measured in it. A missing result is None."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_json
from phoenix_sparse.report.facts import Facts, read_facts
from phoenix_sparse.report.html import is_local
from phoenix_sparse.report.records import Stage
from phoenix_sparse.report.text import flatten

Row = dict[str, Any]
MANIFEST = "manifest.json"
DEEPEST = 4  # directories below the one given in which runs are looked for


def find_runs(directory: Path) -> list[Path]:
    """Run directories below a directory, or itself.

    Raises:
        PhoenixError: there is none.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise PhoenixError(f"{directory}: no such directory; give a run's, or one that holds runs")
    found = sorted(_walk(directory, DEEPEST))
    if not found:
        raise PhoenixError(f"{directory}: no run lies in it (no {MANIFEST}); give a run's directory, or one of runs")
    return found


def _walk(directory: Path, depth: int) -> Iterator[Path]:
    if (directory / MANIFEST).is_file():
        yield directory
    elif depth:
        for child in directory.iterdir():
            if child.is_dir() and not child.is_symlink() and child.name[0] != ".":
                yield from _walk(child, depth - 1)


def missing_rows(runs: Path, found: Iterable[Path]) -> Iterator[Row]:
    """Cells of a sweep of which no run lies there: not begun yet, or failed before it could be; nothing else is known.

    Args:
        runs: where the runs were looked for; one that is no sweep's directory misses none.
        found: their directories.
    """
    there = {directory.name for directory in found}
    for label in sorted(Path(runs).glob("cells/*/cell.json")):
        if label.parent.name not in there:
            known = ("model", "task", "method", "seed")
            row: Row = {}
            with contextlib.suppress(PhoenixError, AttributeError):  # damaged: its name is known, and is enough
                axes = read_json(label)
                row = {name: axes.get(name) for name in known} | {"target_sparsity": axes.get("sparsity")}
            yield {
                "run": label.parent.name,
                "directory": label.parent.name,
                **row,
                "finished": False,
                "status": "missing",
            }


def run_row(directory: Path) -> Row:
    """Read a run's files into one row.

    Every key stands in every row, with None where nothing was measured or recorded. Accuracies and sparsities are
    shares from 0 to 1, times are seconds, sizes bytes; FLOPs are counted from shapes and non-zeros.

    Raises:
        PhoenixError: one of the run's files is damaged.
    """
    facts = read_facts(directory)
    recipe = facts.recipe or {}
    status = _status(facts.manifest.stages)
    row: Row = {
        "run": facts.manifest.name,
        "directory": directory.name,
        "finished": status == "done",
        "status": status,
        **_axes(directory, recipe),
        **_accuracies(facts),
        **_certificate(facts),
        **_flops(facts),
        **_speed(directory, facts),
        **_provenance(facts, directory),
    }
    return row


def _status(stages: Mapping[str, Stage]) -> str:
    """How a run ended: done, interrupted or failed; unfinished where nobody noted it, or it is at work."""
    if "report" in stages and all(stage.status == "done" for stage in stages.values()):
        return "done"
    last = max(stages.values(), key=lambda stage: stage.begun, default=None)
    return last.status if last is not None and last.status in ("interrupted", "failed") else "unfinished"


def settings_columns(directory: Path) -> Row:
    """Every setting of a run's recipe, as `settings.sparsify.sparsity` and so on."""
    recipe = read_facts(directory).recipe
    return {f"settings.{name}": value for name, value in flatten(recipe or {})}


def method_name(sparsify: Mapping[str, Any]) -> str:
    """A pruning in the words of `phx prune --compare`: wanda+owl, sparsegpt+2:4."""
    update, allocation = sparsify.get("update"), sparsify.get("allocation")
    words = []
    if update not in ("sparsegpt", "alps") or allocation == "evolutionary":
        words.append(sparsify.get("importance"))
    if update not in (None, "none"):
        words.append(update)
    if allocation not in (None, "uniform"):
        words.append(allocation if isinstance(allocation, str) else "explicit")
    if sparsify.get("pattern") not in (None, "unstructured"):
        words.append(sparsify["pattern"])
    if sparsify.get("group") == "global":
        words.append("global")
    return "+".join(str(word) for word in words if word) or "unknown"


def _axes(directory: Path, recipe: Mapping[str, Any]) -> Row:
    """Where the run stands among others: by its sweep's labels where it has one, else by its recipe."""
    sparsify, finetune = _section(recipe, "sparsify"), _section(recipe, "finetune")
    task = recipe.get("task")
    model = str(recipe.get("model", "unknown"))
    row: Row = {
        "model": Path(model).name if is_local(model) else model,
        "task": Path(str(task.get("name") if isinstance(task, Mapping) else task)).name,
        "method": method_name(sparsify),
        "target_sparsity": sparsify.get("sparsity"),
        "mode": finetune.get("mode"),
        "dense_merge": finetune.get("dense_merge"),
        "seed": recipe.get("seed"),
    }
    label = directory.parent.parent / "cells" / directory.name / "cell.json"
    if label.is_file():
        axes = read_json(label)
        if isinstance(axes, dict):
            row |= {name: str(axes[name]) for name in ("model", "task", "method") if name in axes}
    return row


def _accuracies(facts: Facts) -> Row:
    tuned = facts.accuracies.get("tuned")
    row: Row = {name: getattr(tuned, name, None) for name in ("metric", "split", "examples", "num_fewshot")}
    for role, name in (("tuned", ""), ("pruned", "_pruned"), ("dense", "_dense"), ("dense_lora", "_dense_lora")):
        measured = facts.accuracies.get(role)
        row[f"accuracy{name}"] = measured.accuracy if measured else None
        row[f"stderr{name}"] = measured.stderr if measured else None
        perplexity = facts.perplexities.get(role)
        row[f"perplexity{name}"] = perplexity.perplexity if perplexity else None
    return row


def _certificate(facts: Facts) -> Row:
    certificate, allocation = facts.certificate, facts.allocation
    return {
        "mask_sparsity": allocation.sparsity if allocation else None,
        "merged_sparsity": certificate.sparsity if certificate else None,
        "off_mask_nonzeros": certificate.off_mask_nonzeros if certificate else None,
        "max_abs_logit_difference": certificate.max_abs_logit_difference if certificate else None,
        "argmax_agreement": certificate.argmax_agreement if certificate else None,
    }


def _flops(facts: Facts) -> Row:
    flops = facts.flops
    row: Row = {}
    for name, part in (("prefill", flops and flops.prefill), ("decode", flops and flops.decode)):
        row[f"{name}_flops"] = part.total.sparse if part else None
        row[f"{name}_flops_dense"] = part.total.dense if part else None
    row["prompt_length"] = flops.prompt_length if flops else None
    row["context_length"] = flops.context_length if flops else None
    row["parameters"] = flops.parameters.total if flops else None
    row["nonzero_parameters"] = flops.parameters.nnz if flops else None
    row["packed_bytes"] = flops.bytes.nonzero_values_and_bitmask if flops else None
    return row


def _speed(directory: Path, facts: Facts) -> Row:
    """Training as the run measured it, and inference where `phx bench` wrote bench.json beside the run's files."""
    tune = facts.tunes.get("tuned")
    whole = tune is not None and tune.resumed_from is None and bool(tune.tokens) and bool(tune.seconds)
    row: Row = {
        # A resumed training knows the time of its last part only.
        "train_tokens_per_second": tune.tokens / tune.seconds if whole else None,  # type: ignore[operator,union-attr]
        "train_seconds": tune.seconds if tune is not None and whole else None,
        "train_peak_bytes": tune.peak_memory_bytes if tune else None,
        "train_examples_left_out": tune.examples_left_out if tune else None,
        "trainable_parameters": tune.trainable_parameters if tune else None,
        "bench_batch": None,
    }
    bench = _bench(directory / "bench.json")
    for phase in ("prefill", "decode"):
        for form in ("sparse", "dense"):
            row[f"{phase}_tokens_per_second{'' if form == 'sparse' else '_dense'}"] = (
                bench[phase]["tokens_per_second"][form]["median"] if bench else None
            )
    if bench:
        row["bench_batch"] = bench["batch"]
    return row


def _bench(path: Path) -> Mapping[str, Any] | None:
    """The smallest batch that was measured."""
    if not path.is_file():
        return None
    try:
        found: Mapping[str, Any] = min(read_json(path)["throughput"], key=lambda one: one["batch"])
        for phase in ("prefill", "decode"):
            for form in ("sparse", "dense"):
                float(found[phase]["tokens_per_second"][form]["median"])
    except (KeyError, TypeError, ValueError) as error:
        raise PhoenixError(f"{path}: not what `phx bench --out` writes; measure it anew") from error
    return found


def _provenance(facts: Facts, directory: Path) -> Row:
    manifest = facts.manifest
    host, stages = manifest.host, manifest.stages
    shared = _shared(directory)
    seconds = [stage.seconds for name, stage in stages.items() if stage.seconds is not None]
    return {
        "created": manifest.created,
        "seconds": sum(seconds) if seconds else None,
        "shared_stages": ", ".join(sorted(shared)) or None,
        "phoenix": manifest.phoenix,
        "git_commit": manifest.git_commit,
        **{f"host_{name}": getattr(host, name) for name in ("platform", "cpu", "cores", "gpu", "memory_bytes")},
        **{f"version_{name}": version for name, version in sorted(manifest.versions.items())},
        "model_sha256": manifest.inputs.model.sha256 if manifest.inputs.model else None,
        "train_examples": manifest.inputs.task.train if manifest.inputs.task else None,
    }


def _shared(directory: Path) -> list[str]:
    """Stages whose outputs another run made."""
    stages = read_json(directory / MANIFEST).get("stages", {})
    return [name for name, stage in stages.items() if isinstance(stage, dict) and "shared" in stage]


def _section(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = recipe.get(name)
    return section if isinstance(section, Mapping) else {}
