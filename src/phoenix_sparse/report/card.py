"""The model card: README.md with the hub's front matter, so that a run can be published as it is."""

import re
from typing import Any

import yaml

from phoenix_sparse.report.facts import Facts
from phoenix_sparse.report.html import context, environment, is_local


def render_card(facts: Facts) -> str:
    """Fill the card's template. A string of the run can't become Markdown or HTML of its own."""
    env = environment(escape=False)
    env.filters["md"] = escape_markdown
    env.filters["fence"] = fence
    recipe = yaml.safe_dump(dict(facts.recipe), sort_keys=False, allow_unicode=True) if facts.recipe else None
    card: str = env.get_template("card.md.j2").render(
        **context(facts), recipe=recipe, front_matter=_front_matter(facts)
    )
    return card


def escape_markdown(value: Any) -> str:
    """Text for one line of Markdown or one cell of a table."""
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~&])", r"\\\1", line)


def fence(code: str, language: str = "") -> str:
    """A code block that its own content can't close."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", code)), default=0))
    return f"{ticks}{language}\n{code.rstrip()}\n{ticks}"


def _front_matter(facts: Facts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    model = facts.manifest.inputs.model
    tuned = facts.accuracies.get("tuned")
    results = None
    if tuned:
        results = [
            EvalResult(
                task_type="text-generation",
                task_name="Text generation",
                dataset_type=tuned.task,
                dataset_name=tuned.task,
                dataset_split=tuned.split,
                metric_type="accuracy",
                metric_name=f"accuracy ({tuned.metric}, {tuned.num_fewshot}-shot)",
                metric_value=tuned.accuracy,
            )
        ]
    data = ModelCardData(
        base_model=None if model is None or is_local(model.path) else model.path,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["phoenix-sparse", "sparse", "pruned"],
        model_name=facts.manifest.name,
        eval_results=results,
    )
    return str(data.to_yaml()).strip()
