"""`phx prune` in its three forms: a pruned model, masks at several levels, a comparison of initialisations."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from phoenix_sparse import steps
from phoenix_sparse.commands import named_task, refuse_existing, require_task, require_writable, say, set_up, workplace
from phoenix_sparse.comparing import FILE, compare, comparison_recipes
from phoenix_sparse.console import OUT, showing
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_text
from phoenix_sparse.levels import LevelSettings, level_files, write_levels
from phoenix_sparse.pipeline import model_directory
from phoenix_sparse.pruning.importance import find_importance
from phoenix_sparse.pruning.settings import CHOOSING, SparsifySettings
from phoenix_sparse.recipe import check, override
from phoenix_sparse.report import compare_table

FAILED_RUNS = 3  # the exit code of a comparison in which an initialisation failed


@dataclass
class Given:
    """What the options say that all forms have. `importance` and `sparsity` are empty where they weren't given."""

    model: str
    settings: list[str]
    out: Path
    task: str | None
    data: Path | None
    sparsity: list[float] = field(default_factory=list)
    importance: str | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        require_task(self.task, self.data)

    def check(self, **more: Any) -> list[SparsifySettings]:
        """The settings of the pruning at each sparsity, or at the usual one."""
        values = ({"importance": self.importance} if self.importance else {}) | more
        levels: list[dict[str, Any]] = [{"sparsity": level} for level in self.sparsity] or [{}]
        found = [check(SparsifySettings, override(values | level, self.settings), "prune") for level in levels]
        named = self.importance is not None or any(text.startswith("importance=") for text in self.settings)
        if named and found[0].scored_by is None:
            raise PhoenixError(
                f"prune: update={found[0].update} has scores of its own; leave it out, or the importance "
                f"({found[0].importance})"
            )
        return found

    def require_text(self, chosen: SparsifySettings) -> None:
        """Refuse settings that measure on text or on a task's loss, and were given none."""
        if chosen.reads_gradients and self.task is None:
            raise PhoenixError(f"prune: {chosen.importance} needs the gradients of a task's loss; give --task")
        if chosen.reads_tokens and chosen.calibration.source == "task" and self.task is None:
            scored = chosen.update not in CHOOSING  # these have scores of their own
            reader = chosen.importance if scored and find_importance(chosen.importance).inputs else chosen.update
            reader = str(chosen.allocation) if reader == "none" else reader
            raise PhoenixError(
                f"prune: {reader} needs text to calibrate on; give --task, or calibration.source=text and "
                "calibration.text=FILE, or prune without text (--importance magnitude)"
            )
        if chosen.calibration.text is not None:
            read_text(chosen.calibration.text, "calibration.text")


def prune_model(given: Given) -> None:
    """Step 1 of a run: masks, allocation, plot and pruned model."""
    (chosen,), out = given.check(), given.out
    chosen.require_used("prune: ")
    given.require_text(chosen)
    refuse_existing(out / "masks.safetensors")
    with set_up(given.dtype, given.device, given.seed, out) as machine:
        task = named_task(given.task, given.data, given.seed) if given.task else None
        source = model_directory(given.model)
        inputs = [chosen, task.record() if task else None, given.dtype, given.device, given.seed]
        with workplace(out, [source, chosen.calibration.text], inputs) as work:
            steps.sparsify(source, task, chosen, out, machine, work=work)
    say(f"masks: {out / 'masks.safetensors'}", f"model: {out / 'sparse'}")


def prune_levels(given: Given, *, method: str | None, format: str | None, plot: bool) -> None:
    """Masks and their statistics at each sparsity, from one scoring of the dense model."""
    options = {"method": method, "format": format, "plot": plot}
    settings = check(LevelSettings, {key: value for key, value in options.items() if value is not None}, "prune")
    set_here = {text.partition("=")[0] for text in given.settings}
    for key in sorted(set_here):
        if key.partition(".")[0] in ("update", "pattern", "allocation", "evolution"):
            raise PhoenixError(
                f"prune: {key} prunes a model, at one level; give one --sparsity, without --method, --format and "
                f"--plot, or leave {key} out"
            )
    if settings.method == "random" and (given.importance not in (None, "random") or "importance" in set_here):
        raise PhoenixError("prune: --method random draws by lot; leave the importance out")
    if "sparsity" in set_here and given.sparsity:
        raise PhoenixError("prune: the sparsity is set twice; give --sparsity alone")
    more = {"random": {"importance": "random"}, "structured": {"pattern": "structured"}}.get(settings.method, {})
    every = given.check(update="none", **more)  # scores alone: the model's weights stay as they are
    levels, scoring = [chosen.sparsity for chosen in every], every[0]
    scoring.require_used("prune: ")
    given.require_text(scoring)
    files = level_files(levels, settings)
    if len(levels) > len({names["masks"] for names in files.values()}):
        raise PhoenixError(f"prune: --sparsity gives one level twice ({', '.join(f'{level:g}' for level in levels)})")
    for names in files.values():
        for name in names.values():
            refuse_existing(given.out / name)
    with set_up(given.dtype, given.device, given.seed, given.out) as machine:
        task = named_task(given.task, given.data, given.seed) if given.task else None
        source = model_directory(given.model)
        common = (source, task, scoring, levels, settings, given.out, machine)
        if scoring.reads_gradients:
            inputs = ["gradients", scoring.calibration, task and task.record(), given.dtype, given.device, given.seed]
            with workplace(given.out, [source, scoring.calibration.text], inputs) as work:
                written = write_levels(*common, work=work)
        else:
            written = write_levels(*common)
    for level, stats in written.items():
        found = f"sparsity {stats['sparsity']:.4%} in {len(stats['layers'])} layers"
        say(f"{found}: {', '.join(str(given.out / name) for name in files[level].values())}")


def prune_compared(given: Given, specs: list[str]) -> None:
    """A short fine-tune of each initialisation, and their ranks by the accuracy after it."""
    if given.task is None:
        raise PhoenixError("prune: --compare fine-tunes on a task; give --task")
    if len(given.sparsity) > 1:
        raise PhoenixError("prune: --compare is at one sparsity; give one")
    values: dict[str, Any] = {
        "model": given.model,
        "task": {"name": given.task, "data": given.data},
        "sparsify": {"sparsity": given.sparsity[0]} if given.sparsity else {},
    }
    values |= {"seed": given.seed, "dtype": given.dtype, "device": given.device}
    recipes = comparison_recipes(values, specs, given.settings)
    require_writable(given.out)
    try:
        with showing() as show:
            compared = compare(recipes, given.out, progress=show.progress, announce=show.announce)
    except KeyboardInterrupt:
        typer.echo("phx: interrupted; go on with the same command", err=True)
        raise typer.Exit(130) from None
    OUT.print(compare_table(compared))
    done = [entry for entry in compared["specs"] if "error" not in entry]
    if done:
        best, examples = done[0]["after"]["accuracy"], done[0]["after"]["examples"]
        say(f"best after the fine-tune: {', '.join(entry['spec'] for entry in done if entry['rank_after'] == 1)}")
        close = [entry["spec"] for entry in done if entry["spec"] in compared["close"] and entry["rank_after"] > 1]
        if close:
            say(f"no more than 2 standard errors below on these {examples} examples: {', '.join(close)}")
        if best == 0:
            say(f"none of these {examples} examples was solved: give a longer fine-tune, finetune.max_steps=300 say")
    say(f"figures: {given.out / FILE}")
    failed = [entry for entry in compared["specs"] if "error" in entry]
    for entry in failed:
        typer.echo(f"phx: {entry['spec']}: {entry['error']}", err=True)
    if failed:
        raise typer.Exit(FAILED_RUNS)
