"""Where commands write: nothing is laid over what is there, and a full disk leaves no half."""

import json
import os
import shutil
import subprocess

import pytest

from phoenix_sparse.files import read_json


def test_figures_of_a_run_are_not_written_over(phx, tmp_path, model_directory):
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "text").write_text("words " * 200)
    for command in (("eval", model_directory, "--text", tmp_path / "text"), ("flops", model_directory)):
        code, _, errors = phx(*command, "--out", tmp_path)
        assert (code, errors) == (
            2,
            [f"phx: --out: {tmp_path} is a run, with figures of its own; give another directory"],
        )


def test_a_comparison_is_not_laid_into_something_else(phx, tmp_path, chain, model_directory, task_directory):
    before = sorted(chain.rglob("*"))
    code, _, errors = phx("prune", model_directory, "--task", task_directory, "--compare", "wanda", "--out", chain)
    assert (code, errors) == (2, [f"phx: {chain} exists and is no comparison; give another directory with --out"])
    assert sorted(chain.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_without_permission_is_told_first(phx, tmp_path, model_directory, task_directory):
    tmp_path.chmod(0o500)
    code, _, errors = phx("prune", model_directory, "--task", task_directory, "--out", tmp_path / "out")
    tmp_path.chmod(0o700)
    assert (code, len(errors)) == (2, 1)
    assert "can't be written to" in errors[0]


@pytest.fixture
def little_disk(tmp_path):
    """A directory with room for the masks and not for the model."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting isn't permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("step", ["prune", "tune", "merge", "run"])
def test_a_full_disk_is_one_line_and_leaves_no_half(
    phx, little_disk, chain, tmp_path, model_directory, task_directory, step
):
    filler = little_disk / "filler"
    filler.write_bytes(bytes({"prune": 60_000, "tune": 124_000, "merge": 60_000, "run": 50_000}[step]))
    out = little_disk / "out"
    masks = ("--masks", chain / "masks.safetensors")
    recipe = tmp_path / "recipe.yaml"
    values = {"name": "a", "model": str(model_directory), "task": str(task_directory)}
    recipe.write_text(json.dumps(values | {"sparsify": {"calibration": {"samples": 2, "length": 16}}}))
    commands = {
        "prune": ("prune", model_directory, "importance=magnitude", "--out", out),
        "tune": ("tune", chain / "sparse", *masks, "--task", task_directory, "max_steps=1", "--out", out),
        "merge": ("merge", chain / "sparse", *masks, "--adapter", chain / "adapter/chosen", "--out", out),
        "run": ("run", recipe, "--out", out),
    }
    code, _, errors = phx(*commands[step])
    assert code == 2
    assert [line for line in errors if line.startswith("phx: ")] == errors[-1:]
    assert "the disk is full; free some space, then run the same again" in errors[-1]
    assert "Traceback" not in "".join(errors)
    left = list(out.rglob("*"))
    assert not [path for path in left if path.suffix == ".tmp"]
    assert not (out / "sparse").exists()
    assert not (out / "merged").exists()
    filler.unlink()
    for path in left:  # what is there is whole
        if path.suffix == ".json":
            read_json(path)
