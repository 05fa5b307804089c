"""Search the best sub-adapter of a super-adapter on the validation split.

Every method is deterministic given the scores of the candidates it has seen, and every score is written to a journal
when it is measured. A search that was killed is simply run again: it takes known candidates from the journal and
arrives where it was.
"""

import json
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from phoenix_sparse.finetuning.elastic import Ranks, Space, Spaces, is_fixed, largest, middle, smallest, spaces
from phoenix_sparse.finetuning.settings import SearchSettings
from phoenix_sparse.progress import Progress

RULE = "highest validation accuracy; among equals the fewest adapter parameters, then the first tried"


class Score(NamedTuple):
    """A candidate's validation accuracy (0 to 1) and its standard error."""

    accuracy: float
    stderr: float | None


class Candidates:
    """All sub-adapters evaluated so far, in the order in which they were first tried."""

    def __init__(
        self,
        evaluate: Callable[[Ranks], Score],
        count_parameters: Callable[[Ranks], int],
        journal: Path,
        progress: Progress | None,
        budget: int,
    ) -> None:
        self._evaluate, self._count, self._journal = evaluate, count_parameters, journal
        self._progress, self._budget = progress, budget
        self._known = {_key(entry["ranks"]): entry for entry in _read_journal(journal)}
        self.tried: list[dict[str, Any]] = []

    def score(self, ranks: Ranks, origin: str) -> dict[str, Any]:
        """Evaluate a candidate, unless it was evaluated before; give its record."""
        for candidate in self.tried:
            if candidate["ranks"] == ranks:
                return candidate
        entry = self._known.get(_key(ranks)) or self._measure(ranks)
        candidate = {"id": len(self.tried), "origin": origin, **entry}
        self.tried.append(candidate)
        if self._progress is not None:
            self._progress("sub-adapter", len(self.tried), self._budget)
        return candidate

    def has(self, ranks: Ranks) -> bool:
        return any(candidate["ranks"] == ranks for candidate in self.tried)

    def best(self) -> dict[str, Any]:
        return min(self.tried, key=lambda c: (-c["accuracy"], c["parameters"], c["id"]))

    def front(self) -> list[int]:
        """The ids of candidates that no other beats in accuracy without having more parameters."""
        return [one["id"] for one in self.tried if not any(_dominates(other, one) for other in self.tried)]

    def _measure(self, ranks: Ranks) -> dict[str, Any]:
        started = time.perf_counter()
        accuracy, stderr = self._evaluate(ranks)
        entry = {
            "ranks": dict(ranks),
            "accuracy": accuracy,
            "stderr": stderr,
            "parameters": self._count(ranks),
            "seconds": time.perf_counter() - started,
        }
        self._journal.parent.mkdir(parents=True, exist_ok=True)
        with self._journal.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        return entry


def search(
    layers: Iterable[str],
    space: Space,
    settings: SearchSettings,
    *,
    evaluate: Callable[[Ranks], Score],
    count_parameters: Callable[[Ranks], int],
    seed: int,
    journal: Path,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Try sub-adapters within the budgets of the settings and choose one.

    Args:
        layers: the adapted layers' full names.
        space: ranks that a layer may have: of all layers, or by layer.
        settings: budgets.
        evaluate: gives a sub-adapter's validation accuracy.
        count_parameters: gives a sub-adapter's size.
        seed: for the moves and for NSGA-II.
        journal: JSON lines of the scores, read first and appended to.
        progress: called with (what, done, budget).

    Returns:
        `space`, `methods`, `budget`, `candidates`, `front` (ids), `choice` (id) and `rule`.
    """
    of_layer = spaces(layers, space)
    fixed = is_fixed(of_layer)
    methods = {"median": 1, "bounds": 2 if settings.bounds else 0}
    methods |= {"hill_climb": settings.hill_climb, "nsga2": settings.nsga2}
    if fixed:
        methods = {"median": 1}
    budget = sum(methods.values())
    candidates = Candidates(evaluate, count_parameters, journal, progress, budget)
    candidates.score(middle(of_layer), "median")
    if not fixed:
        if settings.bounds:
            candidates.score(largest(of_layer), "largest")
            candidates.score(smallest(of_layer), "smallest")
        hill_climb(candidates, of_layer, settings.hill_climb, seed)
        nsga2(candidates, of_layer, settings.nsga2, settings.population, seed)
    return {
        "space": {n: list(r) for n, r in of_layer.items()} if isinstance(space, Mapping) else list(space),
        "method": ", ".join(name for name, evaluations in methods.items() if evaluations),
        "methods": methods,
        "budget": budget,
        "candidates": candidates.tried,
        "front": candidates.front(),
        "choice": candidates.best()["id"],
        "rule": RULE,
    }


def hill_climb(candidates: Candidates, space: Spaces, budget: int, seed: int) -> None:
    """Move from the best candidate to a neighbour whenever it is better, or equal with fewer parameters.

    A neighbour has a tenth of the layers that can move one rank of theirs up or down.
    """
    layers = [layer for layer, ranks in space.items() if len(ranks) > 1]
    generator = random.Random(f"hill_climb/{seed}")
    here, spent, attempts = candidates.best(), 0, 0
    while spent < budget and attempts < 20 * budget:
        attempts += 1
        ranks = dict(here["ranks"])
        for layer in generator.sample(layers, max(1, len(layers) // 10)):
            choices = space[layer]
            level = choices.index(ranks[layer]) + generator.choice((-1, 1))
            ranks[layer] = choices[min(max(level, 0), len(choices) - 1)]
        if candidates.has(ranks):
            continue
        spent += 1
        there = candidates.score(ranks, "hill_climb")
        if (there["accuracy"], -there["parameters"]) >= (here["accuracy"], -here["parameters"]):
            here = there


def nsga2(candidates: Candidates, space: Spaces, budget: int, population: int, seed: int) -> None:
    """Optuna's NSGA-II over (accuracy up, parameters down), started from what has been tried."""
    if budget == 0:
        return
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    for known in candidates.tried[:population]:
        study.enqueue_trial(known["ranks"])
    spent, attempts = 0, 0
    while spent < budget and attempts < 20 * budget + population:
        attempts += 1
        trial = study.ask()
        ranks = {layer: int(trial.suggest_categorical(layer, choices)) for layer, choices in space.items()}
        spent += not candidates.has(ranks)
        scored = candidates.score(ranks, "nsga2")
        study.tell(trial, (scored["accuracy"], scored["parameters"]))


def _dominates(one: dict[str, Any], other: dict[str, Any]) -> bool:
    no_worse = one["accuracy"] >= other["accuracy"] and one["parameters"] <= other["parameters"]
    return no_worse and (one["accuracy"] > other["accuracy"] or one["parameters"] < other["parameters"])


def _key(ranks: Ranks) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(ranks.items()))


def _read_journal(journal: Path) -> list[dict[str, Any]]:
    """Read the complete lines, and cut off what a kill left of a last one, so that the next line starts on its own."""
    if not journal.is_file():
        return []
    whole, _, rest = journal.read_bytes().rpartition(b"\n")
    if rest:
        with journal.open("r+b") as stream:
            stream.truncate(len(whole) + 1 if whole else 0)
    return [json.loads(line) for line in whole.splitlines()]
