"""JSON lines, read strictly: UTF-8, one object a line, no empty lines, every mistake named by file and line."""

import json
from pathlib import Path
from typing import Any

from phoenix_sparse.errors import PhoenixError


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read one file.

    Raises:
        PhoenixError: the file is missing, empty or not UTF-8, or a line isn't a JSON object (NaN and a key that
            stands twice count as mistakes).
    """
    path = Path(path)
    if not path.is_file():
        raise PhoenixError(f"{path}: there is no such file; a split is a file of JSON lines")
    # Cut at line feeds only: text may hold other characters that Python's splitlines takes for line ends.
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    if not lines:
        raise PhoenixError(f"{path}: the file is empty; it should hold one JSON object a line")
    return [_read_line(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _read_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise PhoenixError(f"{where}: not UTF-8 (byte {error.start} of the line)") from error
    except (ValueError, RecursionError) as error:
        raise PhoenixError(f"{where}: not a JSON object ({str(error).splitlines()[0]})") from error
    if not isinstance(row, dict):
        raise PhoenixError(f"{where}: a JSON object was expected, not {type(row).__name__}")
    return row


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return row
