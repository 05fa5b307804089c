"""The commands of Cerebras systems: cerebras setup, export, trace, import, validate. `cli` joins them to the others."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from phoenix_sparse.commands import refuse_existing, require_writable, require_writable_file, say

app = typer.Typer()
cerebras = typer.Typer(no_args_is_help=True, help="From a run to a job for a Cerebras system, and back.")
app.add_typer(cerebras, name="cerebras")

Python = Annotated[
    Path | None,
    typer.Option(
        help="of the environment with cerebras_pytorch; PHOENIX_CEREBRAS_PYTHON or .venv-cerebras unless given"
    ),
]
RunDirectory = Annotated[Path, typer.Argument(help="a run directory", show_default=False)]


class Mode(StrEnum):
    """How the job trains; both are sparse to the compiler."""

    static = "static"
    sparse_lora = "sparse_lora"


@cerebras.command()
def setup(
    directory: Annotated[Path, typer.Option("--dir", help="of the environment")] = Path(".venv-cerebras"),
    modelzoo: Annotated[
        Path | None, typer.Option(help="a checkout of github.com/Cerebras/modelzoo, Release_2.10.0, to install too")
    ] = None,
    bigcode: Annotated[
        Path | None, typer.Option(help="a checkout of bigcode-evaluation-harness, where GitHub is out of reach")
    ] = None,
    python: Annotated[str | None, typer.Option(help="a Python 3.11; python3.11 unless given")] = None,
) -> None:
    """Make the environment with cerebras_pytorch 2.10 (Python 3.11, 5.7 GB), and ModelZoo in it."""
    from phoenix_sparse.cerebras.environment import VARIABLE
    from phoenix_sparse.cerebras.installing import set_up

    made = set_up(directory, modelzoo=modelzoo, bigcode=bigcode, python=python, say=say)
    say(f"environment: {made}", f"found by itself from here; from elsewhere: export {VARIABLE}={made.absolute()}")
    if modelzoo is None:
        say("validate works with it; export, trace and import need ModelZoo too (--modelzoo DIR)")


@cerebras.command()
def export(
    run: RunDirectory,
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="changes of the training, such as steps=500 or precision=float32"),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="the directory to write", show_default=False)],
    mode: Annotated[Mode, typer.Option(help="train all weights, or a LoRA, through the mask", show_default=False)],
    python: Python = None,
) -> None:
    """Write a run's pruned model and task as a job for a CS-3: checkpoint, YAML, data, runner, README."""
    from phoenix_sparse.cerebras.environment import find_environment
    from phoenix_sparse.cerebras_runs import export_run
    from phoenix_sparse.console import showing

    refuse_existing(out)
    require_writable(out)
    environment = find_environment(python)
    with showing():
        record = export_run(run, out, mode.value, changes or (), environment)
    shares = sorted(set(record["weights"].values()))
    say(
        f"export: {out}",
        f"sparse weights: {len(record['weights'])}, {len(shares)} groups of {shares[0]:.4f} to {shares[-1]:.4f} zeros",
        f"what to do with it: {out / 'README.md'}",
    )


@cerebras.command()
def trace(
    run: Annotated[Path, typer.Argument(help="a run directory, or an export of one", show_default=False)],
    mode: Annotated[Mode, typer.Option(help="for a run directory")] = Mode.sparse_lora,
    output: Annotated[Path | None, typer.Option(help="write the report here, as JSON", show_default=False)] = None,
    python: Python = None,
) -> None:
    """Run the compiler's front end without a system, and say what sparsity it sees of every pruned weight.

    Exits with 1 if it misses one, or sees a wrong one.
    """
    from phoenix_sparse.cerebras.environment import find_environment
    from phoenix_sparse.cerebras_runs import trace_run
    from phoenix_sparse.console import showing
    from phoenix_sparse.files import write_json

    if output is not None:
        require_writable_file(output)
    environment = find_environment(python)
    with showing():
        found = trace_run(run, mode.value, environment)
    for name, weight in found["weights"].items():
        seen = "none" if weight["compiler_sparsity"] is None else f"{weight['compiler_sparsity']:.6f}"
        say(f"{weight['verdict']:7} {weight['sparsity']:.6f}  cs.sparsity {seen}  {name}")
    if output is not None:
        write_json(output, found)
    say(f"{found['right']} of {len(found['weights'])} pruned weights annotated with their true sparsity")
    if not found["valid"]:
        raise typer.Exit(1)


@cerebras.command(name="import")
def import_(
    directory: Annotated[Path, typer.Argument(help="the export, with the job's model_dir", show_default=False)],
    *,
    run: Annotated[Path, typer.Option(help="the run that was exported", show_default=False)],
    out: Annotated[Path, typer.Option(help="the directory to write merged/ and certificate.json to")],
    checkpoint: Annotated[Path | None, typer.Option(help="an .mdl file; the latest of the job unless given")] = None,
    python: Python = None,
) -> None:
    """Take a trained checkpoint back: merge through the mask, convert, and certify as any merge."""
    from phoenix_sparse.cerebras.environment import find_environment
    from phoenix_sparse.cerebras_runs import import_run
    from phoenix_sparse.console import showing

    refuse_existing(out / "merged")
    require_writable(out)
    environment = find_environment(python)
    with showing():
        certificate = import_run(directory, run, out, checkpoint, environment)
    say(
        f"non-zeros off the mask: {certificate['off_mask_nonzeros']}; sparsity {certificate['sparsity']:.4f}; largest "
        f"difference of a logit to ModelZoo's model {certificate['max_abs_logit_difference']:.3g}",
        f"model: {out / 'merged'}",
        f"certificate: {out / 'certificate.json'}",
    )


@cerebras.command()
def validate(
    checkpoint: Annotated[Path, typer.Argument(help="an .mdl file", show_default=False)],
    *,
    masks: Annotated[Path, typer.Option(help="masks.safetensors of the run", show_default=False)],
    output: Annotated[Path, typer.Option(help="the report to write, as JSON", show_default=False)],
    config: Annotated[
        Path | None,
        typer.Option(help="the model's config.json; the export's record near the checkpoint unless given"),
    ] = None,
    python: Python = None,
) -> None:
    """Check the zeros of a Cerebras checkpoint against the masks. Exits with 1 if a weight off its mask isn't zero."""
    from phoenix_sparse.cerebras.environment import find_environment
    from phoenix_sparse.cerebras.validating import validate as check_zeros
    from phoenix_sparse.files import write_json
    from phoenix_sparse.masks import load_mask

    require_writable_file(output)
    given: dict[str, Any] = load_mask(masks)[0]
    found = check_zeros(checkpoint, given, config, find_environment(python))
    write_json(output, found)
    beside = f", {found['adapters']} adapters not merged" if found["adapters"] else ""
    say(
        f"sparsity {found['sparsity']:.4f} over {len(found['weights'])} weights, {found['off_mask_nonzeros']} "
        f"non-zeros off the mask{beside}: {output}"
    )
    if not found["valid"]:
        raise typer.Exit(1)
