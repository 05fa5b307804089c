"""The report: one HTML file that needs no network and no scripts."""

import re
from pathlib import Path
from typing import Any

from phoenix_sparse.report import text
from phoenix_sparse.report.facts import ROLES, Facts
from phoenix_sparse.report.plots import accuracy_plot, loss_plot, search_plot, sparsity_plot

USE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("merged")
model = AutoModelForCausalLM.from_pretrained("merged")"""
REPRODUCE = "phx run recipe.yaml --out NEW_DIRECTORY"


def render_html(facts: Facts) -> str:
    """Fill the template. Every string of the run is escaped; only our own plots go in as they are."""
    from markupsafe import Markup

    plots = {
        "accuracy": accuracy_plot(facts.accuracies, facts.role_names) if facts.accuracies else None,
        "sparsity": sparsity_plot(facts.sparsities),
        "loss": loss_plot(facts.tunes),
        "search": search_plot(facts.search) if facts.search else None,
    }
    template = environment(escape=True).get_template("report.html.j2")
    return template.render(
        **context(facts), plots={name: Markup(plot) if plot else None for name, plot in plots.items()}
    )


def environment(escape: bool) -> Any:
    """The templates of this package, with the report's ways of writing figures as filters."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=PackageLoader("phoenix_sparse.report"),
        # Not by the file's ending: it would be forgotten for a new template.
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for function in (
        text.accuracy,
        text.number,
        text.percent,
        text.scaled,
        text.seconds,
        text.size,
        text.times,
        text.difference,
        text.ending,
    ):
        found.filters[function.__name__] = function
    return found


def context(facts: Facts) -> dict[str, Any]:
    """What both the report and the model card show."""
    model = facts.manifest.inputs.model
    return {
        "facts": facts,
        "roles": ROLES,
        "role_names": facts.role_names,
        "headline": text.headline(facts),
        "pruning": text.pruning(facts.allocation) if facts.allocation else None,
        "left_out": text.left_out(facts),
        "base": _shown(model.path) if model else None,
        "settings": list(text.flatten(facts.recipe)) if facts.recipe is not None else None,
        # The report is written while its own stage runs.
        "stages": {
            name: stage
            for name, stage in sorted(facts.manifest.stages.items(), key=lambda item: item[1].begun)
            if name != "report"
        },
        "missing": text.MISSING,
        "use": USE,
        "reproduce": REPRODUCE,
    }


def is_local(path: str) -> bool:
    """Whether a model was given as a directory; a hub name is `owner/name`, and no directory here."""
    return re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", path) is None or Path(path).is_dir()


def _shown(path: str) -> str:
    """A hub name, or the name of a local directory without the way to it: a report is for others to read."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] if is_local(path) else path
