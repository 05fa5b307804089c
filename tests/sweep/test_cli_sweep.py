"""phx sweep, as a user calls it: exit codes and what is said."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from phoenix_sparse import cli
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.sweep import launching, planning
from phoenix_sparse.sweep.places import Places, note


def phx(*arguments: object):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def file(tmp_path, monkeypatch, model_directory, task_directory) -> Path:
    """A sweep whose runs end at once, with the code that their cell's task says."""
    code = (
        "import json, sys; from pathlib import Path\n"
        "out, name = Path(sys.argv[1]), sys.argv[2]\n"
        "if 'bad' in name and not (out / 'mended').exists(): print('phx: no such data'); sys.exit(2)\n"
        "run = out / 'runs' / name; run.mkdir(parents=True)\n"
        "facts = {'phoenix': '0', 'name': name, 'created': '2026', 'inputs': {}}\n"
        "facts['stages'] = {'report': {'status': 'done'}}\n"
        "(run / 'manifest.json').write_text(json.dumps(facts))\n"
    )
    monkeypatch.setattr(launching, "command", lambda job: [sys.executable, "-c", code, job.out, job.name])
    values = {
        "name": "mine",
        "models": {"tiny": str(model_directory)},
        "tasks": {"good": str(task_directory), "bad": str(task_directory)},
        "base": {"finetune": {"ranks": [2], "max_steps": 1, "batch_size": 4, "max_length": 32}},
        "methods": {"magnitude": {"importance": "magnitude"}},
        "engine": {"kind": "inline"},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "sweep.yaml"


def test_plan_runs_nothing(file, tmp_path):
    done = phx("sweep", "plan", file, "--cells", "sparsities=[0.5, 0.7]")
    assert done.exit_code == 0, done.output
    assert "mine: 4 runs (1 model x 2 tasks x 1 method x 2 sparsities x 1 mode x 1 seed)" in done.output
    assert "baseline dense: needed by 4 runs, computed 1 time\n" in done.output
    assert "; 1 retry\n" in done.output
    assert "tiny-good-magnitude-70-s2s-s0" in done.output
    assert "training, estimated" in done.output
    assert list(tmp_path.iterdir()) == [file]


def test_a_sweep_that_keeps_results_alone_needs_less_room(file):
    from phoenix_sparse.sweep.matrix import load_sweep
    from phoenix_sparse.sweep.planning import estimated_cost

    def room(*changes: str) -> float:
        return estimated_cost(load_sweep(file, ["modes=[sparse_to_sparse, sparse_to_dense]", *changes]))["disk_bytes"]

    many = "seeds=[0, 1, 2, 3, 4, 5]"
    whole, light = room(many), room(many, "keep=results")
    assert 0 < light < whole / 2
    assert light < room(many, "keep=results", "engine.workers=3") < whole  # which are at work at once
    assert room(many, "keep=results", "share=false") < light  # nothing is kept for others


def test_a_failed_run_is_exit_code_3_and_resume_mends_it(file):
    done = phx("sweep", "run", file)
    assert done.exit_code == 3, done.output
    begun = "2 runs to do in sweeps/mine, inline on this machine, 1 at once on a node; `phx sweep status sweeps/mine`"
    assert done.output.startswith(begun)  # before the first run has ended, which may take hours
    assert "failed: tiny-bad-magnitude-50-s2s-s0 (1 attempt): exit code 2: phx: no such data" in done.output
    assert "2 runs: 1 done, 1 failed" in done.output
    for what in (file, "sweeps/mine"):
        told = phx("sweep", "status", what)
        assert told.exit_code == 0
        assert "2 runs: 1 done, 1 failed" in told.output
    Path("sweeps/mine/mended").touch()
    done = phx("sweep", "resume", "sweeps/mine", "--out", "elsewhere")
    assert str(done.exception) == "--out: sweeps/mine is the sweep's directory already; leave --out away"
    done = phx("sweep", "resume", ".")
    assert str(done.exception) == ".: no sweep lies here; begin it with `phx sweep run`"
    done = phx("sweep", "resume", "sweeps/mine")
    assert done.exit_code == 0, done.output
    assert "2 runs: 2 done" in done.output
    assert done.output.startswith("1 run to do in sweeps/mine, ")
    again = phx("sweep", "resume", file).output
    assert "2 runs: 2 done" in again
    assert "to do" not in again


def test_a_directory_in_use_is_refused_before_models_and_data_are_read(file, monkeypatch):
    def read(_sweep: object) -> None:
        pytest.fail("the inputs were read first")

    def refusal(*arguments: object) -> str:
        return str(phx("sweep", *arguments).exception)

    missing = "tasks.bad=nowhere"
    assert "nowhere" in refusal("run", file, missing)
    assert not Path("sweeps").exists()  # and nothing is made of one whose inputs are wrong
    phx("sweep", "run", file)
    monkeypatch.setattr(planning, "check_inputs", read)
    go_on = "sweeps/mine holds a sweep already; go on with it by `phx sweep resume sweeps/mine`, or give --out"
    assert refusal("run", file) == go_on
    assert "sweeps/mine is a sweep with another tasks; " in refusal("resume", file, missing)
    assert "elsewhere: no sweep.yaml; begin it with" in refusal("resume", file, "--out", "elsewhere")
    assert "sweep.yaml is not a directory" in refusal("run", file, "--out", file)
    with Path("sweeps/mine/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "sweeps/mine is in use by another `phx sweep`; wait for it" in refusal("resume", file)


def test_damaged_files_of_the_directory_are_named(file):
    Path("sweeps/mine").mkdir(parents=True)
    Path("sweeps/mine/mended").touch()
    assert phx("sweep", "run", file).exit_code == 0
    manifest = Path("sweeps/mine/runs/tiny-bad-magnitude-50-s2s-s0/manifest.json")
    manifest.write_text("{")
    told = phx("sweep", "status", file)
    assert f"failed: {manifest.parent.name} (1 attempt): {manifest}: not a JSON file" in told.output
    assert "2 runs: 1 done, 1 failed" in told.output
    Path("sweeps/mine/sweep.yaml").write_text("name: [")
    done = phx("sweep", "resume", file)
    assert isinstance(done.exception, PhoenixError)  # which `cli.main` tells in one line, with exit code 2
    assert str(done.exception).startswith("sweep: sweeps/mine/sweep.yaml is not YAML")


def test_one_cell_is_a_run_like_any_other(file):
    quick = ["base.evaluate.baselines=[]", "base.search={bounds: false, hill_climb: 0}"]
    phx("sweep", "run", file, *quick)  # its runs are stand-ins, which leave a manifest alone
    name = "tiny-good-magnitude-50-s2s-s0"
    Path("sweeps/mine/runs", name, "manifest.json").unlink()
    done = phx("sweep", "one", "sweeps/mine", name)
    assert done.exit_code == 0, done.output
    assert (Path("sweeps/mine/runs") / name / "report.html").is_file()
    assert list(Path("sweeps/mine/shared/sparsify").glob("*/entry.json"))
    done = phx("report", "sweeps/mine")
    assert str(done.exception).startswith("sweeps/mine holds runs and is none; add --out DIR to analyse them")
    done = phx("report", "sweeps/mine", "--out", "analysis")
    assert done.exit_code == 0, done.output
    assert "good" in Path("analysis/index.html").read_text()


def test_a_run_whose_results_alone_are_kept_loses_its_models_and_stays_done(file):
    quick = ["base.evaluate.baselines=[]", "base.search={bounds: false, hill_climb: 0}"]
    phx("sweep", "run", file, *quick)  # stand-ins
    name = "tiny-good-magnitude-50-s2s-s0"
    run = Path("sweeps/mine/runs", name)
    (run / "manifest.json").unlink()
    done = phx("sweep", "one", "sweeps/mine", name, "--no-models")
    assert done.exit_code == 0, done.output
    assert not any((run / directory).exists() for directory in ("sparse", "merged"))
    assert {path.name for path in run.rglob("*.safetensors")} == {"masks.safetensors"}
    assert "1 done, 1 failed" in phx("sweep", "status", file).output
    assert (run / "eval.json").is_file()
    assert "was removed" in (run / "README.md").read_text()
    begun = json.loads((run / "manifest.json").read_text())["stages"]
    (run / "merged").mkdir()
    (run / "merged" / "config.json").write_text("{}")  # as if it had been killed before it removed this
    assert phx("sweep", "one", "sweeps/mine", name, "--no-models").exit_code == 0
    assert not (run / "merged").exists()
    assert json.loads((run / "manifest.json").read_text())["stages"] == begun  # and nothing was done again
    assert list(Path("sweeps/mine/shared").rglob("model.safetensors"))  # which other runs may still want
    Path("sweeps/mine/mended").touch()
    assert phx("sweep", "resume", file, *quick, "keep=results").exit_code == 0
    assert not Path("sweeps/mine/shared").exists()  # nobody is left to want it


def test_a_run_that_noted_its_interruption_has_not_failed(file):
    """Its worker was killed, and could note nothing: as when a batch job ends."""
    phx("sweep", "run", file)  # stand-ins
    name, places = "tiny-good-magnitude-50-s2s-s0", Places(Path("sweeps/mine"))
    shutil.rmtree(places.run(name))
    command = [sys.executable, "-m", "phoenix_sparse.cli", "sweep", "one", "sweeps/mine", name]
    with (places.cell(name) / "log.txt").open("ab") as log:
        run = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    note(places.cell(name), "begun", attempt=2, pid=run.pid)
    while not _catches(run.pid, signal.SIGTERM):  # from its first moments on, long before there is a manifest
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 130
    said = (places.cell(name) / "log.txt").read_text()
    assert f"interrupted; {places.resume} goes on from the last checkpoint" in said
    told = phx("sweep", "status", file)
    assert told.exit_code == 0
    assert f"interrupted: {name} (starting, attempt 2)\n" in told.output
    assert "2 runs: 1 interrupted, 1 failed\n`phx sweep resume sweeps/mine` goes on with what was" in told.output
    note(places.cell("tiny-bad-magnitude-50-s2s-s0"), "begun", attempt=2, pid=os.getpid())  # the sweep is at work
    assert "resume" not in phx("sweep", "status", file).output
    note(places.cell("tiny-bad-magnitude-50-s2s-s0"), "ended", attempt=2, exit=2, seconds=1.0, stopped=False)
    done = phx("sweep", "resume", file)
    assert done.exit_code == 3, done.output
    assert "2 runs: 1 done, 1 failed" in done.output


def _catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (caught,) = (line.split()[1] for line in lines if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_an_interrupt_that_python_drops_comes_again():
    """What is raised while an object is freed is dropped; the run would go on to its end."""
    code = (
        "import signal, sys, time\n"
        "from phoenix_sparse.cli_sweep import _again, _interrupt\n"
        "signal.signal(signal.SIGTERM, _interrupt); sys.unraisablehook = _again\n"
        "class Freed:\n"
        "    def __del__(self): signal.raise_signal(signal.SIGTERM); time.sleep(0)\n"
        "try:\n"
        "    Freed(); print('dropped', flush=True); time.sleep(20)\n"
        "except KeyboardInterrupt: sys.exit(130)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (130, "dropped\n"), done.stderr
