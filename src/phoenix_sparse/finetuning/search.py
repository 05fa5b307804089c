"""Search the best sub-adapter of a super-adapter on the validation split.

Every method is deterministic given the scores of the candidates it has seen, and every score is written to a journal
when it is measured. A search that was killed is simply run again: it takes known candidates from the journal and
arrives where it was. Candidates are evaluated a generation at a time, whose size the settings give: however many
processes share it, the result is the same.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.finetuning.elastic import Ranks, Space, Spaces, is_fixed, largest, middle, smallest, spaces
from phoenix_sparse.finetuning.journal import Journal, key_of
from phoenix_sparse.finetuning.settings import SearchSettings
from phoenix_sparse.progress import Progress

RULE = "highest validation accuracy, among equals the fewest adapter parameters, then the first tried"


class Score(NamedTuple):
    """A candidate's validation accuracy (0 to 1) and its standard error."""

    accuracy: float
    stderr: float | None


# One figure after the other, as they are measured.
EvaluateAll = Callable[[Sequence[Ranks]], Iterable[Score]]
LossesOf = Callable[[Sequence[Ranks]], Iterable[float]]


class Candidates:
    """All sub-adapters evaluated so far, in the order in which they were first tried."""

    def __init__(
        self,
        evaluate: EvaluateAll,
        count_parameters: Callable[[Ranks], int],
        journal: Journal,
        progress: Progress | None,
        budget: int,
        losses: LossesOf | None = None,
    ) -> None:
        self._evaluate, self._count, self._losses, self._journal = evaluate, count_parameters, losses, journal
        self._progress, self._budget = progress, budget
        self.tried: list[dict[str, Any]] = []

    def score(self, generation: Sequence[Ranks], origin: str) -> list[dict[str, Any]]:
        """Evaluate candidates together, but for those that were evaluated before; give their records."""
        new = [ranks for ranks in _different(generation) if not self.has(ranks)]
        unknown = [ranks for ranks in new if self._journal.score(ranks) is None]
        ended = time.perf_counter()
        for ranks, (accuracy, stderr) in zip(unknown, self._evaluate(unknown) if unknown else (), strict=True):
            measured = {"ranks": dict(ranks), "accuracy": accuracy, "stderr": stderr, "parameters": self._count(ranks)}
            started, ended = ended, time.perf_counter()
            self._journal.add(measured | {"seconds": ended - started})
        losses = self.losses(new) if self._losses is not None else None
        for index, ranks in enumerate(new):
            entry: dict[str, Any] = {"id": len(self.tried), "origin": origin} | (self._journal.score(ranks) or {})
            # x·Aᵀ and the result times Bᵀ: a multiplication and an addition for every weight of the two factors.
            entry["unmerged_flops_per_token"] = 2 * entry["parameters"]
            self.tried.append(entry | ({"loss": losses[index]} if losses is not None else {}))
            if self._progress is not None:
                self._progress("sub-adapter", len(self.tried), self._budget)
        return [next(one for one in self.tried if one["ranks"] == ranks) for ranks in generation]

    def losses(self, pool: Sequence[Ranks]) -> list[float]:
        """The surrogate's losses of candidates, from the journal where they are there."""
        assert self._losses is not None
        unknown = [ranks for ranks in _different(pool) if self._journal.loss(ranks) is None]
        for ranks, loss in zip(unknown, self._losses(unknown) if unknown else (), strict=True):
            self._journal.add({"ranks": dict(ranks), "loss": loss})
        return [self._journal.loss(ranks) or 0.0 for ranks in pool]

    def most_promising(self, pool: Sequence[Ranks], count: int) -> list[Ranks]:
        """The `count` candidates with the lowest losses, in their order; the first of equals."""
        if len(pool) <= count:
            return list(pool)
        losses = self.losses(pool)
        best = sorted(range(len(pool)), key=lambda index: (losses[index], index))[:count]
        return [pool[index] for index in sorted(best)]

    def has(self, ranks: Ranks) -> bool:
        return any(candidate["ranks"] == ranks for candidate in self.tried)

    def best(self) -> dict[str, Any]:
        return min(self.tried, key=lambda c: (-c["accuracy"], c["parameters"], c["id"]))

    def chosen(self, margin: float) -> tuple[dict[str, Any], str]:
        """The best one if it leads the median by more than so many standard errors, else the median; and why.

        The best of many noisy scores is high by chance; on another split it falls back (the winner's curse).
        """
        median, best = self.tried[0], self.best()
        if margin == 0 or best is median:
            return best, RULE
        lead = best["accuracy"] - median["accuracy"]
        noise = margin * max(one["stderr"] or 0.0 for one in (median, best))
        errors = "standard error" if margin == 1 else "standard errors"
        size = f"{100 * lead:.1f} points, {{}} than {margin:g} {errors} ({100 * noise:.1f} points)"
        if lead > noise:
            return best, f"{RULE}; it leads the median by {size.format('more')}"
        return median, f"the median; candidate {best['id']} leads it by {size.format('no more')}"

    def front(self) -> list[int]:
        """The ids of candidates that no other beats in accuracy without having more parameters."""
        return [one["id"] for one in self.tried if not any(_dominates(other, one) for other in self.tried)]


def search(
    layers: Iterable[str],
    space: Space,
    settings: SearchSettings,
    *,
    evaluate: EvaluateAll,
    count_parameters: Callable[[Ranks], int],
    seed: int,
    journal: Path,
    losses: LossesOf | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Try sub-adapters within the budgets of the settings and choose one.

    Args:
        layers: the adapted layers' full names.
        space: ranks that a layer may have: of all layers, or by layer.
        settings: budgets.
        evaluate: gives the validation accuracies of sub-adapters, which several processes may share.
        count_parameters: gives a sub-adapter's size.
        seed: for the moves and for NSGA-II.
        journal: JSON lines of scores and losses, read first and appended to; NSGA-II's Optuna journal lies beside it.
        losses: gives the surrogate's losses of sub-adapters; needed by `pool` above 1, which alone asks for it.
        progress: called with (what, done, budget).

    Returns:
        `space`, `methods`, `budget`, `candidates`, `front` (ids), `choice` (id), `rule`, and with a pool `surrogate`:
        `pool` and `rank_correlation` (Spearman's, of falling loss and accuracy over the candidates; None where either
        is the same for all).
    """
    of_layer = spaces(layers, space)
    fixed = is_fixed(of_layer)
    methods = {"median": 1, "bounds": 2 if settings.bounds else 0}
    methods |= {"hill_climb": settings.hill_climb, "nsga2": settings.nsga2}
    if fixed:
        methods = {"median": 1}
    budget, pooled = sum(methods.values()), settings.pool > 1 and not fixed
    if pooled and losses is None:
        raise PhoenixError("search.pool: nothing tells the candidates' losses; set it to 1")
    candidates = Candidates(evaluate, count_parameters, Journal(journal), progress, budget, losses if pooled else None)
    candidates.score([middle(of_layer)], "median")
    if not fixed:
        if settings.bounds:
            candidates.score([largest(of_layer)], "largest")
            candidates.score([smallest(of_layer)], "smallest")
        hill_climb(candidates, of_layer, settings, seed)
        nsga2(candidates, of_layer, settings, seed, journal.with_name("nsga2.log"))
    choice, rule = candidates.chosen(settings.margin)
    record = {
        "space": {n: list(r) for n, r in of_layer.items()} if isinstance(space, Mapping) else list(space),
        "method": ", ".join(name for name, evaluations in methods.items() if evaluations),
        "methods": methods,
        "budget": budget,
        "candidates": candidates.tried,
        "front": candidates.front(),
        "choice": choice["id"],
        "rule": rule,
    }
    if pooled:
        pairs = [(-one["loss"], one["accuracy"]) for one in candidates.tried]
        record["surrogate"] = {"pool": settings.pool, "rank_correlation": rank_correlation(pairs)}
    return record


def hill_climb(candidates: Candidates, space: Spaces, settings: SearchSettings, seed: int) -> None:
    """Move from the best candidate to the best of some neighbours if it is better, or equal with fewer parameters.

    A neighbour has a tenth of the layers that can move one rank of theirs up or down. Of `pool` times as many as are
    evaluated, those with the lowest losses are.
    """
    layers = [layer for layer, ranks in space.items() if len(ranks) > 1]
    generator = random.Random(f"hill_climb/{seed}")
    here, spent, budget = candidates.best(), 0, settings.hill_climb
    while spent < budget:
        wanted = min(settings.neighbours, budget - spent)
        pool: list[Ranks] = []
        for _ in range(20 * wanted * settings.pool):
            ranks = _neighbour(here["ranks"], space, layers, generator)
            if ranks not in pool and not candidates.has(ranks):
                pool.append(ranks)
            if len(pool) == wanted * settings.pool:
                break
        if not pool:
            return
        generation = candidates.score(candidates.most_promising(pool, wanted), "hill_climb")
        spent += len(generation)
        there = min(generation, key=lambda one: (-one["accuracy"], one["parameters"], one["id"]))
        if (there["accuracy"], -there["parameters"]) >= (here["accuracy"], -here["parameters"]):
            here = there


def _neighbour(ranks: Ranks, space: Spaces, layers: list[str], generator: random.Random) -> Ranks:
    result = dict(ranks)
    for layer in generator.sample(layers, max(1, len(layers) // 10)):
        choices = space[layer]
        level = choices.index(result[layer]) + generator.choice((-1, 1))
        result[layer] = choices[min(max(level, 0), len(choices) - 1)]
    return result


def nsga2(candidates: Candidates, space: Spaces, settings: SearchSettings, seed: int, file: Path) -> None:
    """Optuna's NSGA-II over (accuracy up, parameters down), started from what has been tried, a generation at a time.

    The study lies in an Optuna journal, which Optuna itself can open. A search that is run again writes it anew: its
    trials are asked for in the same order and told the scores of our own journal, and arrive where they were.
    """
    if settings.nsga2 == 0:
        return
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file.parent.mkdir(parents=True, exist_ok=True)
    for left in file.parent.glob(f"{file.name}*"):  # the journal and its lock, of a search that was killed
        left.unlink()
    study = optuna.create_study(
        directions=["maximize", "minimize"],
        sampler=optuna.samplers.NSGAIISampler(population_size=settings.population, seed=seed),
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(file))),
        study_name="nsga2",
    )
    for known in candidates.tried[: settings.population]:
        study.enqueue_trial(known["ranks"])
    spent, generations = 0, 0
    while spent < settings.nsga2 and generations < 20 * settings.nsga2:
        generations += 1
        trials = [study.ask() for _ in range(settings.population)]
        asked = [
            {layer: int(trial.suggest_categorical(layer, choices)) for layer, choices in space.items()}
            for trial in trials
        ]
        new = [ranks for ranks in _different(asked) if not candidates.has(ranks)][: settings.nsga2 - spent]
        spent += len(new)
        candidates.score(new, "nsga2")
        for trial, ranks in zip(trials, asked, strict=True):
            if candidates.has(ranks):
                scored = candidates.score([ranks], "nsga2")[0]
                study.tell(trial, (scored["accuracy"], scored["parameters"]))
            else:  # beyond the budget
                study.tell(trial, state=optuna.trial.TrialState.FAIL)


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's: the correlation of the two sides' ranks, equal values sharing the mean of theirs.

    None with fewer than three pairs, or where all values of a side are the same.
    """
    if len(pairs) < 3 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None
    one, two = (_places(side) for side in zip(*pairs, strict=True))
    return statistics.correlation(one, two)


def _places(values: Sequence[float]) -> list[float]:
    return [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]


def _dominates(one: dict[str, Any], other: dict[str, Any]) -> bool:
    no_worse = one["accuracy"] >= other["accuracy"] and one["parameters"] <= other["parameters"]
    return no_worse and (one["accuracy"] > other["accuracy"] or one["parameters"] < other["parameters"])


def _different(some: Sequence[Ranks]) -> list[Ranks]:
    return list({key_of(ranks): ranks for ranks in some}.values())
