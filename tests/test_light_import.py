"""What is imported when: the package and the command line's help are there at once."""

import importlib.metadata
import json
import subprocess
import sys

import pytest

import phoenix_sparse

HEAVY = {
    *("torch", "transformers", "peft", "accelerate", "lm_eval", "datasets", "optuna", "matplotlib", "pydantic"),
    *("numpy", "safetensors", "huggingface_hub", "tokenizers", "jinja2", "yaml", "rich"),
}


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after some code, which may exit."""
    script = (
        f"import sys, json\ntry:\n    {code}\nfinally:\n    print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    assert lines, done
    return {name.partition(".")[0] for name in json.loads(lines[0])}


def test_the_package_imports_nothing_heavy():
    assert not HEAVY & modules_after("import phoenix_sparse")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["tune", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    found = modules_after(f"from phoenix_sparse.cli import main; sys.argv = ['phx', *{arguments}]; main()")
    assert "typer" in found
    assert not (HEAVY - {"rich", "pydantic"}) & found  # typer's own


def test_the_sections_of_a_recipe_need_no_torch():
    """Recipes are checked, and told wrong, before anything is loaded."""
    found = modules_after("import phoenix_sparse.pruning.settings, phoenix_sparse.finetuning.settings")
    assert not {"torch", "transformers", "peft", "lm_eval", "datasets"} & found


@pytest.mark.parametrize("name", phoenix_sparse.__all__)
def test_every_public_name_is_there(name):
    assert getattr(phoenix_sparse, name) is not None


def test_only_public_names_are_there():
    assert dir(phoenix_sparse) == sorted(phoenix_sparse.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        phoenix_sparse.nothing  # noqa: B018


def test_the_version_is_the_distribution_s():
    assert phoenix_sparse.__version__ == importlib.metadata.version("phoenix-sparse")


def test_the_command_s_name():
    """`phoenix` belongs to another package."""
    scripts = importlib.metadata.distribution("phoenix-sparse").entry_points.select(group="console_scripts")
    assert {script.name: script.value for script in scripts} == {"phx": "phoenix_sparse.cli:main"}
