"""The evidence on files: a model in, its accuracy, perplexity and FLOPs out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.evaluation.settings import EvaluateSettings, PerplexitySettings
from phoenix_sparse.files import read_text, write_json, write_text
from phoenix_sparse.masks import Masks
from phoenix_sparse.models import empty_model, load_config, prunable_linears
from phoenix_sparse.steps.machine import Machine, longest
from phoenix_sparse.tasks import Split, Task

TRAINED = 32  # sequences of a training step whose FLOPs are counted


def require_room(source: Path, task: Task, perplexity: PerplexitySettings | None, split: Split = "validation") -> None:
    """Refuse generated texts and windows that are longer than the model's context."""
    from phoenix_sparse.evaluation.harness import check_room

    context = longest(source)
    check_room(task.harness_task(split, 1), context)
    if perplexity is not None and perplexity.context_length > context:
        raise PhoenixError(
            f"evaluate.perplexity.context_length is {perplexity.context_length}; the model's whole context is {context}"
        )


def evaluate(
    source: Path,
    task: Task | None,
    settings: EvaluateSettings,
    out: Path,
    machine: Machine,
    also: Sequence[Task] = (),
) -> list[str]:
    """Score a model on a split of a task and on a text, where they are given.

    Writes eval.json, predictions.jsonl (an example with its answer and score a line) and perplexity.json. With further
    tasks, also eval_<task>.json and predictions_<task>.jsonl for each of them, and eval_all.json: the headline figures
    of all, and `mean_accuracy` over the tasks.
    """
    from phoenix_sparse.evaluation import harness

    model, tokenizer = machine.open(source)
    written = []
    if settings.perplexity is not None:  # first: a text that can't be read is told before a task that takes long
        write_json(out / "perplexity.json", measure_perplexity(model, tokenizer, settings.perplexity))
        written.append("perplexity.json")
    if task is not None:
        headlines = {}
        for one, suffix in [(task, ""), *((other, f"_{other.name}") for other in also)]:
            results = harness.evaluate(
                model,
                tokenizer,
                one,
                split=settings.split,
                batch_size=settings.batch_size,
                seed=machine.seed,
                with_predictions=True,
            )
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in results.pop("predictions")]
            write_text(out / f"predictions{suffix}.jsonl", "".join(lines))
            write_json(out / f"eval{suffix}.json", results)
            written += [f"eval{suffix}.json", f"predictions{suffix}.jsonl"]
            headlines[one.name] = results["phoenix"]
        if also:
            mean = sum(one["accuracy"] for one in headlines.values()) / len(headlines)
            write_json(out / "eval_all.json", {"tasks": headlines, "mean_accuracy": mean})
            written.append("eval_all.json")
    return written


def measure_perplexity(model: Any, tokenizer: Any, settings: PerplexitySettings) -> dict[str, Any]:
    from phoenix_sparse.evaluation.perplexity import perplexity

    return perplexity(
        model,
        tokenizer,
        read_text(settings.text, "evaluate.perplexity.text"),
        context_length=settings.context_length,
        max_tokens=settings.max_tokens,
        label=settings.text.name,
    )


def flops(
    source: Path,
    masks: Masks | None,
    settings: EvaluateSettings,
    out: Path,
    *,
    sparsity: float | None = None,
    rank: int | None = None,
) -> list[str]:
    """Count FLOPs from the configuration alone, and project them onto machines. Writes flops.json.

    Sparse at the masks' densities, or at one sparsity of all matrices of the blocks; dense where neither is given.
    With `rank`, also those of a training step, dense products whatever the mask: adapters of that rank on all linears,
    `TRAINED` sequences of the prompt's length.
    """
    from phoenix_sparse.evaluation.flops import count_flops, count_training_flops
    from phoenix_sparse.evaluation.hardware import project_all
    from phoenix_sparse.evaluation.matrices import prunable_matrices

    config = load_config(source)
    if masks is not None:
        _require_shapes(masks, empty_model(config))
    densities = {name: int(mask.sum()) / mask.numel() for name, mask in masks.items()} if masks is not None else None
    if sparsity is not None:
        densities = dict.fromkeys(prunable_matrices(empty_model(config)), 1 - sparsity)
    counts = count_flops(
        config, densities, prompt_length=settings.prompt_length, context_length=settings.context_length
    )
    if rank is not None:
        ranks = dict.fromkeys(prunable_linears(empty_model(config)), rank)
        size = {"sequence_length": settings.prompt_length, "sequences_per_step": TRAINED}
        counts["training"] = {"rank": rank, **size, **count_training_flops(config, ranks, **size)}
    write_json(out / "flops.json", counts | {"projected": project_all(counts)})
    return ["flops.json"]


def _require_shapes(masks: Masks, model: Any) -> None:
    """Refuse masks of another model, whose linears have the same names. Names alone are `count_flops`'s matter."""
    weights = dict(model.named_parameters())
    for name, mask in masks.items():
        weight = weights.get(f"{name}.weight")
        if weight is not None and weight.shape != mask.shape:
            raise PhoenixError(
                f"masks: that of {name} is {tuple(mask.shape)} and the weight {tuple(weight.shape)}; give this model's"
            )
