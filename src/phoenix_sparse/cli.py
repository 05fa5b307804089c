"""The command line: one typed function a command."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from phoenix_sparse import cli_cerebras, cli_runtime, cli_sweep
from phoenix_sparse.commands import (
    USAGE,
    Model,
    SeveralValues,
    checked_recipe,
    named_task,
    refuse_empty,
    refuse_existing,
    refuse_idle,
    refuse_run,
    require_mode,
    require_task,
    require_writable_file,
    say,
    say_trained,
    set_up,
    usage,
    workplace,
)
from phoenix_sparse.errors import Exhausted, PhoenixError

app = typer.Typer(
    name="phx",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Phoenix: a pretrained dense language model and a task in, a sparse fine-tuned model and its evidence out.",
)

RecipeFile = Annotated[Path, typer.Argument(help="the recipe, a YAML file", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="changes, such as sparsify.sparsity=0.7")
]
Section = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="settings of this step")]
Out = Annotated[Path, typer.Option(help="the directory to write to", show_default=False)]
PrunedModel = Annotated[str, typer.Argument(help="the pruned model: a directory or a hub name", show_default=False)]
TaskName = Annotated[
    str, typer.Option("--task", help="a built-in task, or a folder with task.yaml", show_default=False)
]
Data = Annotated[Path | None, typer.Option(help="a folder with the task's <split>.jsonl; the hub unless given")]
MaskFile = Annotated[Path, typer.Option(help="masks.safetensors", show_default=False)]
AdapterDirectory = Annotated[Path, typer.Option(help="an adapter's directory", show_default=False)]
Seed = Annotated[int, typer.Option(help="for everything that is drawn")]
DtypeName = Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16")]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu or cuda")]
BatchSize = Annotated[int, typer.Option(help="prompts at once")]


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="the run directory; runs/<name> unless given")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that was stopped")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="remove a run that lies there, and begin anew")
    ] = False,
) -> None:
    """Do a whole recipe: prune, fine-tune, search, merge, evaluate, report."""
    from phoenix_sparse import pipeline
    from phoenix_sparse.console import OUT, showing
    from phoenix_sparse.report import summary_table

    if resume and overwrite:
        raise PhoenixError("run: --resume goes on with a run and --overwrite removes it; give one of them")
    checked = checked_recipe(recipe, overrides)
    try:
        with showing() as show:
            directory = pipeline.run(
                checked, out, resume=resume, overwrite=overwrite, progress=show.progress, announce=show.announce
            )
    except KeyboardInterrupt:
        typer.echo("phx: interrupted; go on with the same command and --resume", err=True)
        raise typer.Exit(130) from None
    OUT.print(summary_table(directory))
    OUT.print(f"report: {directory / 'report.html'}", markup=False)
    OUT.print(f"model:  {directory / 'merged'}", markup=False)


@app.command()
def plan(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Say what a recipe would run, with memory, disk and time, and run nothing."""
    from phoenix_sparse.console import OUT, showing
    from phoenix_sparse.pipeline import prepare
    from phoenix_sparse.plan import estimate
    from phoenix_sparse.recipe import dump_recipe
    from phoenix_sparse.report import plan_table

    checked = checked_recipe(recipe, overrides)
    with showing():
        figures = estimate(checked, *prepare(checked))
    OUT.print(dump_recipe(checked), markup=False)
    OUT.print(plan_table(figures))


@app.command(cls=SeveralValues)
def prune(
    model: Model,
    settings: Section = None,
    *,
    out: Out,
    task: Annotated[str | None, typer.Option(help="calibrate on this task's examples")] = None,
    data: Data = None,
    sparsity: Annotated[
        list[float] | None, typer.Option(metavar="SHARE ...", help="share of zeros, 0.5 unless given; or several")
    ] = None,
    importance: Annotated[
        str | None,
        typer.Option(
            help="choose by magnitude, random, wanda, ria, gradient, taylor, gblm or a registered one; else SparseGPT "
            "chooses, and wanda where only masks are written"
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help="masks only: unstructured, structured or random")] = None,
    format: Annotated[str | None, typer.Option(help="masks only: pt, npz or safetensors")] = None,
    plot: Annotated[bool, typer.Option("--plot", help="masks only: a histogram of each level")] = False,
    compare: Annotated[
        list[str] | None, typer.Option(metavar="SPEC ...", help="fine-tune and rank: wanda+owl sparsegpt magnitude+2:4")
    ] = None,
    seed: Seed = 0,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
) -> None:
    """Step 1: prune a dense model. Writes masks.safetensors, allocation.json, plots/ and sparse/.

    With several sparsities, --method, --format or --plot: masks only, of the dense model scored once. Writes
    masks_sparsity50_unstructured.pt, stats_sparsity50_unstructured.json and so on for each sparsity.

    With --compare: fine-tunes several initialisations for a short while in OUT and ranks them by the validation
    accuracy after it. A SPEC joins words by +: an importance, dsnot, sparsegpt or alps, owl, alphapruning or
    evolutionary, a pattern; what it leaves out is as in a recipe that does. Writes compare.json; exits with 3 if one of
    them failed.
    """
    from phoenix_sparse.prune_forms import Given, prune_compared, prune_levels, prune_model

    only_masks = method is not None or format is not None or plot
    given = Given(model, settings or [], out, task, data, sparsity or [], importance, seed, dtype, device)
    if compare:
        if only_masks or importance is not None:
            raise PhoenixError("prune: --compare takes no --importance, --method, --format or --plot; its SPECs say it")
        prune_compared(given, compare)
    elif only_masks or len(given.sparsity) > 1:
        prune_levels(given, method=method, format=format, plot=plot)
    else:
        prune_model(given)


@app.command()
def tune(
    model: PrunedModel,
    settings: Section = None,
    *,
    task: TaskName,
    out: Out,
    masks: Annotated[Path | None, typer.Option(help="masks.safetensors; needed by mode=sparse_to_sparse")] = None,
    data: Data = None,
    seed: Seed = 0,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
) -> None:
    """Step 2: train the elastic adapter. Writes adapter/super and tune.json; goes on from a checkpoint in OUT."""
    from phoenix_sparse import steps
    from phoenix_sparse.finetuning.settings import FinetuneSettings
    from phoenix_sparse.pipeline import model_directory
    from phoenix_sparse.recipe import check, override

    chosen = check(FinetuneSettings, override({}, settings or ()), "tune")
    require_mode(chosen, masks)
    refuse_existing(out / "adapter" / "super")
    with set_up(dtype, device, seed, out) as machine:
        through = steps.read_masks(masks) if masks else None
        source, examples = model_directory(model), named_task(task, data, seed)
        with workplace(out, [source, masks], [chosen, examples.record(), dtype, device, seed]) as work:
            steps.tune(source, through, examples, chosen, out, machine, work=work)
    say_trained(out, out / "adapter" / "super")


@app.command()
def search(
    model: PrunedModel,
    settings: Section = None,
    *,
    adapter: AdapterDirectory,
    task: TaskName,
    out: Out,
    masks: Annotated[
        Path | None, typer.Option(help="masks.safetensors, if the adapter was trained through them")
    ] = None,
    data: Data = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
) -> None:
    """Step 2, its end: choose a sub-adapter on the validation split. Writes search.json and adapter/chosen."""
    from phoenix_sparse import steps
    from phoenix_sparse.evaluation.settings import EvaluateSettings
    from phoenix_sparse.finetuning.settings import SearchSettings
    from phoenix_sparse.pipeline import model_directory
    from phoenix_sparse.recipe import check, override

    chosen = check(SearchSettings, override({}, settings or ()), "search")
    evaluation = check(EvaluateSettings, {"batch_size": batch_size}, "search")
    refuse_existing(out / "adapter" / "chosen")
    steps.require_adapter(adapter)
    with set_up(dtype, device, seed, out) as machine:
        through = steps.read_masks(masks) if masks else None
        source, examples = model_directory(model), named_task(task, data, seed)
        with workplace(
            out, [source, masks, adapter], [chosen, evaluation, examples.record(), dtype, device, seed]
        ) as work:
            steps.search(source, through, examples, adapter, chosen, evaluation, out, machine, work=work)
    say(f"adapter: {out / 'adapter' / 'chosen'}", f"candidates: {out / 'search.json'}")


@app.command()
def merge(
    model: PrunedModel,
    *,
    masks: MaskFile,
    adapter: AdapterDirectory,
    out: Out,
    remask: Annotated[bool, typer.Option("--remask", help="mask again after merging an adapter without masks")] = False,
    task: Annotated[str | None, typer.Option(help="compare logits on this task's examples")] = None,
    data: Data = None,
    seed: Seed = 0,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
) -> None:
    """Step 3: merge an adapter and certify the result. Writes merged/ and certificate.json."""
    from phoenix_sparse import steps
    from phoenix_sparse.files import read_json
    from phoenix_sparse.pipeline import model_directory

    refuse_existing(out / "merged")
    steps.require_adapter(adapter)
    require_task(task, data)
    with set_up(dtype, device, seed, out) as machine:
        texts = steps.SAMPLE_TEXTS
        if task is not None:
            texts = [example.prompt + example.completion for example in named_task(task, data, seed).train[:8]]
        steps.merge(model_directory(model), steps.read_masks(masks), adapter, out, machine, remask=remask, texts=texts)
    found = read_json(out / "certificate.json")
    say(
        f"{found['off_mask_nonzeros']} non-zeros off the mask, sparsity {found['sparsity']:.4%}, "
        f"largest difference of a logit {found['max_abs_logit_difference']:.3g}",
        f"model: {out / 'merged'}",
        f"certificate: {out / 'certificate.json'}",
    )


@app.command()
def validate(
    model: Model,
    *,
    masks: MaskFile,
    out: Annotated[Path | None, typer.Option(help="a JSON file for the figures of every layer")] = None,
) -> None:
    """Check a model against masks: exits with 1 if a zero was filled."""
    from phoenix_sparse.files import write_json
    from phoenix_sparse.masks import inspect, require_preserved
    from phoenix_sparse.models import load_model, prunable_linears
    from phoenix_sparse.pipeline import model_directory
    from phoenix_sparse.steps import read_masks

    if out is not None:
        require_writable_file(out)
    with set_up("auto", "cpu", 0, None):
        expected = read_masks(masks)
        layers = prunable_linears(load_model(model_directory(model), device="cpu"))
    if out is not None:
        write_json(out, inspect(expected, layers))
    report = require_preserved(expected, layers, model)
    zeros = sum(round(layer["sparsity"] * expected[name].numel()) for name, layer in report.items())
    total = sum(mask.numel() for mask in expected.values())
    say(f"{model}: 0 non-zeros off the mask in {len(report)} layers; sparsity {zeros / total:.4%}")


@app.command("eval")
def evaluate(
    model: Model,
    *,
    out: Out,
    task: Annotated[str | None, typer.Option(help="a built-in task or a folder with task.yaml: accuracy")] = None,
    data: Data = None,
    limit: Annotated[int | None, typer.Option(min=1, help="evaluate on the first examples only")] = None,
    text: Annotated[Path | None, typer.Option(help="a text file (UTF-8): perplexity")] = None,
    context_length: Annotated[int | None, typer.Option(help="tokens in a window of the text; 512 unless given")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="read no more of the text than this")] = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
) -> None:
    """Score a model: accuracy on a task through lm-eval, perplexity on a text. Writes eval.json, perplexity.json."""
    from phoenix_sparse import steps
    from phoenix_sparse.evaluation.settings import EvaluateSettings
    from phoenix_sparse.files import read_json
    from phoenix_sparse.pipeline import model_directory
    from phoenix_sparse.recipe import check

    if task is None and text is None:
        raise PhoenixError("eval: nothing to evaluate on; give --task, or --text, or both")
    require_task(task, data)
    refuse_run(out)
    refuse_idle("eval", "--task", task, {"limit": limit})
    refuse_idle("eval", "--text", text, {"context_length": context_length, "max_tokens": max_tokens})
    length = 512 if context_length is None else context_length
    window = {"text": text, "context_length": length, "max_tokens": max_tokens} if text else None
    settings = check(EvaluateSettings, {"batch_size": batch_size, "perplexity": window}, "eval")
    with set_up(dtype, device, seed, out) as machine:
        examples = named_task(task, data, seed, max_test=limit) if task else None
        steps.evaluate(model_directory(model), examples, settings, out, machine)
    if task:
        score = read_json(out / "eval.json")["phoenix"]
        error = "" if score["stderr"] is None else f" ± {score['stderr']:.4f}"
        say(f"{score['metric']} {score['accuracy']:.4f}{error} on {score['examples']} examples: {out / 'eval.json'}")
    if text:
        found = read_json(out / "perplexity.json")
        say(
            f"perplexity {found['perplexity']:.3f} at context {found['context_length']} over {found['tokens']} tokens: "
            f"{out / 'perplexity.json'}"
        )


@app.command()
def shrink(
    model: Model,
    *,
    masks: Annotated[Path, typer.Option(help="masks of pattern=structured, such as masks.safetensors")],
    out: Annotated[Path, typer.Option(help="the directory of the smaller model", show_default=False)],
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
) -> None:
    """Write a structured-pruned model without what its masks drop: fewer channels and heads, an ordinary model."""
    from phoenix_sparse.pipeline import model_directory
    from phoenix_sparse.shrinking import write_smaller
    from phoenix_sparse.steps import read_masks

    refuse_existing(out)
    with set_up(dtype, device, 0, out) as machine:
        found = write_smaller(model_directory(model), read_masks(masks), out, machine)
    if found["dropped_nonzeros"]:
        say(f"{found['dropped_nonzeros']:,} of the weights that the masks drop were not zero in {model}")
    say(
        f"{found['parameters_before']:,} parameters before, {found['parameters']:,} after; largest difference of a "
        f"logit to the masked model {found['max_abs_logit_difference']:.3g}",
        f"model: {out}",
    )


for part in (cli_runtime, cli_sweep, cli_cerebras):
    app.add_typer(part.app)


def main() -> None:
    """Run the command line; bad input is one line and exit code 2, a failed check or full memory one line and 1."""
    try:
        refuse_empty(sys.argv[1:])
        sys.exit(app(standalone_mode=False, prog_name="phx") or 0)
    except PhoenixError as error:
        _fail(str(error), error.exit_code)
    except typer.Abort:  # Ctrl-C, in some versions of typer
        sys.exit(130)
    except Exception as error:
        if isinstance(error, USAGE):
            if type(error).__name__ == "NoArgsIsHelpError":  # `phx` alone is told what there is
                print(error, file=sys.stderr)
                sys.exit(2)
            _fail(usage(error), 2)
        from phoenix_sparse.files import disk_is_full

        if disk_is_full(error):
            _fail("the disk is full; free some space, then run the same again (phx run: with --resume)", 2)
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which isn't imported for its name alone
            _fail(
                "the GPU's memory is full; lower finetune.micro_batch_size or evaluate.batch_size, "
                "or set finetune.gradient_checkpointing=true",
                Exhausted.exit_code,
            )
        raise


def _fail(message: str, code: int) -> NoReturn:
    print(f"phx: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
