"""What a search has measured: lines of JSON, on the disk as soon as they are known."""

import json
import os
from pathlib import Path
from typing import Any

from phoenix_sparse.finetuning.elastic import Ranks

Key = tuple[tuple[str, int], ...]


class Journal:
    """Scores (`ranks`, `accuracy`, `stderr`, `parameters`, `seconds`) and losses (`ranks`, `loss`) of sub-adapters."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._scores: dict[Key, dict[str, Any]] = {}
        self._losses: dict[Key, float] = {}
        for entry in _read(path):
            self._note(entry)

    def score(self, ranks: Ranks) -> dict[str, Any] | None:
        return self._scores.get(key_of(ranks))

    def loss(self, ranks: Ranks) -> float | None:
        return self._losses.get(key_of(ranks))

    def add(self, entry: dict[str, Any]) -> None:
        """Write an entry, to the disk and not just towards it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._note(entry)

    def _note(self, entry: dict[str, Any]) -> None:
        if "loss" in entry:
            self._losses[key_of(entry["ranks"])] = entry["loss"]
        else:
            self._scores[key_of(entry["ranks"])] = entry


def key_of(ranks: Ranks) -> Key:
    return tuple(sorted(ranks.items()))


def _read(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines, and cut off what a kill left of a last one, so that the next line starts on its own."""
    if not path.is_file():
        return []
    whole, _, rest = path.read_bytes().rpartition(b"\n")
    if rest:
        with path.open("r+b") as stream:
            stream.truncate(len(whole) + 1 if whole else 0)
    return [json.loads(line) for line in whole.splitlines()]
