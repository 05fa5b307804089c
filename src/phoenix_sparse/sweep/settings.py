"""What a sweep file says: the axes of the matrix, what is left out, and where the runs go."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from phoenix_sparse.settings import DirectoryName, Settings

AXES = ("model", "task", "method", "sparsity", "mode", "seed")
MODES = {"sparse_to_sparse": "s2s", "sparse_to_dense": "s2d"}
SECTIONS = (
    *("task", "sparsify", "calibration", "evolution"),
    *("finetune", "distill", "evolve", "search", "evaluate", "perplexity"),
)
Labelled = dict[str, dict[str, Any]]
OWN_NAME = "a run is named by its cell, such as small-gsm8k-wanda-50-s2s-s0"
GPU = r"(?:\d+|(?:GPU|MIG)-[\w/-]+)"


class LocalSettings(Settings):
    """Parsl on this machine."""

    kind: Literal["local"] = "local"


class ClusterSettings(Settings):
    """What PBS Pro and Slurm have in common: jobs ("blocks") of one or more nodes that come and go with the work."""

    account: str | None = None
    walltime: str = Field("01:00:00", description="of a job, HH:MM:SS")
    nodes: int = Field(1, ge=1, description="nodes of a job")
    jobs: int = Field(1, ge=1, description="jobs at once, at most")
    cpus: int | None = Field(None, ge=1, description="CPUs of a node")
    scheduler_options: str = Field("", description="lines put on top of the job's script")
    worker_init: str = Field("", description="shell commands before a worker starts, such as loading a module")

    @field_validator("walltime")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        if not re.fullmatch(r"\d{1,3}:[0-5]\d:[0-5]\d", value):
            raise ValueError("needs hours, minutes and seconds in quotes, such as '01:30:00'")
        return value


class SlurmSettings(ClusterSettings):
    kind: Literal["slurm"]
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    memory: int | None = Field(None, ge=1, description="GB of a node")
    gpus: int | None = Field(None, ge=1, description="GPUs asked for on each node")
    exclusive: bool = Field(False, description="take whole nodes")


class PbsSettings(ClusterSettings):
    kind: Literal["pbs"]
    queue: str | None = None
    select_options: str = Field("", description="put behind select=, such as ngpus=4")


class EngineSettings(Settings):
    """How the runs are spread. Each is a process of its own, whatever the engine."""

    kind: Literal["parsl", "inline"] = "parsl"
    workers: int = Field(1, ge=1, description="runs at once on a node")
    gpus: tuple[str, ...] = Field((), description="GPUs of a node that workers take turns on, such as [0, 1]")
    threads: int | None = Field(
        None, ge=1, description="CPU threads of a run; the recipe's, or torch's own, unless given"
    )
    provider: LocalSettings | SlurmSettings | PbsSettings = Field(LocalSettings(), discriminator="kind")

    @field_validator("gpus", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """Numbers, or names as CUDA_VISIBLE_DEVICES takes them."""
        names = [str(one) for one in value] if isinstance(value, list | tuple) else value
        if not isinstance(names, list):
            raise ValueError("needs a list of GPUs, such as [0, 1]")
        for name in names:
            if not re.fullmatch(f"{GPU}(?:,{GPU})*", name):
                raise ValueError(
                    f"{name!r} is no GPU; give numbers from 0 on, such as [0, 1], or names such as GPU-1a2b"
                )
        if len(set(names)) < len(names):
            raise ValueError("names a GPU twice; give each once")
        return names

    @model_validator(mode="after")
    def _inline_is_local(self) -> Self:
        if self.kind == "inline" and self.provider.kind != "local":
            raise ValueError("provider: belongs to kind: parsl; the inline engine knows this machine only")
        return self


class SweepSettings(Settings):
    """A sweep file. An axis is a list of values, or labels with the values of recipe fields that they stand for."""

    name: DirectoryName = Field(description="names the sweep's directory: sweeps/<name>")
    base: Path | dict[str, Any] = Field({}, description="what all runs share: a recipe's values, or a recipe's file")
    models: Labelled = Field(
        description="[demo], or {small: DIRECTORY}, or {small: {model: DIRECTORY, dtype: bfloat16}}"
    )
    tasks: Labelled = Field(description="[gsm8k], or {gsm8k: {task.data: FOLDER, finetune.epochs: 4}}")
    methods: Labelled = Field(description="{wanda: {importance: wanda}, blocks: {importance: wanda, pattern: 16x1}}")
    sparsities: tuple[float, ...] = (0.5,)
    modes: Labelled = Field({"s2s": {"finetune.mode": "sparse_to_sparse"}}, description="[sparse_to_sparse]")
    seeds: tuple[int, ...] = (0,)
    exclude: tuple[dict[str, tuple[Any, ...]], ...] = Field((), description="[{method: blocks, sparsity: [0.8, 0.9]}]")
    retries: int = Field(
        1, ge=0, description="how often a run that died, or failed but for its input, is taken up again"
    )
    share: bool = Field(True, description="compute what runs have in common once")
    keep: Literal["all", "results"] = Field(
        "all", description="of a finished run: all, or the results without its models (pruned, adapters, merged)"
    )
    engine: EngineSettings = EngineSettings()

    @field_validator("base")
    @classmethod
    def _cells_have_their_own(cls, base: Path | dict[str, Any]) -> Path | dict[str, Any]:
        if isinstance(base, dict) and "name" in base:
            raise ValueError(f"leave out its name ({base['name']}); {OWN_NAME}")
        if isinstance(base, dict) and "seed" in base:
            raise ValueError(f"leave out its seed; seeds are an axis of their own, such as seeds: [{base['seed']}]")
        return base

    @field_validator("sparsities", "seeds", mode="before")
    @classmethod
    def _not_empty(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, list | tuple) or not value:
            example = "[0.3, 0.5]" if info.field_name == "sparsities" else "[0, 1]"
            raise ValueError(f"needs a list of one or more numbers, such as {example}")
        return value

    @field_validator("models", mode="before")
    @classmethod
    def _models(cls, value: Any) -> Any:
        return _labelled(value, "model", lambda name: Path(name).name)

    @field_validator("tasks", mode="before")
    @classmethod
    def _tasks(cls, value: Any) -> Any:
        return _labelled(value, "task.name", lambda name: Path(name).name)

    @field_validator("methods", mode="before")
    @classmethod
    def _methods(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or not all(isinstance(fields, Mapping) for fields in value.values()):
            raise ValueError("needs labels with settings of sparsify, such as {wanda: {importance: wanda}}")
        return _labelled(value, "", str)

    @field_validator("modes", mode="before")
    @classmethod
    def _modes(cls, value: Any) -> Any:
        return _labelled(value, "finetune.mode", lambda name: MODES.get(name, name))

    @field_validator("exclude", mode="before")
    @classmethod
    def _as_lists(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple) or not all(isinstance(one, Mapping) for one in value):
            raise ValueError("needs a list such as [{method: structured, sparsity: [0.8, 0.9]}]")
        for one in value:
            if not one or not set(one) <= set(AXES):
                raise ValueError(f"an exclusion names one or more of {', '.join(AXES)}")
        return [{axis: [v] if not isinstance(v, list | tuple) else v for axis, v in one.items()} for one in value]

    @model_validator(mode="after")
    def _no_value_twice(self) -> Self:
        for axis in ("sparsities", "seeds"):
            values = getattr(self, axis)
            if len(set(values)) < len(values):
                raise ValueError(f"{axis}: a value stands there twice; leave one out")
        return self


def _dotted(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Fields of sections by their dotted names, so that one of them can change and leave the others."""
    for name, value in fields.items():
        if isinstance(value, Mapping) and str(name).rpartition(".")[2] in SECTIONS:
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _labelled(value: Any, field: str, label: Any) -> Labelled:
    """An axis as labels with fields. A list's labels are made of its values."""
    if isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
        pairs = [(label(one), one) for one in value]
    elif isinstance(value, Mapping):
        pairs = [(str(name), one) for name, one in value.items()]
    else:
        raise ValueError("needs a list of names, or labels with values")
    found: Labelled = {}
    for name, one in pairs:
        if name in found:
            raise ValueError(f"two values have the label {name!r}; give labels of your own, such as {{first: …}}")
        if not name or not all(letter.isalnum() or letter in "._" for letter in name):
            raise ValueError(f"the label {name!r} goes into names of directories; use letters, digits, dots and _")
        if isinstance(one, Mapping) and "name" in one:
            raise ValueError(f"leave out the name in {name}; {OWN_NAME} (a task's is task.name)")
        found[name] = dict(_dotted(one)) if isinstance(one, Mapping) else {field: one}
    if not found:
        raise ValueError("is empty; give at least one value")
    return found
