"""A sweep's directory: laid out, gone on with, its states and its table, from files alone."""

import os
import platform
import shlex
import sys
from pathlib import Path

import pandas
import pytest

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import write_json
from phoenix_sparse.sweep import launching
from phoenix_sparse.sweep.matrix import Sweep, resolve
from phoenix_sparse.sweep.places import Places, note
from phoenix_sparse.sweep.registry import write_registry
from phoenix_sparse.sweep.running import cell_recipe, known_cells, lay_out, run_sweep
from phoenix_sparse.sweep.settings import SweepSettings
from phoenix_sparse.sweep.status import counts, standing, standings

# Leaves what a run of one stage would leave, unless its name or a file says that it fails.
RUN = """
import json, sys
from pathlib import Path
out, name = Path(sys.argv[1]), sys.argv[2]
if "random" in name and (out / "trouble").exists():
    print("phx: finetune: the loss is nan at step 3", flush=True); sys.exit(2)
run = out / "runs" / name
(run / "baselines" / "dense").mkdir(parents=True, exist_ok=True)
manifest = {"phoenix": "0.1.0", "name": name, "created": "2026-01-01T00:00:00+00:00", "git_commit": "c" * 40,
            "versions": {"torch": "2.13"}, "host": {"cpu": "some CPU", "cores": 2}, "seed": 0,
            "inputs": {"model": {"path": "m", "sha256": "h"}, "task": {"name": "t", "train": 5}},
            "stages": {"report": {"status": "done", "seconds": 1.5, "outputs": {}, "begun": "2026"}}}
(run / "manifest.json").write_text(json.dumps(manifest))
(run / "recipe.yaml").write_text((out / "cells" / name / "recipe.yaml").read_text())
measured = {"accuracy": 0.25, "stderr": 0.01, "metric": "acc", "task": "t", "split": "test", "examples": 4,
            "num_fewshot": 0}
(run / "eval.json").write_text(json.dumps({"phoenix": measured}))
"""


@pytest.fixture(autouse=True)
def stand_in(monkeypatch, tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    monkeypatch.setattr(launching, "command", lambda job: [sys.executable, str(tmp_path / "run.py"), job.out, job.name])


def sweep(**changes: object) -> Sweep:
    values = {
        "name": "small",
        "models": ["demo"],
        "tasks": ["demo"],
        "methods": {"magnitude": {"importance": "magnitude"}, "random": {"importance": "random"}},
        "sparsities": [0.2, 0.5],
        "engine": {"kind": "inline", "workers": 2},
    }
    settings = SweepSettings.model_validate(values | changes)
    cells, excluded = resolve(settings, settings.base)
    return Sweep(settings, cells, excluded)


def test_what_failed_has_its_reason_in_the_table_and_no_figure_and_resume_finishes_it(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "trouble").touch()
    told = []
    found = run_sweep(sweep(), out, resume=False, tell=lambda one, count, total: told.append((one.name, count, total)))
    assert counts(found) == {"done": 2, "running": 0, "interrupted": 0, "failed": 2, "waiting": 0}
    assert sorted(count for _, count, _ in told) == [1, 2, 3, 4]
    for table in (pandas.read_csv(out / "registry.csv"), pandas.read_parquet(out / "registry.parquet")):
        failed, done = table[table["state"] == "failed"], table[table["state"] == "done"]
        assert list(failed["accuracy"].isna()) == [True, True]
        assert all("exit code 2: phx: finetune: the loss is nan" in reason for reason in failed["reason"])
        assert set(failed["target_sparsity"]) == {0.2, 0.5}  # what a cell is, is known without a run of it
        assert list(done["accuracy"]) == [0.25, 0.25]
        assert done["accuracy_dense"].isna().all()  # not measured, and not filled in
        assert set(done["host_cpu"]) == {"some CPU"}
        assert set(done["git_commit"]) == {"c" * 40}
        assert set(done["settings.sparsify.importance"]) == {"magnitude"}
    (out / "trouble").unlink()
    found = run_sweep(sweep(), out, resume=True)
    assert counts(found)["done"] == 4
    assert [one.attempts for one in found] == [1, 1, 2, 2]  # what was done wasn't done again
    assert pandas.read_csv(out / "registry.csv")["accuracy"].notna().all()


def test_a_directory_is_one_sweep_s(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(PhoenixError, match="begin it with"):
        run_sweep(sweep(), out, resume=True)
    run_sweep(sweep(), out, resume=False)
    with pytest.raises(PhoenixError, match="holds a sweep already"):
        run_sweep(sweep(), out, resume=False)
    with pytest.raises(PhoenixError, match="another sparsities"):
        run_sweep(sweep(sparsities=[0.2]), out, resume=True)
    run_sweep(sweep(engine={"kind": "inline", "workers": 1}, retries=5), out, resume=True)  # how, not what


def test_cells_are_found_again_with_their_recipes(tmp_path):
    out = tmp_path / "out"
    run_sweep(sweep(), out, resume=False)
    places = Places(out)
    assert known_cells(places) == sorted(cell.name for cell in sweep().cells)
    for cell in sweep().cells:
        assert cell_recipe(places, cell.name) == cell.recipe
    with pytest.raises(PhoenixError, match="no cell 'nobody'"):
        cell_recipe(places, "nobody")
    with pytest.raises(PhoenixError, match="no sweep lies here"):
        known_cells(Places(tmp_path / "empty"))


def test_states_are_read_from_the_files_alone(tmp_path):
    places, name = Places(tmp_path), "x"
    cell, manifest = places.cell(name), places.run(name) / "manifest.json"
    assert standing(places, name).state == "waiting"
    note(cell, "begun", attempt=1, pid=os.getpid())
    assert standing(places, name).state == "running"
    facts = {"phoenix": "0", "name": "x", "created": "2026", "inputs": {}}
    stages = {"sparsify": {"status": "done", "begun": "1"}, "finetune": {"status": "running", "begun": "2"}}
    write_json(manifest, facts | {"stages": stages})
    one = standing(places, name)
    assert (one.state, one.stage) == ("running", "finetune")
    note(cell, "ended", attempt=1, exit=130, seconds=3.0, stopped=True)
    assert (standing(places, name).state, standing(places, name).seconds) == ("interrupted", 3.0)
    note(cell, "begun", attempt=2, pid=2**22 + 1)  # beyond the largest process number
    one = standing(places, name)
    assert (one.state, one.reason, one.seconds) == ("failed", "its process is gone without a word", None)
    note(cell, "interrupted", pid=2**22 + 1)  # it ended in order, and its worker was gone
    one = standing(places, name)
    assert (one.state, one.reason, one.attempts) == ("interrupted", None, 2)
    note(cell, "begun", attempt=3, pid=2**22 + 2)
    note(cell, "interrupted", pid=2**22 + 1)  # the earlier one, late
    assert standing(places, name).state == "failed"
    note(cell, "ended", attempt=3, exit=-9, seconds=4.0, stopped=False)
    assert standing(places, name).reason == "killed by signal 9"
    stages = {"sparsify": {"status": "running"}, "report": {"status": "done"}}  # done again from the start
    write_json(manifest, facts | {"stages": stages})
    assert standing(places, name).state == "failed"
    write_json(manifest, facts | {"stages": {stage: {"status": "done"} for stage in stages}})
    assert standing(places, name).state == "done"
    for text in ("{", "[]", "{}", '{"inputs": {}, "stages": [1]}', '{"inputs": {}, "stages": {"report": 1}}'):
        manifest.write_text(text)
        one = standing(places, name)
        assert one.state == "failed"
        assert one.reason is not None
        assert one.reason.startswith(str(manifest))
        assert f"delete {places.run(name)}, then {places.resume} begins this run anew" in one.reason
    note(cell, "begun", attempt=4, pid=os.getpid())
    note(cell, "ended", attempt=4, exit=0, seconds=4.0, stopped=False)
    manifest.unlink()
    assert f"is gone; {places.resume} begins this run anew" in str(standing(places, name).reason)


@pytest.mark.parametrize("name", ["sweeps/mine", "with a space", "it's mine; rm"])
def test_the_command_to_go_on_with_can_be_copied_into_a_shell(name):
    command = Places(Path(name)).resume
    assert shlex.split(command.strip("`")) == ["phx", "sweep", "resume", name]


def test_of_a_run_on_another_machine_its_record_is_known(tmp_path, monkeypatch):
    places, name = Places(tmp_path), "x"
    with monkeypatch.context() as there:
        there.setattr(platform, "node", lambda: "elsewhere")
        note(places.cell(name), "begun", attempt=1, pid=1)
    assert standing(places, name).state == "running"
    note(places.cell(name), "interrupted", pid=1)
    assert standing(places, name).state == "interrupted"


@pytest.mark.parametrize("file", ["eval.json", "recipe.yaml", "bench.json"])
def test_a_damaged_result_is_that_cell_s_failure(tmp_path, file):
    out, cells = tmp_path / "out", sweep().cells
    run_sweep(sweep(), out, resume=False)
    places = Places(out)
    broken: Path = places.run(cells[0].name) / file
    broken.write_text('{"phoenix": {"accuracy": 7')
    found = standings(places, [cell.name for cell in cells])
    assert counts(found)["failed"] == 1
    assert str(found[0].reason).startswith(str(broken))
    assert (f"delete {broken.parent}," in str(found[0].reason)) == (file == "recipe.yaml")
    assert (places.resume in str(found[0].reason)) == (file != "bench.json")
    write_registry(places, cells, found)
    table = pandas.read_csv(out / "registry.csv")
    assert list(table["state"]) == ["failed", "done", "done", "done"]
    assert str(broken) in table["reason"][0]
    assert list(table["accuracy"].isna()) == [True, False, False, False]
    if file == "eval.json":
        assert counts(run_sweep(sweep(), out, resume=True))["done"] == 4


@pytest.mark.parametrize("text", ["name: [", "- 1", "\x80"])
def test_a_damaged_sweep_file_is_named_and_can_be_made_anew(tmp_path, text):
    out = tmp_path / "out"
    run_sweep(sweep(), out, resume=False)
    file = out / "sweep.yaml"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(PhoenixError) as caught:
        lay_out(sweep(), Places(out), resume=True)
    assert str(file) in str(caught.value)
    assert "delete it, and `phx sweep run`" in str(caught.value)
    assert "\n" not in str(caught.value)
    file.unlink()
    found = run_sweep(sweep(), out, resume=False)
    assert [one.attempts for one in found] == [1, 1, 1, 1]  # what was done is left
