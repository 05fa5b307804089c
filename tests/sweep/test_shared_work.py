"""Shared work: the same by hash or not at all, computed once, whole or absent."""

import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from phoenix_sparse import pipeline
from phoenix_sparse.files import read_json, sha256
from phoenix_sparse.recipe import Recipe, check, override
from phoenix_sparse.sweep import shared_work
from phoenix_sparse.sweep.shared_work import ENTRY, FILES, Store, code_sha256, inputs_of, key_of, sharing

MANIFEST = {
    "host": {"cpu": "c", "gpu": None, "threads": 1, "platform": "p"},
    "versions": {"torch": "2"},
    "phoenix": "0",
    "git_commit": None,
    "inputs": {"model": {"sha256": "m"}, "task": {"name": "t"}, "texts": {}},
}
STAGES = ("sparsify", "gradients", "baseline dense", "baseline pruned", "baseline dense_lora")


def recipe(*changes: str) -> Recipe:
    return check(Recipe, override({"name": "x", "model": "m", "task": "t"}, changes), "test")


def shared_between(stage: str, one: Recipe, other: Recipe) -> bool:
    return key_of(inputs_of(stage, one, MANIFEST)) == key_of(inputs_of(stage, other, MANIFEST))


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ("finetune.mode=sparse_to_dense", set(STAGES)),
        ("name=y", set(STAGES)),
        ("search.hill_climb=1", set(STAGES)),
        ("finetune.epochs=9", {"sparsify", "gradients", "baseline dense", "baseline pruned"}),
        ("sparsify.sparsity=0.7", {"gradients", "baseline dense", "baseline dense_lora"}),
        ("sparsify.importance=taylor", {"gradients", "baseline dense", "baseline dense_lora"}),
        ("sparsify.calibration.samples=3", {"baseline dense", "baseline dense_lora"}),
        ("evaluate.batch_size=1", {"sparsify", "gradients"}),
        ("evaluate.baselines=[dense]", set(STAGES)),
        ("evaluate.dense_lora_learning_rate=0.1", set(STAGES) - {"baseline dense_lora"}),
        ("evaluate.split=validation", {"sparsify", "gradients"}),
        ("evaluate.also=[boolq]", set()),
        ("task.max_train=5", set()),
        ("seed=1", set()),
        ("dtype=bfloat16", set()),
        ("threads=2", set()),
        ("deterministic=false", set()),
    ],
)
def test_what_a_setting_changes_is_not_shared(change, stages):
    first = recipe("sparsify.importance=gblm")
    found = {stage for stage in STAGES if shared_between(stage, first, recipe("sparsify.importance=gblm", change))}
    assert found == stages


@pytest.mark.parametrize(("named", "shared"), [("update=sparsegpt", True), ("importance=wanda", False)])
def test_the_default_shares_with_whoever_names_it(named, shared):
    one, other = recipe(), recipe(f"sparsify.{named}")
    for stage in ("sparsify", "baseline pruned"):
        assert shared_between(stage, one, other) is shared
    assert shared_between("baseline dense", one, other)


@pytest.mark.parametrize("where", [("host", "cpu"), ("host", "gpu"), ("versions", "torch"), ("inputs", "model")])
def test_another_machine_or_version_or_model_shares_nothing(where):
    one = recipe()
    section, field = where
    other = MANIFEST | {section: MANIFEST[section] | {field: {"sha256": "n"} if field == "model" else "other"}}
    for stage in STAGES:
        assert key_of(inputs_of(stage, one, MANIFEST)) != key_of(inputs_of(stage, one, other))


def test_changed_code_shares_nothing(monkeypatch):
    """Its commit may be the same, or none may be known."""
    before = {stage: key_of(inputs_of(stage, recipe(), MANIFEST)) for stage in STAGES}
    assert before == {stage: key_of(inputs_of(stage, recipe(), MANIFEST)) for stage in STAGES}
    monkeypatch.setattr(shared_work, "own_code", lambda: "changed")
    for stage in STAGES:
        assert key_of(inputs_of(stage, recipe(), MANIFEST)) != before[stage]


def test_the_code_s_hash_changes_with_every_source_and_with_nothing_else(tmp_path):
    package = tmp_path / "package"
    names = ("a.py", "inner/b.py", "tasks/definitions/c.yaml", "csrc/d.cpp", "csrc/e.h", "cuda/f.cu")
    for name in names:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(name)
    seen = [code_sha256(package)]
    for name in names:
        (package / name).write_text("edited")
        seen.append(code_sha256(package))
    (package / "a.py").rename(package / "renamed.py")
    seen.append(code_sha256(package))
    (package / "new.py").touch()
    seen.append(code_sha256(package))
    (package / "new.py").unlink()
    assert len(set(seen)) == len(seen)
    assert code_sha256(package) == seen[-2]
    for name in ("__pycache__/a.cpython-311.pyc", "library.so", ".a.py.swp", ".hidden/a.py", ".#a.py"):
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text("made")
    assert code_sha256(package) == seen[-2]


def test_it_is_this_package_that_is_hashed():
    package = Path(shared_work.__file__).parents[1]
    assert (package / "pruning").is_dir()
    assert shared_work.own_code() == shared_work.own_code() != code_sha256(package / "pruning")


def test_masks_that_read_no_data_are_shared_between_tasks_and_others_are_not():
    for importance, shared in (("magnitude", True), ("random", True), ("wanda", False), ("taylor", False)):
        one, other = (recipe(f"sparsify.importance={importance}", f"task.max_test={size}") for size in (1, 2))
        assert shared_between("sparsify", one, other) is shared


def test_stages_of_a_run_alone_are_never_shared():
    for stage in ("finetune", "search", "merge", "evaluate", "flops", "report"):
        assert inputs_of(stage, recipe(), MANIFEST) is None


def test_a_damaged_entry_is_made_anew(tmp_path):
    store, made = Store(tmp_path / "shared"), []

    def make(target: Path):
        def action():
            made.append(target)
            (target / "out").mkdir(parents=True)
            (target / "out" / "file").write_text("right")
            return ["out"]

        return action

    for name in ("a", "b"):
        store.take_or_make("stage", {"x": 1}, tmp_path / name, name, make(tmp_path / name))
    assert len(made) == 1
    assert (tmp_path / "b/out/file").read_text() == "right"
    kept = tmp_path / "shared" / "stage" / key_of({"x": 1})
    assert read_json(kept / ENTRY)["made_by"] == "a"
    (kept / FILES / "out" / "file").unlink()  # the run's own file is another link, and stays
    (kept / FILES / "out" / "file").write_text("wrong")
    store.take_or_make("stage", {"x": 1}, tmp_path / "c", "c", make(tmp_path / "c"))
    assert len(made) == 2
    assert [(tmp_path / name / "out/file").read_text() for name in "abc"] == ["right"] * 3


def _slow(directory: Path, name: str) -> None:
    def action():
        with (directory / "made").open("a") as stream:
            stream.write(f"{name}\n")
        time.sleep(0.5)
        (directory / name).mkdir()
        (directory / name / "file").write_text("made")
        return ["file"]

    Store(directory / "shared").take_or_make("stage", {"x": 1}, directory / name, name, action)


def test_two_processes_that_need_it_at_once_do_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_slow, args=(tmp_path, name)) for name in ("a", "b", "c")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert len((tmp_path / "made").read_text().splitlines()) == 1
    assert {(tmp_path / name / "file").read_text() for name in "abc"} == {"made"}


def test_a_run_with_shared_work_ends_in_the_files_of_one_without(tmp_path, model_directory, task_directory):
    values = {
        "model": str(model_directory),
        "task": str(task_directory),
        "sparsify": {"importance": "taylor", "calibration": {"samples": 4, "length": 16}},
        "finetune": {"ranks": [2], "max_steps": 2, "batch_size": 4, "max_length": 32},
        "search": {"bounds": False, "hill_climb": 0},
        "evaluate": {"batch_size": 20, "prompt_length": 8, "context_length": 16, "baselines": ["dense", "pruned"]},
    }
    for name, changes in (
        ("first", ()),
        ("second", ("finetune.mode=sparse_to_dense",)),
        ("third", ("sparsify.sparsity=0.7",)),
    ):
        chosen = check(Recipe, override({"name": name, **values}, changes), name)
        pipeline.run(chosen, tmp_path / name, share=sharing(chosen, tmp_path / "shared"))
        pipeline.run(chosen, tmp_path / f"{name}-alone")
    stages = {name: read_json(tmp_path / name / "manifest.json")["stages"] for name in ("first", "second", "third")}
    taken = {name: {stage for stage in found if "shared" in found[stage]} for name, found in stages.items()}
    assert taken["first"] == set()
    assert taken["second"] == {"sparsify", "baseline dense", "baseline pruned"}
    assert taken["third"] == {"baseline dense"}
    assert stages["second"]["sparsify"]["shared"]["made_by"] == "first"
    assert len(list((tmp_path / "shared" / "gradients").glob("*/entry.json"))) == 1  # of both sparsities
    for name in stages:
        for file in ("masks.safetensors", "sparse/model.safetensors", "merged/model.safetensors"):
            one, other = (load_file(tmp_path / place / file) for place in (name, f"{name}-alone"))
            assert all(torch.equal(one[key], other[key]) for key in one | other)
        assert (tmp_path / name / "masks.safetensors").stat().st_nlink >= 2
    # A run that has taken its stages is resumed like any other.
    chosen = check(Recipe, override({"name": "second", **values}, ["finetune.mode=sparse_to_dense"]), "second")
    before = sha256(tmp_path / "second" / "merged")
    (tmp_path / "second" / "merged" / "config.json").unlink()
    pipeline.run(chosen, tmp_path / "second", resume=True, share=sharing(chosen, tmp_path / "shared"))
    assert sha256(tmp_path / "second" / "merged") == before
