"""The commands of deployment and its cost: flops, pack, unpack, generate, bench. `cli` joins them to the others."""

from pathlib import Path
from typing import Annotated

import typer

from phoenix_sparse.commands import Model, refuse_existing, refuse_run, require_writable_file, say, set_up
from phoenix_sparse.errors import PhoenixError

app = typer.Typer()

PackedModel = Annotated[str, typer.Argument(help="a model that phx pack wrote: its directory", show_default=False)]
AnyModel = Annotated[
    str, typer.Argument(help="as elsewhere (a directory, a hub name, demo), packed or not", show_default=False)
]
Out = Annotated[Path, typer.Option(help="the directory to write", show_default=False)]
DtypeName = Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16")]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu or cuda")]
PrefillName = Annotated[
    str, typer.Option("--prefill", help="what packed linears keep for prompts on a GPU: packed, dense, semi or auto")
]
ValuesName = Annotated[str, typer.Option(help="of the kept weights: auto (as stored), bf16 or int8")]


@app.command()
def flops(
    model: Model,
    *,
    masks: Annotated[Path | None, typer.Option(help="masks.safetensors; dense unless given")] = None,
    sparsity: Annotated[float | None, typer.Option(help="of all matrices of the blocks, in place of masks")] = None,
    out: Annotated[Path | None, typer.Option(help="a directory to write flops.json to", show_default=False)] = None,
    prompt_length: Annotated[int, typer.Option(help="tokens of the prompt")] = 512,
    context_length: Annotated[int, typer.Option(help="positions that a decoded token attends to")] = 1024,
    rank: Annotated[int, typer.Option(min=1, help="of the adapters on all linears, for training")] = 32,
) -> None:
    """Count FLOPs per token and layer, dense and sparse, of inference and training; project them onto machines.

    MODEL may also be llama-3-8b, llama-7b, mistral-7b-v0.3 or mixtral-8x7b, whose configurations come with Phoenix.
    """
    import tempfile

    from phoenix_sparse import steps
    from phoenix_sparse.console import OUT
    from phoenix_sparse.evaluation.hardware import shipped_configuration
    from phoenix_sparse.evaluation.settings import EvaluateSettings
    from phoenix_sparse.files import read_json
    from phoenix_sparse.pipeline import model_directory
    from phoenix_sparse.recipe import check
    from phoenix_sparse.report import flops_table, projection_table

    if sparsity is not None and (masks is not None or not 0 <= sparsity < 1):
        raise PhoenixError(f"flops: --sparsity {sparsity}; give a share from 0 to below 1, or --masks, not both")
    if out is not None:
        refuse_run(out)
    lengths = {"prompt_length": prompt_length, "context_length": context_length}
    settings = check(EvaluateSettings, lengths, "flops")
    with set_up("auto", "cpu", 0, out), tempfile.TemporaryDirectory() as place:
        source = shipped_configuration(model) or model_directory(model)
        where = out or Path(place)
        steps.flops(source, steps.read_masks(masks) if masks else None, settings, where, sparsity=sparsity, rank=rank)
        counted = read_json(where / "flops.json")
    OUT.print(flops_table(counted), projection_table(counted))
    if out is not None:
        say(f"per layer: {out / 'flops.json'}")


@app.command()
def pack(model: Model, *, out: Out, values: ValuesName = "auto") -> None:
    """Write a packed copy of a pruned model: a bit a weight and the kept values. It opens where Phoenix is imported."""
    from phoenix_sparse.console import showing
    from phoenix_sparse.pipeline import model_directory
    from phoenix_sparse.runtime.packing import check_values, pack_model

    chosen = check_values(values)
    refuse_existing(out)
    with showing() as show:
        record = pack_model(model_directory(model), out, values=chosen, progress=show.progress)
    if record["negative_zeros"]:
        say(f"negative zeros: {record['negative_zeros']:,} became zeros; unpacking gives equal weights, not equal bits")
    say(
        f"packed: {out}",
        f"linears: {record['layers']}, {record['nnz'] / record['weights']:.1%} of their weights kept, "
        f"{record['bytes_per_weight']:.3f} bytes a weight",
        f"weights on disk: {record['packed_bytes'] / 2**20:.1f} MiB of {record['dense_bytes'] / 2**20:.1f} "
        f"({record['packed_bytes'] / record['dense_bytes']:.0%})",
    )


@app.command()
def unpack(directory: PackedModel, *, out: Out) -> None:
    """Write the dense directory of a packed one again: bit for bit, unless its values are int8."""
    from phoenix_sparse.console import showing
    from phoenix_sparse.pipeline import model_directory
    from phoenix_sparse.runtime.packing import unpack_model

    refuse_existing(out)
    with showing() as show:
        unpack_model(model_directory(directory), out, progress=show.progress)
    say(f"model: {out}")


@app.command()
def generate(
    model: AnyModel,
    prompt: Annotated[str, typer.Argument(help="what to continue", show_default=False)],
    *,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens to add at most")] = 64,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    prefill: PrefillName = "packed",
) -> None:
    """Continue a prompt with a packed or an ordinary model, greedily."""
    from phoenix_sparse.console import showing
    from phoenix_sparse.models import load_tokenizer
    from phoenix_sparse.pipeline import model_directory
    from phoenix_sparse.recipe import check
    from phoenix_sparse.runtime.cuda.many_rows import check_prefill
    from phoenix_sparse.runtime.loading import generate as continue_text
    from phoenix_sparse.runtime.loading import open_model
    from phoenix_sparse.steps import Common

    options, kept = check(Common, {"dtype": dtype, "device": device}, "options"), check_prefill(prefill)
    with showing():
        directory = model_directory(model)
        tokenizer = load_tokenizer(directory)
        loaded = open_model(directory, options.dtype, options.device, kept)
        text = continue_text(loaded, tokenizer, prompt, max_new_tokens=max_new_tokens)
    say(text)


@app.command()
def bench(
    model: AnyModel,
    *,
    batch: Annotated[list[int] | None, typer.Option(help="sequences at once; 1, 4 and 16 unless given")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="tokens of each prompt")] = 128,
    tokens: Annotated[int, typer.Option(min=1, help="tokens decoded after it")] = 32,
    repeats: Annotated[int, typer.Option(min=2, help="of each measurement")] = 5,
    layers: Annotated[bool, typer.Option("--layers", help="measure single linears too")] = False,
    training: Annotated[bool, typer.Option("--training", help="measure steps of fine-tuning too")] = False,
    values: ValuesName = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="of the CPU; torch's own number unless given")] = None,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    prefill: PrefillName = "packed",
    out: Annotated[Path | None, typer.Option(help="write bench.json here", show_default=False)] = None,
) -> None:
    """Measure tokens per second of prefill and decode, dense against sparse, in turns within one process.

    With --training also samples per second of fine-tuning, through the mask against a plain LoRA.
    """
    import torch

    from phoenix_sparse.console import OUT, showing
    from phoenix_sparse.files import write_json
    from phoenix_sparse.pipeline import model_directory
    from phoenix_sparse.recipe import check
    from phoenix_sparse.report import bench_tables
    from phoenix_sparse.runs import host
    from phoenix_sparse.runtime.bench import measure
    from phoenix_sparse.runtime.cuda.many_rows import check_prefill
    from phoenix_sparse.runtime.packing import check_values
    from phoenix_sparse.steps import Common
    from phoenix_sparse.training_speed import measure_training

    options, chosen = check(Common, {"dtype": dtype, "device": device}, "options"), check_values(values)
    kept = check_prefill(prefill)
    if out is not None:
        require_writable_file(out)
    batches = batch or [1, 4, 16]
    if min(batches) < 1:
        raise PhoenixError(f"bench: --batch {min(batches)} is no number of sequences; give 1 or more")
    if threads is not None:
        torch.set_num_threads(threads)  # of all that is measured
    with showing() as show:
        steps = {}
        if training:  # first: it refuses what the other measures can do with
            steps["training"] = measure_training(
                model_directory(model),
                batches=batches,
                length=prompt,
                repeats=repeats,
                dtype=options.dtype,
                device=options.device,
                progress=show.progress,
            )
        record = steps | measure(
            model_directory(model),
            values=chosen,
            batches=batches,
            prompt=prompt,
            tokens=tokens,
            repeats=repeats,
            with_layers=layers,
            threads=threads,
            dtype=options.dtype,
            device=options.device,
            prefill=kept,
            progress=show.progress,
        )
    record["host"] = host()
    for table in bench_tables(record):
        OUT.print(table)
    if out is not None:
        write_json(out, record)
        say(f"written: {out}")
