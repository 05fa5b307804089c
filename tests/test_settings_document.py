"""docs/settings.md says what the code says."""

import importlib.util
from pathlib import Path

from phoenix_sparse.recipe import Recipe

SCRIPT = Path(__file__).parents[1] / "scripts" / "describe_settings.py"


def test_the_document_is_the_codes():
    spec = importlib.util.spec_from_file_location("describe_settings", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    written = script.DOCUMENT.read_text(encoding="utf-8")
    assert written == script.document(), "call scripts/describe_settings.py"
    for name, field in Recipe.model_fields.items():
        assert f"`{name}`" in written or f"## {name}" in written
        for part in script.sections_in(field.annotation):
            silent = [key for key in part.model_fields if f"- `{name}.{key}" not in written]
            assert not silent, f"{name}: give {silent} a description"
