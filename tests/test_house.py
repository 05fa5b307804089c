"""The house: a room imports only rooms below it, a module does one thing and says which."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "phoenix_sparse"
MODULES = sorted(SOURCE.rglob("*.py"))

# From the ground up. A room is a module or a package of phoenix_sparse; what stands in one line is on one floor, and
# rooms of one floor don't import each other.
FLOORS = [
    ["errors", "settings", "progress"],
    ["files", "jsonl", "determinism", "mask_formats", "processes"],
    ["checkpoint"],
    ["models", "masks", "tasks"],
    ["pruning", "finetuning"],
    ["merging", "evaluation"],
    ["runtime"],
    ["cerebras", "report", "demo"],
    ["recipe"],
    ["runs", "steps"],
    ["plan", "pipeline", "levels", "shrinking", "training_speed"],
    ["sweep", "comparing", "cerebras_runs"],
    ["console"],
    ["commands"],
    ["prune_forms", "cli_runtime", "cli_sweep", "cli_cerebras"],
    ["cli"],
]
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
GROUND = {"errors", "settings", "progress", "files", "jsonl"}
# Wings read directories: they know the ground floor, the formats on disk, and no step's insides.
WINGS = {
    "report": GROUND,
    "demo": GROUND,
    "runtime": GROUND | {"models", "masks", "checkpoint"},
    "cerebras": GROUND | {"models", "masks", "runtime"},
}


def room_of(path: Path) -> str:
    """The room that a module belongs to; the package's own __init__ is none."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The rooms that a module imports, wherever in it, its own left out."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        parts = [name.split(".") for name in names]
        found |= {part[1] for part in parts if part[0] == "phoenix_sparse" and len(part) > 1}
    return found - {room_of(path)}


def identity(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=identity)
def test_a_room_imports_only_rooms_below_it(path):
    room = room_of(path)
    if room == "__init__":
        assert imported(path) <= {"runtime"}  # its registration with transformers, which is light
        return
    assert room in HEIGHT, f"{room} has no place in the house yet; give it one in FLOORS"
    for other in imported(path):
        assert HEIGHT.get(other, -1 if other == "__version__" else 99) < HEIGHT[room], f"{room} imports {other}"
    if room in WINGS:
        assert imported(path) <= WINGS[room]


def test_the_walk_over_imports_sees_them():
    """The check above would pass if it saw nothing."""
    assert {"steps", "runs", "recipe", "tasks", "models", "files", "report", "demo"} <= imported(SOURCE / "pipeline.py")
    assert imported(SOURCE / "merging.py") == {"errors", "files", "finetuning", "masks", "models"}
    assert imported(SOURCE / "errors.py") == set()


@pytest.mark.parametrize("path", MODULES, ids=identity)
def test_a_module_is_of_a_size_to_read_and_says_what_it_does(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text)), "no docstring"


@pytest.mark.parametrize("path", MODULES, ids=identity)
def test_nothing_is_left_undone(path):
    text = path.read_text(encoding="utf-8")
    assert not [word for word in ("TODO", "FIXME", "XXX", "NotImplementedError") if word in text]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            everything = node.type is None or (isinstance(node.type, ast.Name) and node.type.id.endswith("Exception"))
            silent = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
            assert not (everything and silent), f"{path.name}:{node.lineno} swallows every exception"
