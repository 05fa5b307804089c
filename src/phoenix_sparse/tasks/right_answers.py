"""Whether a task counts its own right answers as right: a user's task.yaml may have a filter that they don't pass."""

from typing import Any

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.tasks.definition import Definition

CHECKED = 20  # examples: enough for one to pass where any can


def check_right_answers(harness: Any, definition: Definition) -> None:
    """Refuse a task that would score a model 0 that gives every answer as it was trained to.

    What is scored is the text a model is trained to write, the delimiter and the target, up to where generation stops.

    Args:
        harness: lm-eval's task over a few test examples.
        definition: the task's.

    Raises:
        PhoenixError: none of them scores.
    """
    if harness.OUTPUT_TYPE != "generate_until":
        return
    from lm_eval.api.instance import Instance

    metric, name = definition.metric.split(",")
    answers = [
        Instance("generate_until", row, ("", {}), 0, resps=[_written(harness, row)]) for row in harness.eval_docs
    ]
    for filters in harness._filters:
        filters.apply(answers)
    if any(harness.process_results(one.doc, [one.filtered_resps[name]])[metric] for one in answers):
        return
    first = answers[0]
    raise PhoenixError(
        f"{definition.source}: right answers score 0: {first.resps[0]!r}, as a model is trained to write it, gives "
        f"{first.filtered_resps[name]!r}, and the target is {harness.doc_to_target(first.doc)!r}; change "
        "doc_to_target, filter_list or generation_kwargs.until"
    )


def _written(harness: Any, row: dict[str, Any]) -> str:
    """What a model writes that has learnt the task: its completion, cut off where generation stops."""
    target = harness.doc_to_target(row)
    text = f"{harness.config.target_delimiter}{target[0] if isinstance(target, list) and target else target}"
    for stop in harness.config.generation_kwargs["until"]:
        text = text.split(stop)[0]
    return text
