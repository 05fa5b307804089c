"""The Jinja templates of a task: which fields they use, and whether a stranger's template may be rendered.

lm-eval renders templates outside a sandbox, where a template can reach any Python object. Templates from a user's
folder are therefore checked before: only the nodes, filters and methods listed here are let through.
"""

import re
from typing import Any

from phoenix_sparse.errors import PhoenixError

_NODES = frozenset(
    [
        "Template",
        "Output",
        "TemplateData",
        "Name",
        "Const",
        "Getitem",
        "Getattr",
        "Slice",
        "Filter",
        "Call",
        "CondExpr",
        "If",
        "Compare",
        "Operand",
        "And",
        "Or",
        "Not",
        "Add",
        "Sub",
        "Mul",
        "Div",
        "FloorDiv",
        "Mod",
        "Neg",
        "Concat",
        "List",
        "Tuple",
    ]
)
_FILTERS = frozenset(
    [
        "trim",
        "lower",
        "upper",
        "title",
        "capitalize",
        "replace",
        "first",
        "last",
        "join",
        "length",
        "string",
        "int",
        "float",
        "round",
        "default",
        "tojson",
    ]
)
_METHODS = frozenset(
    [
        "split",
        "rsplit",
        "strip",
        "lstrip",
        "rstrip",
        "replace",
        "lower",
        "upper",
        "title",
        "capitalize",
        "startswith",
        "endswith",
    ]
)


def template_fields(template: Any) -> set[str]:
    """The fields of a record that a `doc_to_*` entry uses: those of its template, or the one that it names."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    if not isinstance(template, str):
        return set()
    if "{" not in template:
        return {template} if re.fullmatch(r"[A-Za-z_]\w*", template) else set()
    try:
        return meta.find_undeclared_variables(Environment().parse(template))
    except TemplateSyntaxError as error:
        raise PhoenixError(f"the template {template!r} isn't one that Jinja reads ({error.message})") from error


def check_template(template: str) -> None:
    """Refuse a template that does more than to put fields into text.

    Raises:
        PhoenixError: it isn't Jinja, or holds a node, filter or method that isn't allowed.
    """
    from jinja2 import Environment, TemplateSyntaxError, nodes

    try:
        tree = Environment().parse(template)
    except TemplateSyntaxError as error:
        raise PhoenixError(f"not a Jinja template ({error.message})") from error
    for node in tree.find_all(nodes.Node):
        problem = _problem(node)
        if problem:
            raise PhoenixError(f"the template uses {problem}, which a task folder may not")


def _problem(node: Any) -> str | None:
    kind = type(node).__name__
    if kind not in _NODES:
        return f"the construct {kind}"
    if kind == "Filter" and node.name not in _FILTERS:
        return f"the filter {node.name!r}"
    if kind == "Getattr" and node.attr.startswith("_"):
        return f"the attribute {node.attr!r}"
    if kind == "Getitem" and type(node.arg).__name__ == "Const" and str(node.arg.value).startswith("_"):
        return f"the item {node.arg.value!r}"
    if kind == "Getitem" and type(node.arg).__name__ not in ("Const", "Name", "Slice", "Neg"):
        return "a computed item"
    if kind == "Call" and not (type(node.node).__name__ == "Getattr" and node.node.attr in _METHODS):
        return "a call that isn't a plain text method"
    return None
