"""Work that runs share: the pruned model, gradients, baselines. Computed once, found again by the hash of its inputs.

A piece of work is shared only between runs for which everything that it reads is the same: the model's and the data's
hashes, the settings that it looks at, the seed, the dtype, the kind of machine, the versions of Phoenix, torch and the
libraries below, and Phoenix's own files, committed or not. What isn't listed in `inputs_of` is never shared. Where two
runs need the same work at once, a file lock lets one do it and the other wait; the lock ends with its process, whatever
ends it.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import atomic_path, inside, read_json, sha256, write_json
from phoenix_sparse.recipe import Recipe
from phoenix_sparse.runs import Action, Run, Share

ENTRY = "entry.json"
FILES = "files"
GRADIENTS = "gradients"
SOURCES = {".py", ".yaml", ".cpp", ".cu", ".h"}
# Settings of `evaluate` that the evaluation of a baseline doesn't look at.
NOT_OF_A_BASELINE = ["baselines", "dense_lora_learning_rate", "certificate_examples", "prompt_length", "context_length"]


def inputs_of(stage: str, recipe: Recipe, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """All that a stage's outputs depend on, or None for a stage that is a run's own.

    Args:
        stage: a stage of a run, or `gradients`, a part of `sparsify`.
        recipe: of the run.
        manifest: of the run, for the hashes of its inputs, versions and machine.
    """
    values = recipe.model_dump(mode="json")
    host = manifest["host"]
    # Further tasks count too: no example of theirs is trained or calibrated on.
    tasks = [values["task"], values["evaluate"].get("also")]
    task = {
        "settings": tasks,
        "data": {name: facts for name, facts in manifest["inputs"].items() if name not in ("model", "texts")},
        "definitions": _definitions(tasks),
        "seed": recipe.seed,
    }
    common = {
        "model": manifest["inputs"]["model"]["sha256"],
        "texts": manifest["inputs"].get("texts"),
        "seed": recipe.seed,
        "settings": {field: values[field] for field in ("dtype", "device", "threads", "deterministic")},
        "host": {field: host.get(field) for field in ("cpu", "gpu", "threads", "platform")},
        "versions": manifest["versions"],
        "phoenix": [manifest["phoenix"], manifest["git_commit"], own_code()],
    }
    evaluate = {field: value for field, value in values["evaluate"].items() if field not in NOT_OF_A_BASELINE}
    reads_task = recipe.sparsify.reads_tokens or recipe.sparsify.reads_gradients
    sparsify = common | {"sparsify": values["sparsify"], "task": task if reads_task else None}
    if stage == "sparsify":
        return sparsify
    if stage == GRADIENTS:
        # |dL/dW| of the dense model: the same for every sparsity and every importance that reads it.
        return common | {"calibration": values["sparsify"]["calibration"], "task": task}
    if stage == "baseline dense":
        return common | {"evaluate": evaluate, "task": task}
    if stage == "baseline pruned":
        return sparsify | {"evaluate": evaluate, "task": task}
    if stage == "baseline dense_lora":
        # It is a dense training whatever the run's own mode is, and a teacher itself; these fields don't reach it.
        foreign = ("mode", "dense_merge", "distill", "evolve")
        finetune = {key: value for key, value in values["finetune"].items() if key not in foreign}
        rate = values["evaluate"]["dense_lora_learning_rate"]
        return common | {"evaluate": evaluate, "task": task, "finetune": finetune, "rate": rate}
    return None


def _definitions(tasks: Any) -> dict[str, str]:
    """Hashes of task.yaml in folders of one's own: the data's hashes don't say how prompts are made of it."""
    if isinstance(tasks, str):
        definition = Path(tasks) / "task.yaml"
        return {tasks: sha256(definition)} if definition.is_file() else {}
    inner = tasks.values() if isinstance(tasks, Mapping) else tasks if isinstance(tasks, list | tuple) else ()
    return {name: digest for one in inner for name, digest in _definitions(one).items()}


@functools.cache
def own_code() -> str:
    """The hash of the Phoenix that this process runs, as it was when the process asked first."""
    return code_sha256(Path(__file__).parents[1])


def code_sha256(package: Path) -> str:
    """Hash the sources of a package by name and content, whether git knows them or not.

    What is made of them (bytecode, compiled kernels) and hidden files (editors') don't count, nor do data of the demo,
    which has hashes of its own among a run's inputs.
    """
    files = [path for path in package.rglob("*") if path.suffix in SOURCES and path.is_file()]
    names = {path.relative_to(package).as_posix(): path for path in files}
    own = {name: sha256(path) for name, path in names.items() if not any(part[0] == "." for part in name.split("/"))}
    return key_of(own)


def key_of(inputs: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def sharing(recipe: Recipe, directory: Path) -> Share:
    """The way in which runs of one sweep share their work, for `pipeline.run(share=)`.

    Args:
        recipe: of the run.
        directory: where shared work lies; all runs of the sweep must be given the same.
    """
    store = Store(directory)
    own_code()  # now, not after hours of training, when the files may be others than those that run

    def share(run: Run, stage: str, action: Action) -> tuple[list[str], dict[str, Any]]:
        inputs = inputs_of(stage, recipe, run.manifest)
        if inputs is None:
            return list(action()), {}
        if stage == "sparsify" and recipe.sparsify.reads_gradients:
            action = _with_gradients(store, recipe, run, action)
        return store.take_or_make(stage, inputs, run.directory, recipe.name, action)

    return share


def _with_gradients(store: "Store", recipe: Recipe, run: Run, action: Action) -> Action:
    """Pruning that begins with the gradients of another run, or leaves its own for others."""
    inputs = inputs_of(GRADIENTS, recipe, run.manifest)
    assert inputs is not None
    work = run.work("sparsify")

    def make() -> Iterable[str]:
        if store.take(GRADIENTS, inputs, work) is None:
            with store.held(GRADIENTS, key_of(inputs)):
                if store.take(GRADIENTS, inputs, work) is None:
                    outputs = list(action())
                    store.put(GRADIENTS, inputs, work, [GRADIENTS], recipe.name, None)
                    return outputs
        return list(action())

    return make


class Store:
    """A directory of finished work: <stage>/<key>/entry.json and files/."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def take_or_make(
        self, stage: str, inputs: Mapping[str, Any], target: Path, maker: str, action: Action
    ) -> tuple[list[str], dict[str, Any]]:
        """Find the work done and link it into `target`, or do it there and keep it for others."""
        found = self.take(stage, inputs, target)
        if found is not None:
            return found
        with self.held(stage, key_of(inputs)):
            found = self.take(stage, inputs, target)  # another run may have done it meanwhile
            if found is not None:
                return found
            started = time.perf_counter()
            outputs = list(action())
            self.put(stage, inputs, target, outputs, maker, time.perf_counter() - started)
        return outputs, {}

    def take(self, stage: str, inputs: Mapping[str, Any], target: Path) -> tuple[list[str], dict[str, Any]] | None:
        """Link finished work into a directory; None where there is none, or where it is damaged.

        Returns:
            The names of its outputs, and what the manifest says about where they come from.
        """
        key = key_of(inputs)
        place = self.directory / stage / key
        if not (place / ENTRY).is_file():
            return None
        entry = read_json(place / ENTRY)
        outputs: dict[str, str] = entry["outputs"]
        if any(not inside(place / FILES, name).exists() for name in outputs) or any(
            sha256(place / FILES / name) != digest for name, digest in outputs.items()
        ):
            shutil.rmtree(place)
            return None
        for name in outputs:
            with atomic_path(inside(target, name)) as temporary:
                link(place / FILES / name, temporary)
        return list(outputs), {"shared": {"key": key, "made_by": entry["made_by"], "seconds": entry["seconds"]}}

    def put(
        self,
        stage: str,
        inputs: Mapping[str, Any],
        source: Path,
        outputs: list[str],
        maker: str,
        seconds: float | None,
    ) -> None:
        """Keep what a run has made. It appears as a whole or not at all."""
        place = self.directory / stage / key_of(inputs)
        if (place / ENTRY).is_file():
            return
        with atomic_path(place) as temporary:
            for name in outputs:
                link(source / name, temporary / FILES / name)
            hashes = {name: sha256(temporary / FILES / name) for name in outputs}
            entry = {"inputs": dict(inputs), "outputs": hashes, "made_by": maker, "seconds": seconds}
            write_json(temporary / ENTRY, entry)

    @contextlib.contextmanager
    def held(self, stage: str, key: str) -> Iterator[None]:
        """Hold a piece of work against other processes; waits for one that does it."""
        directory = self.directory / stage
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = (directory / f"{key}.lock").open("w")
        except OSError as error:
            raise PhoenixError(f"{directory}: {error.strerror}; give another directory with --out") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def link(source: Path, target: Path) -> None:
    """Hard-link a file or the files of a directory; copy where the file system has no links.

    Safe, because nothing that Phoenix writes is changed in place: a new version is a new file of the same name.
    """
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for child in source.iterdir():
            link(child, target / child.name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
