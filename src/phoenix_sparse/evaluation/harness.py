"""Accuracy, measured by lm-evaluation-harness (Gao et al., zenodo 10256836) in this process.

`lm_eval.evaluator.evaluate` does the work, not `simple_evaluate` above it: that one seeds Python's, numpy's and torch's
generators for the whole process, asks the hub about the model and collects the machine's packages by starting pip,
which takes longer than many a candidate of a search. The results have the same schema.
"""

import contextlib
import functools
import json
import math
import time
from collections.abc import Iterator
from typing import Any

from torch import nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.evaluation.predictions import predictions
from phoenix_sparse.tasks import Split, Task
from phoenix_sparse.tasks.loading import quiet_harness

# lm-eval leaves standard errors out when told of no bootstrap. Every metric of ours is a mean, whose standard error
# is computed in closed form, so that no bootstrap sample is ever drawn.
_STANDARD_ERRORS = 1


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    *,
    split: Split = "test",
    batch_size: int,
    limit: int | None = None,
    seed: int,
    num_fewshot: int | None = None,
    with_predictions: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Score a model on a task with greedy decoding.

    Args:
        model: a causal language model or a PEFT model; its modules' training modes are restored afterwards.
        limit: only the first so many examples of the split.
        seed: draws the solved examples of a few-shot prompt; nothing else is random.
        num_fewshot: solved examples before each question; the task's own number unless given.
        with_predictions: keep each example's prompt, answer and score under `predictions` (see there).
        progress: show lm-eval's progress bars and log lines.

    Returns:
        lm-eval's results as JSON can hold them, with the headline figure under `phoenix`; `truncated` counts the
        prompts that were cut from the left to fit the model's context.

    Raises:
        PhoenixError: the model's context has no room for what the task generates, or train is smaller than num_fewshot.
    """
    from lm_eval.evaluator import evaluate as run

    num_fewshot = task.num_fewshot if num_fewshot is None else num_fewshot
    _check_numbers(task, batch_size, limit, num_fewshot)
    harness_task = task.harness_task(split, limit)
    harness_task.set_config(key="num_fewshot", value=num_fewshot)
    harness_task.set_fewshot_seed(seed=seed)
    start, started = time.perf_counter(), time.time()
    with _evaluating(model), contextlib.nullcontext() if progress else _quiet():
        language_model = _language_model(model, tokenizer, batch_size, progress)
        check_room(harness_task, language_model.max_length)
        results = run(
            language_model,
            {"tasks": {task.name: harness_task}, "groups": {}, "group_map": {}},
            bootstrap_iters=_STANDARD_ERRORS,
            log_samples=with_predictions,
        )
    seconds = time.perf_counter() - start
    results = _plain(results)
    if with_predictions:
        results["predictions"] = predictions(results.pop("samples")[task.name], task.metric)
    results["configs"][task.name].pop("custom_dataset", None)
    results["n-samples"][task.name]["original"] = len(task.rows[split])
    scores = results["results"][task.name]
    for key, value in scores.items():
        scores[key] = None if value == "N/A" else value
    metric, name = task.metric.split(",")
    results |= _circumstances(model, language_model, started, batch_size, limit, seed)
    results["phoenix"] = {
        "accuracy": scores[task.metric],
        "stderr": scores.get(f"{metric}_stderr,{name}"),
        "metric": task.metric,
        "task": task.name,
        "split": split,
        "examples": results["n-samples"][task.name]["effective"],
        "num_fewshot": num_fewshot,
        "truncated": _count_truncated(harness_task, language_model),
        "seconds": seconds,
    }
    return results


def _check_numbers(task: Task, batch_size: int, limit: int | None, num_fewshot: int) -> None:
    if batch_size < 1:
        raise PhoenixError(f"evaluation: batch_size is {batch_size}; it should be 1 or more")
    if limit is not None and limit < 1:
        raise PhoenixError(f"evaluation: limit is {limit}; it should be 1 or more, or none for the whole split")
    if not 0 <= num_fewshot <= len(task.train):
        raise PhoenixError(
            f"task.num_fewshot: {num_fewshot} solved examples can't be drawn from {len(task.train)} training examples"
        )


def _language_model(model: Any, tokenizer: Any, batch_size: int, progress: bool) -> Any:
    from lm_eval.models.huggingface import HFLM

    class LanguageModel(HFLM):
        """HFLM whose progress bars are shown on demand: evaluate() has no switch for them."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not progress)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return super().generate_until(requests, disable_tqdm=disable_tqdm or not progress)

    return LanguageModel(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; afterwards each module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No log lines and no bars from lm-eval and transformers.generate; what matters of them we report ourselves."""
    import lm_eval.api.task as task_module
    from transformers.utils import logging as transformers_logging

    bar, verbosity = task_module.tqdm, transformers_logging.get_verbosity()
    task_module.tqdm = functools.partial(bar, disable=True)
    transformers_logging.set_verbosity_error()
    try:
        with quiet_harness():
            yield
    finally:
        task_module.tqdm = bar
        transformers_logging.set_verbosity(verbosity)


def _generated_tokens(harness_task: Any) -> int:
    """The most tokens that an example generates (256 is what HFLM takes where a task says nothing)."""
    if harness_task.OUTPUT_TYPE != "generate_until":
        return 0
    return int((harness_task.config.generation_kwargs or {}).get("max_gen_toks", 256))


def check_room(harness_task: Any, context: int) -> None:
    """Refuse a task that generates as many tokens as the model's context has, or more."""
    needed = _generated_tokens(harness_task)
    if needed >= context:
        raise PhoenixError(
            f"task {harness_task.config.task}: it generates up to {needed} tokens (generation_kwargs.max_gen_toks), "
            f"and the model's whole context is {context}; the prompt would have no room"
        )


def _count_truncated(harness_task: Any, language_model: Any) -> int:
    """Examples whose prompt (with its answer, for multiple choice) doesn't fit into the model's context."""
    generated = harness_task.OUTPUT_TYPE == "generate_until"
    texts = [request.args[0] if generated else "".join(request.args) for request in harness_task.instances]
    # A loglikelihood needs no logits after the last token, so one token more than the context fits.
    room = language_model.max_length - _generated_tokens(harness_task) + (0 if generated else 1)
    long = [len(tokens) > room for tokens in language_model.tokenizer(texts, verbose=False)["input_ids"]]
    return len({request.doc_id for request, cut in zip(harness_task.instances, long, strict=True) if cut})


def _circumstances(
    model: Any, language_model: Any, started: float, batch_size: int, limit: int | None, seed: int
) -> dict[str, Any]:
    """What simple_evaluate would add about the run."""
    from importlib.metadata import version

    return {
        "config": {
            "model": "hf",
            "model_type": type(model).__name__,
            "model_num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "model_dtype": str(next(model.parameters()).dtype),
            "batch_size": batch_size,
            "device": str(language_model.device),
            "limit": limit,
            "bootstrap_iters": _STANDARD_ERRORS,
            "fewshot_seed": seed,
        },
        "date": started,
        "lm_eval_version": version("lm_eval"),
        "transformers_version": version("transformers"),
        "max_length": language_model.max_length,
    }


def _plain(value: Any) -> Any:
    """A copy that JSON can hold: functions by their names, NaN as null, numpy's numbers as Python's."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and callable(value.item):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if callable(value):
        return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__name__)}"
    return json.loads(json.dumps(value, default=str))
