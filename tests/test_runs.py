"""Run directories: what is kept and what is done again, who may write, what is never touched."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_json, sha256, write_json, write_text
from phoenix_sparse.recipe import Recipe, check, dump_recipe, load_recipe
from phoenix_sparse.runs import open_run

STAGES = ("one", "two", "three", "four")  # in this order, which is not the alphabet's


def recipe(**changes) -> Recipe:
    return check(Recipe, {"name": "a", "model": "models/a", "task": "gsm8k"} | changes, "test")


def go(directory: Path, *, fail: str | None = None, chosen: Recipe | None = None, **options) -> list[str]:
    """Run four stages, each of which builds a file and a directory on those before; give the ones that were done."""
    done = []

    def write(this, stage):
        done.append(stage)
        (this.work(stage)).mkdir(parents=True, exist_ok=True)
        (this.work(stage) / "checkpoint").write_text(stage)
        if stage == fail:
            raise PhoenixError(f"{stage} went wrong")
        before = "".join((directory / f"{name}.txt").read_text() for name in STAGES[: STAGES.index(stage)])
        write_text(this.path(f"{stage}.txt"), f"{stage} after {before}")
        write_text(this.path(f"{stage}/inner.txt"), stage)
        return [f"{stage}.txt", stage]

    with open_run(chosen or recipe(), directory, **({"resume": False} | options)) as this:
        for stage in STAGES:
            this.stage(stage, lambda stage=stage: write(this, stage))
    return done


def status(directory: Path) -> dict[str, str]:
    return {name: record["status"] for name, record in read_json(directory / "manifest.json")["stages"].items()}


def snapshot(directory: Path) -> dict[str, str]:
    return {path.relative_to(directory).as_posix(): sha256(path) for path in directory.rglob("*") if path.is_file()}


def test_a_run_leaves_its_files_their_hashes_and_nothing_else(tmp_path):
    run = tmp_path / "deep" / "run"
    assert go(run) == list(STAGES)
    files = {f"{stage}.txt" for stage in STAGES} | {f"{stage}/inner.txt" for stage in STAGES}
    assert set(snapshot(run)) == files | {"manifest.json", "recipe.yaml", ".lock"}
    manifest = read_json(run / "manifest.json")
    for stage in STAGES:
        record = manifest["stages"][stage]
        assert record["status"] == "done"
        assert record["seconds"] >= 0
        assert record["outputs"] == {name: sha256(run / name) for name in (f"{stage}.txt", stage)}
    assert load_recipe(run / "recipe.yaml") == recipe()
    assert {"torch", "transformers", "peft", "lm-eval", "python"} <= manifest["versions"].keys()
    assert manifest["host"]["memory_bytes"] > 2**20
    assert (manifest["name"], manifest["seed"]) == ("a", 0)


def test_what_is_done_is_kept(tmp_path):
    go(tmp_path)
    before = snapshot(tmp_path)
    assert go(tmp_path, resume=True) == []
    assert snapshot(tmp_path) == before


TAMPERINGS = {
    "changed": lambda path: path.write_text("changed"),
    "removed": lambda path: path.unlink(),
    "inner changed": lambda path: (path.with_suffix("") / "inner.txt").write_text("changed"),
    "inner removed": lambda path: (path.with_suffix("") / "inner.txt").unlink(),
    "inner added": lambda path: (path.with_suffix("") / "more.txt").write_text("more"),
}


@pytest.mark.parametrize("tamper", TAMPERINGS.values(), ids=TAMPERINGS)
@pytest.mark.parametrize("number", [0, 2, 3])
def test_a_tampered_stage_is_done_again_with_all_later_ones(tmp_path, tamper, number):
    go(tmp_path)
    whole = snapshot(tmp_path)
    tamper(tmp_path / f"{STAGES[number]}.txt")
    assert go(tmp_path, resume=True) == list(STAGES[number:])
    again = snapshot(tmp_path)
    again.pop(f"{STAGES[number]}/more.txt", None)  # these stages write into a directory; real ones replace it
    assert {**whole, "manifest.json": ""} == {**again, "manifest.json": ""}


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from(STAGES), min_size=1, unique=True))
def test_the_first_of_several_failures_counts(tmp_path_factory, broken):
    run = tmp_path_factory.mktemp("run")
    go(run)
    for stage in broken:
        (run / f"{stage}.txt").unlink()
    first = min(STAGES.index(stage) for stage in broken)
    assert go(run, resume=True) == list(STAGES[first:])
    assert go(run, resume=True) == []


@pytest.mark.parametrize("number", range(len(STAGES)))
def test_a_failed_stage_says_so_and_is_done_again(tmp_path, number):
    with pytest.raises(PhoenixError, match=f"{STAGES[number]} went wrong"):
        go(tmp_path, fail=STAGES[number])
    assert status(tmp_path) == dict.fromkeys(STAGES[:number], "done") | {STAGES[number]: "failed"}
    assert (tmp_path / ".work" / STAGES[number] / "checkpoint").is_file()  # to go on from
    assert go(tmp_path, resume=True) == list(STAGES[number:])
    assert not (tmp_path / ".work").exists()


def test_the_stage_that_goes_on_keeps_its_checkpoints_and_later_ones_lose_theirs(tmp_path):
    """A journal of a later stage belongs to files that are no longer there."""
    with pytest.raises(PhoenixError):
        go(tmp_path, fail="three")
    (tmp_path / "two.txt").unlink()
    seen = {}

    def look(this, stage):
        seen[stage] = (this.work(stage) / "checkpoint").exists()
        (tmp_path / f"{stage}.txt").write_text(stage)
        return [f"{stage}.txt"]

    (tmp_path / ".work" / "two").mkdir()
    (tmp_path / ".work" / "two" / "checkpoint").write_text("two")
    with open_run(recipe(), tmp_path, resume=True) as this:
        for stage in STAGES:
            this.stage(stage, lambda stage=stage: look(this, stage))
    assert seen == {"two": True, "three": False, "four": False}


def test_stages_are_announced(tmp_path):
    heard = []
    with pytest.raises(PhoenixError):
        go(tmp_path, fail="two", announce=lambda *words: heard.append(words))
    assert heard[0] == ("one", "started")
    assert heard[1][0] == "one"
    assert heard[1][1].endswith(" s")
    assert heard[2:] == [("two", "started")]
    heard.clear()
    go(tmp_path, resume=True, announce=lambda *words: heard.append(words))
    assert heard[:2] == [("one", "kept"), ("two", "started")]


SCRIPT = """
import os, signal, sys
from pathlib import Path
from test_runs import recipe
from phoenix_sparse.files import atomic_path
from phoenix_sparse.runs import open_run
def end():
    with atomic_path(this.path("half")) as temporary:
        temporary.mkdir()
        (temporary / "part").write_text("part")
        if sys.argv[2] == "wait":
            print("ready", flush=True)
            sys.stdin.readline()
        os.kill(os.getpid(), signal.SIGKILL)
def begin():
    this.path("whole.txt").write_text("whole")
    return ["whole.txt"]
with open_run(recipe(), Path(sys.argv[1]), resume=False) as this:
    this.stage("one", begin)
    this.stage("two", end)
"""


def other_process(run: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{SCRIPT}"]
    return subprocess.Popen([*command, str(run), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_kill_leaves_a_manifest_that_is_gone_on_from(tmp_path):
    run = tmp_path / "run"
    process = other_process(run, "kill")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert status(run) == {"one": "done", "two": "running"}
    assert len(list(run.glob(".half.*.tmp"))) == 1
    done = []

    def end():
        done.append("two")
        write_text(run / "half", "whole now")
        return ["half"]

    with open_run(recipe(), run, resume=True) as this:
        assert not this.stage("one", lambda: pytest.fail("was done"))
        assert this.stage("two", end)
    assert sorted(path.name for path in run.iterdir()) == [".lock", "half", "manifest.json", "recipe.yaml", "whole.txt"]


def test_a_second_process_is_refused(tmp_path):
    run = tmp_path / "run"
    process = other_process(run, "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    before = snapshot(run)
    for options in ({"resume": True}, {"resume": False, "overwrite": True}):
        with pytest.raises(PhoenixError, match="is in use by another process"):
            go(run, **options)
    assert snapshot(run) == before
    process.communicate("\n")
    assert process.returncode == -signal.SIGKILL
    with open_run(recipe(), run, resume=True):  # the lock went with the process
        assert not list(run.glob("*.tmp"))


def test_a_run_is_not_taken_up_unasked(tmp_path):
    go(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(PhoenixError, match="holds a run already; go on with it by --resume, or give another"):
        go(tmp_path)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"sparsify": {"sparsity": 0.7}}, "sparsify.sparsity is 0.5 there and 0.7 here"),
        # a value that stands elsewhere in the recipe, too
        ({"finetune": {"batch_size": 512}}, "finetune.batch_size is 32 there and 512 here"),
        ({"finetune": {"ranks": [8]}}, r"finetune.ranks is \[32, 24, 16\] there and \[8\] here"),
        ({"evaluate": {"perplexity": {"text": "a.txt"}}}, "evaluate.perplexity.text is None there and a.txt here"),
    ],
)
def test_another_recipe_is_refused_by_the_field_that_differs(tmp_path, changes, words):
    go(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(PhoenixError, match=f"is a run of another recipe: {words}; give another"):
        go(tmp_path, chosen=recipe(**changes), resume=True)
    assert snapshot(tmp_path) == before


def test_a_recipe_s_looks_do_not_matter(tmp_path):
    go(tmp_path)
    values = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text("# mine\n" + yaml.safe_dump(values, default_flow_style=True, sort_keys=True))
    assert go(tmp_path, resume=True) == []


def test_a_damaged_recipe_or_manifest_is_one_line(tmp_path):
    go(tmp_path)
    manifest = (tmp_path / "manifest.json").read_text()
    for content in ("[1", "[1]", "{}", '{"inputs": {}, "stages": {"one": 3}}', '{"inputs": 4, "stages": {}}'):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(PhoenixError, match=r"manifest.json(: not a JSON file| is no run's manifest)"):
            go(tmp_path, resume=True)
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(PhoenixError, match=r"recipe.yaml can't be read, .*begin anew with --overwrite"):
        go(tmp_path, resume=True)


def test_inputs_that_changed_are_refused(tmp_path):
    with open_run(recipe(), tmp_path, resume=False) as this:
        this.describe(model={"path": "a", "sha256": "1"}, task={"name": "t"})
    with open_run(recipe(), tmp_path, resume=True) as this:
        this.describe(model={"path": "a", "sha256": "1"}, task={"name": "t"})
        with pytest.raises(PhoenixError, match=r"the model has changed since this run began \(sha256\)"):
            this.describe(model={"path": "a", "sha256": "2"})
    assert read_json(tmp_path / "manifest.json")["inputs"]["model"] == {"path": "a", "sha256": "1"}


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hostname", "one/../../secret.txt"])
def test_a_manifest_s_names_do_not_lead_out_of_the_run(tmp_path, name):
    """Even with the right hash: a manifest may come from somebody else."""
    run = tmp_path / "run"
    go(run)
    (tmp_path / "secret.txt").write_text("secret")
    manifest = read_json(run / "manifest.json")
    manifest["stages"]["one"]["outputs"] = {name: sha256(tmp_path / "secret.txt")}
    write_json(run / "manifest.json", manifest)
    with pytest.raises(PhoenixError, match="leads out of the directory"):
        go(run, resume=True)
    assert (tmp_path / "secret.txt").read_text() == "secret"


@pytest.mark.parametrize("outputs", [None, [], "one.txt"])
def test_a_record_without_outputs_is_not_trusted(tmp_path, outputs):
    go(tmp_path)
    manifest = read_json(tmp_path / "manifest.json")
    manifest["stages"]["two"]["outputs"] = outputs
    write_json(tmp_path / "manifest.json", manifest)
    assert go(tmp_path, resume=True) == ["two", "three", "four"]


FOREIGN = [{"notes.txt": "mine"}, {"recipe.yaml": "mine: 1"}, {".hidden": "mine"}, {"x.tmp": "mine"}, {"a/b": "mine"}]


@pytest.mark.parametrize("content", FOREIGN, ids=lambda content: next(iter(content)))
@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_a_directory_of_something_else_is_left_alone(tmp_path, content, options):
    for name, text in content.items():
        write_text(tmp_path / name, text)
    before = snapshot(tmp_path)
    words = "only a run directory is overwritten" if "overwrite" in options else "exists and is no run directory"
    with pytest.raises(PhoenixError, match=words):
        go(tmp_path, **options)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_a_file_is_no_run_directory(tmp_path, options):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PhoenixError, match="file is not a directory; give another"):
        go(tmp_path / "file", **options)
    with pytest.raises(PhoenixError, match="Not a directory; give another"):
        go(tmp_path / "file" / "run", **options)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_place_that_can_not_be_locked_is_one_line(tmp_path):
    go(tmp_path)
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").mkdir()
    with pytest.raises(PhoenixError, match="Is a directory"):
        go(tmp_path, resume=True)


def test_overwriting_begins_anew(tmp_path):
    go(tmp_path)
    (tmp_path / "left.txt").write_text("from an older version")
    assert go(tmp_path, chosen=recipe(seed=5), overwrite=True) == list(STAGES)
    assert not (tmp_path / "left.txt").exists()
    assert read_json(tmp_path / "manifest.json")["seed"] == 5
    assert go(tmp_path / "new", overwrite=True) == list(STAGES)


def test_overwriting_leaves_what_a_link_points_to(tmp_path):
    go(tmp_path / "run")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("mine")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "model")
    go(tmp_path / "run", overwrite=True)
    assert (tmp_path / "model" / "weights").read_text() == "mine"
    assert not (tmp_path / "run" / "link").exists()


def test_a_kill_in_the_first_moment_does_not_spoil_the_directory(tmp_path):
    """Before the manifest, and between manifest and recipe."""
    for name, left in {"lock": {".lock": ""}, "half": {".lock": "", ".manifest.json.0a1b2c3d.tmp": "{"}}.items():
        for file, text in left.items():
            write_text(tmp_path / name / file, text)
        assert go(tmp_path / name) == list(STAGES)
        assert not list((tmp_path / name).glob("*.tmp"))
    with open_run(recipe(seed=7), tmp_path / "between", resume=False):
        (tmp_path / "between" / "recipe.yaml").unlink()
    assert go(tmp_path / "between", resume=True) == list(STAGES)
    assert (tmp_path / "between" / "recipe.yaml").read_text() == dump_recipe(recipe())
    assert json.loads((tmp_path / "between" / "manifest.json").read_text())["seed"] == 0
