"""Without the environment, one line says what to install; what a worker says comes through."""

import ast
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import phoenix_sparse.cerebras
from phoenix_sparse.cerebras.environment import VARIABLE, Environment, find_environment
from phoenix_sparse.cerebras.installing import ARCHIVES, _requirements, set_up
from phoenix_sparse.cerebras.layout import latest_checkpoint, read_record
from phoenix_sparse.cerebras.validating import validate
from phoenix_sparse.cli import app
from phoenix_sparse.errors import PhoenixError

HERE = Path(phoenix_sparse.cerebras.__file__).parent


@pytest.mark.parametrize("command", ["export", "trace", "import", "validate"])
def test_without_the_environment_one_line_says_what_to_do(command, tmp_path, monkeypatch, run_of):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    run = run_of("llama")
    arguments = {
        "export": [str(run), "--out", "job", "--mode", "static"],
        "trace": [str(run)],
        "import": ["job", "--run", str(run), "--out", "back"],
        "validate": ["a.mdl", "--masks", str(run / "masks.safetensors"), "--output", "report.json"],
    }
    result = CliRunner().invoke(app, ["cerebras", command, *arguments[command]])
    assert isinstance(result.exception, PhoenixError)
    assert "phx cerebras setup" in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_a_python_without_the_packages_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, sys.executable)
    with pytest.raises(PhoenixError, match="has no cerebras_pytorch"):
        find_environment()
    with pytest.raises(PhoenixError, match="no Python that runs"):
        find_environment(Path(__file__))


def test_without_modelzoo_nothing_is_exported():
    with pytest.raises(PhoenixError, match="needs ModelZoo"):
        Environment(Path(sys.executable), "2.10.0", None).require_modelzoo("an export")


def test_a_workers_refusal_and_its_crash_come_through(tmp_path):
    here = Environment(Path(sys.executable), "none", None)
    with pytest.raises(PhoenixError, match=r"cerebras: checkpoint: there is no file .*a\.mdl") as told:
        here.work("inspect_work", checkpoint=tmp_path / "a.mdl", masks=tmp_path / "m.npz")
    assert "\n" not in str(told.value)
    with pytest.raises(PhoenixError, match="TypeError"):
        here.work("inspect_work", nothing=1)


def test_no_module_reads_a_checkpoint_with_torch_load():
    for path in HERE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name):
                assert node.value.id in ("np", "cstorch", "modelzoo"), f"{path.name}:{node.lineno}"


def test_directories_that_are_no_export_are_told(tmp_path):
    with pytest.raises(PhoenixError, match="no phoenix.json"):
        read_record(tmp_path)
    (tmp_path / "phoenix.json").write_text("{}")
    with pytest.raises(PhoenixError, match="no record of an export"):
        read_record(tmp_path)
    with pytest.raises(PhoenixError, match="no trained checkpoint"):
        latest_checkpoint(tmp_path)


def test_the_latest_checkpoint_is_the_one_of_the_highest_step(tmp_path):
    (tmp_path / "model_dir").mkdir()
    for name in ("checkpoint_9.mdl", "checkpoint_100.mdl", "checkpoint_0.mdl", "checkpoint_x.mdl"):
        (tmp_path / "model_dir" / name).touch()
    assert latest_checkpoint(tmp_path).name == "checkpoint_100.mdl"


def test_validate_needs_the_numbers_of_heads(tmp_path):
    (tmp_path / "a.mdl").touch()
    here = Environment(Path(sys.executable), "none", None)
    with pytest.raises(PhoenixError, match="--config"):
        validate(tmp_path / "a.mdl", {}, None, here)
    with pytest.raises(PhoenixError, match="no file"):
        validate(tmp_path / "b.mdl", {}, None, here)


def test_setup_says_what_is_missing(tmp_path):
    with pytest.raises(PhoenixError, match="no checkout"):
        set_up(tmp_path / "e", modelzoo=tmp_path, bigcode=None, python=None, say=print)
    with pytest.raises(PhoenixError, match="there is no python-of-no-version"):
        set_up(tmp_path / "e", modelzoo=None, bigcode=None, python="python-of-no-version", say=print)
    assert not (tmp_path / "e").exists()


def test_setup_reads_modelzoos_pins(tmp_path):
    (tmp_path / "setup.py").write_text(
        "setup(\n    install_requires=[\n"
        '        f"cerebras_pytorch=={__version__}",\n        "tabulate==0.9.0",\n        "pyYAML",\n'
        '        "deepdiff>=8.6.1,<9",\n        "lm-eval @ https://host/a.zip",\n    ],\n)\n'
    )
    found = _requirements(tmp_path / "setup.py")
    assert found == {
        "tabulate": "tabulate==0.9.0",
        "pyYAML": "pyYAML",
        "deepdiff": "deepdiff>=8.6.1,<9",
        "lm-eval": "lm-eval",
    }
    assert "lm-eval" in ARCHIVES
