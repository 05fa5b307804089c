"""Where a task's lm-eval YAML comes from, and what it may say.

Built-in tasks are the files of `definitions/`; some include lm-eval's own and keep its prompts and version. A user's
folder is somebody's data, so its task.yaml may say less (folder_task): no `!function`, no `include`, no metric or
filter that would fetch code, and templates that only put fields into text.
"""

import copy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.tasks import math_text
from phoenix_sparse.tasks.folder_task import check_folder_task
from phoenix_sparse.tasks.templates import template_fields

DEFINITIONS = Path(__file__).parent / "definitions"
BUILT_IN = tuple(sorted(path.stem for path in DEFINITIONS.glob("*.yaml")))

_TARGETS = ("doc_to_text", "doc_to_target", "doc_to_choice")


@dataclass(frozen=True)
class Definition:
    """A task's YAML, read and checked.

    `config` is lm-eval's; `fields` must stand in every record; `rename` maps names of the hub's fields to ours.
    """

    name: str
    config: dict[str, Any]
    metric: str
    fields: frozenset[str]
    prompt_fields: tuple[str, ...]
    rename: dict[str, str]
    folder: Path | None
    source: Path


def load_definition(name: str) -> Definition:
    """Find a task by its built-in name or its folder.

    Raises:
        PhoenixError: there is no such task, or its YAML isn't one.
    """
    folder = Path(name).expanduser()
    if name in BUILT_IN:
        source, origin = DEFINITIONS / f"{name}.yaml", None
        config = _include(_read(source, _TrustedLoader))
    elif folder.is_dir():
        source, origin = folder / "task.yaml", folder
        if not source.is_file():
            raise PhoenixError(f"task: {folder} has no task.yaml; a task folder holds task.yaml and <split>.jsonl")
        config = _read(source, _StrangerLoader)
        config = {"task": folder.resolve().name, **check_folder_task(config, source)}
    else:
        raise PhoenixError(f"task: {name!r} is neither built in ({', '.join(BUILT_IN)}) nor a folder with a task.yaml")
    metadata = dict(config.get("metadata") or {})
    prompt_fields = metadata.get("phoenix_prompt_fields") or sorted(template_fields(config.get("doc_to_text")))
    if not prompt_fields:
        raise PhoenixError(f"{source}: doc_to_text uses no field of the records; write {{{{question}}}}, say")
    # What lm-eval's own clean-up makes of a record is in no record yet.
    used = [template_fields(config.get(key)) for key in _TARGETS] if "process_docs" not in config else []
    return Definition(
        name=str(config["task"]),
        config=config,
        metric=_choose_metric(config, metadata, source),
        fields=frozenset().union(*used, metadata.get("phoenix_fields") or ()),
        prompt_fields=tuple(prompt_fields),
        rename=dict(metadata.get("phoenix_rename") or {}),
        folder=origin,
        source=source,
    )


class _TrustedLoader(yaml.SafeLoader):
    """Knows `!function name` for the functions of math_text."""


class _StrangerLoader(yaml.SafeLoader):
    """Refuses `!function`."""


def _refuse_function(_loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    raise PhoenixError(
        f"line {node.start_mark.line + 1}: `!function` runs code, which a task folder may not; use templates or filters"
    )


_TrustedLoader.add_constructor("!function", lambda _loader, node: getattr(math_text, node.value))
_StrangerLoader.add_constructor("!function", _refuse_function)


def _read(path: Path, loader: type[yaml.SafeLoader]) -> dict[str, Any]:
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except PhoenixError as error:
        raise PhoenixError(f"{path}: {error}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise PhoenixError(f"{path}: not a YAML file ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise PhoenixError(f"{path}: a mapping of lm-eval's task keys was expected")
    return config


def _include(config: dict[str, Any]) -> dict[str, Any]:
    """Put a definition on top of the lm-eval task that it includes, wherever lm-eval is installed."""
    included = config.pop("include", None)
    if included is None:
        return config
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise PhoenixError("lm-eval isn't installed; `pip install lm-eval`")
    below = _read_lm_eval(Path(spec.submodule_search_locations[0]) / "tasks" / included)
    metadata = {**(below.get("metadata") or {}), **(config.get("metadata") or {})}
    return {**below, **config, "metadata": metadata}


def _read_lm_eval(path: Path) -> dict[str, Any]:
    """One of lm-eval's own tasks, with the tasks that it includes and the functions that it names."""
    from lm_eval.utils import import_function

    class _LmEvalLoader(yaml.SafeLoader):
        """Knows `!function module.name` for the modules beside lm-eval's YAML."""

    _LmEvalLoader.add_constructor("!function", lambda loader, node: import_function(loader, node, path))
    config = _read(path, _LmEvalLoader)
    included = config.pop("include", None)
    return config if included is None else {**_read_lm_eval(path.parent / included), **config}


def _choose_metric(config: dict[str, Any], metadata: dict[str, Any], path: Path) -> str:
    """The headline figure, `metric,filter` as lm-eval names it: the declared one, else the first."""
    default = "acc" if config["output_type"] == "multiple_choice" else "exact_match"
    metrics = [entry["metric"] for entry in config.get("metric_list") or [{"metric": default}]]
    filters = [entry["name"] for entry in config.get("filter_list") or [{"name": "none"}]]
    known = [f"{metric},{name}" for metric in metrics for name in filters]
    chosen = str(metadata.get("phoenix_metric") or known[0])
    if chosen not in known:
        raise PhoenixError(f"{path}: metadata.phoenix_metric is {chosen!r}; the task has {', '.join(known)}")
    return chosen


def harness_config(definition: Definition) -> dict[str, Any]:
    """A copy of the configuration for lm-eval to keep (it changes what it is given)."""
    return copy.deepcopy(definition.config)
