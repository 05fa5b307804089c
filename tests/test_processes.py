"""A run on several processes of one launch: one writes and talks, all end with the same status."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from phoenix_sparse import pipeline, processes
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.recipe import Recipe, check, dump_recipe


def launch(tmp_path: Path, *arguments: str, code: str = "from phoenix_sparse import cli; cli.main()", **more: str):
    """Two processes with the environment that torchrun and `accelerate launch` give; their codes and words."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    common |= {"CUDA_VISIBLE_DEVICES": "", "LOCAL_WORLD_SIZE": "2"} | more
    running = []
    for rank in ("0", "1"):
        environment = os.environ | common | {"RANK": rank, "LOCAL_RANK": rank}
        with (tmp_path / f"{rank}.out").open("w") as out, (tmp_path / f"{rank}.err").open("w") as err:
            command = [sys.executable, "-c", code, *arguments]
            running.append(subprocess.Popen(command, env=environment, stdout=out, stderr=err))
    codes = [process.wait(timeout=240) for process in running]
    words = [(tmp_path / f"{rank}.{kind}").read_text() for rank in (0, 1) for kind in ("out", "err")]
    return codes, words


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory, model_directory, task_directory) -> Path:
    values = {
        "name": "small",
        "model": str(model_directory),
        "task": str(task_directory),
        "sparsify": {"calibration": {"samples": 6, "length": 16}},
        "finetune": {
            **{"ranks": [4, 2], "max_steps": 4, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 0.01},
            **{"max_length": 32, "checkpoint_every": 2, "log_every": 1, "validate_every": 2, "trackers": []},
        },
        "search": {"bounds": False, "hill_climb": 0},
        "evaluate": {"batch_size": 20, "baselines": ["dense_lora"], "prompt_length": 8, "context_length": 16},
    }
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(dump_recipe(check(Recipe, values, "test")))
    return path


def files_of(run: Path) -> set[str]:
    return {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_dtype_that_the_recipe_does_not_know_of_is_refused(monkeypatch, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.raises(PhoenixError, match=rf"mixed precision \({precision}\) .* --mixed_precision no, and set dtype="):
        processes.start("cpu")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    processes.start("cpu")


def test_two_processes_make_the_run_of_one(tmp_path, recipe_file):
    from phoenix_sparse.recipe import load_recipe

    run, alone = tmp_path / "two", tmp_path / "alone"
    codes, (said, told, silent, mute) = launch(tmp_path, "run", str(recipe_file), "--out", str(run))
    assert codes == [0, 0], (told, mute)
    assert "report:" in said
    assert silent == ""
    assert mute == ""
    pipeline.run(load_recipe(recipe_file), alone)
    assert files_of(run) == files_of(alone)
    tune, before = (json.loads((place / "tune.json").read_text()) for place in (run, alone))
    assert tune["processes"] == 2
    assert tune["tokens"] == before["tokens"]
    for one, two in zip(tune["validation"]["curve"], before["validation"]["curve"], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    for place in ("adapter/chosen", "baselines/dense_lora/adapter"):
        one, two = (load_file(where / place / "adapter_model.safetensors") for where in (run, alone))
        for name in two:
            assert_close(one[name], two[name], rtol=1e-3, atol=5e-5)
    certificate = json.loads((run / "certificate.json").read_text())
    assert certificate["off_mask_nonzeros"] == certificate["max_abs_logit_difference"] == 0

    # What is left to do is done by both, and what was done is kept by both.
    manifest = (run / "manifest.json").read_text()
    (run / "flops.json").unlink()
    codes, words = launch(tmp_path, "run", str(recipe_file), "--out", str(run), "--resume")
    assert codes == [0, 0]
    assert "finetune: done before, kept" in words[1]
    stages = [json.loads(text)["stages"] for text in ((run / "manifest.json").read_text(), manifest)]
    assert stages[0]["finetune"] == stages[1]["finetune"]
    assert (run / "flops.json").is_file()


FAILING = """
import sys
from phoenix_sparse import cli, steps
from phoenix_sparse.errors import CheckFailed
def fail(*_args, **_kwargs):
    raise CheckFailed("evaluate: no")
steps.{step} = fail
cli.main()
"""


@pytest.mark.parametrize("step", ["sparsify", pytest.param("tune", marks=pytest.mark.slow)])
def test_an_error_ends_all_processes_with_its_status(tmp_path, recipe_file, step):
    codes, words = launch(
        tmp_path, "run", str(recipe_file), "--out", str(tmp_path / "run"), code=FAILING.format(step=step)
    )
    assert codes == [1, 1]
    assert "phx: evaluate: no" in words[1]


def test_one_process_is_the_main_one(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes.is_main()
    assert processes.count() == 1
    assert processes.say({"a": 1}) == {"a": 1}
    processes.start("auto")
