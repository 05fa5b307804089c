"""Figures of sub-adapters that all processes of a launch measure: the main one asks, each takes every so-manieth."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from phoenix_sparse import processes
from phoenix_sparse.finetuning.elastic import Ranks


class Together:
    """What can be measured of a sub-adapter, by name; the same in all processes."""

    def __init__(self, measures: Mapping[str, Callable[[Ranks], Any]]) -> None:
        self._measures = measures

    def ask(self, what: str, generation: Sequence[Ranks]) -> Iterator[Any]:
        """In the main process: a figure of each sub-adapter, in their order, as they are measured."""
        count = processes.count()
        for start in range(0, len(generation), count):
            chunk = [dict(ranks) for ranks in generation[start : start + count]]
            processes.say((what, chunk))
            yield from processes.gather(self._mine(what, chunk))[: len(chunk)]

    def serve(self) -> None:
        """In the others: measure what is asked for, until nothing is."""
        while (told := processes.say()) is not None:
            processes.gather(self._mine(*told))

    def finish(self) -> None:
        """In the main process: let the others go on."""
        processes.say(None)

    def _mine(self, what: str, chunk: list[Ranks]) -> Any:
        number = processes.number()
        return self._measures[what](chunk[number]) if number < len(chunk) else None
