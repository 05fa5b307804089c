"""Write docs/settings.md, every setting of a recipe, from the code: python scripts/describe_settings.py"""

import re
import textwrap
import typing
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from phoenix_sparse.recipe import Recipe

DOCUMENT = Path(__file__).parents[1] / "docs" / "settings.md"
BEGINNING = """\
# Every setting of a recipe

With its default (– is none) and what it does; written by `scripts/describe_settings.py` from the code. On the command
line a setting is `KEY=VALUE` with the name as it stands here (`phx run RECIPE finetune.epochs=2`), and without its
section in the step that the section is for (`phx tune … epochs=2`). `phx plan RECIPE` prints all of them as a recipe
has them. A setting that another one leaves unused, and that would change nothing, is refused with a line that says so.
"""


def sections_in(annotation: object) -> list[type[BaseModel]]:
    """The sections that a setting of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in typing.get_args(annotation) for section in sections_in(part)]


def holds_sections(field: FieldInfo) -> bool:
    return bool(sections_in(field.annotation))


def shown(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def entries(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Markdown of a section's settings and of those of the sections in it."""
    lines: list[str] = []
    # What stands in no section comes first: a heading would claim it.
    for name, field in sorted(section.model_fields.items(), key=lambda item: not prefix and holds_sections(item[1])):
        inner = [] if name in ("mixture", "also") else sections_in(field.annotation)
        default = "required" if field.is_required() else field.get_default(call_default_factory=True)
        if not prefix and inner:
            lines += ["", f"## {name}", ""]
        if field.description:
            given = "" if isinstance(default, BaseModel) else f" ({shown(default)})"
            # Markdown would take these for tags and emphasis.
            plain = re.sub(r"([<*])", r"\\\1", f"{given}: {field.description}")
            text = f"- `{prefix}{name}`{plain}"
            lines += textwrap.wrap(text, 122, subsequent_indent="  ", break_on_hyphens=False)
        for part in inner:
            lines += entries(part, f"{prefix}{name}.")
    return lines


def document() -> str:
    return BEGINNING + "\n" + "\n".join(entries(Recipe)) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
