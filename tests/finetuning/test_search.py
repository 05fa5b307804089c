import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.finetuning.search import Score, rank_correlation, search
from phoenix_sparse.finetuning.settings import SearchSettings

LAYERS = [f"layer{n}" for n in range(20)]
SPACE = (8, 4, 2)


def quality(ranks):
    """Even layers want the largest rank, odd ones the smallest."""
    good = sum(rank == (8 if int(name[5:]) % 2 == 0 else 2) for name, rank in ranks.items())
    return Score(good / len(ranks), 0.01)


def run(tmp_path, evaluate=quality, space=SPACE, losses=None, **changes):
    return search(
        LAYERS,
        space,
        SearchSettings(**changes),
        evaluate=lambda generation: map(evaluate, generation),
        losses=losses,
        count_parameters=lambda ranks: sum(ranks.values()),
        seed=0,
        journal=tmp_path / "journal.jsonl",
    )


def accuracy(record):
    return record["candidates"][record["choice"]]["accuracy"]


def test_the_median_comes_first_and_budgets_are_kept(tmp_path):
    record = run(tmp_path, hill_climb=7, nsga2=9)
    origins = [candidate["origin"] for candidate in record["candidates"]]
    assert origins[:3] == ["median", "largest", "smallest"]
    assert origins.count("hill_climb") == 7
    assert origins.count("nsga2") == 9
    assert record["budget"] == len(record["candidates"]) == 19
    assert all(set(c["ranks"].values()) <= set(SPACE) for c in record["candidates"])


def test_searching_finds_better_than_the_heuristic(tmp_path):
    heuristic = accuracy(run(tmp_path / "0", bounds=False, hill_climb=0))
    climbed = accuracy(run(tmp_path / "1", bounds=False, hill_climb=60))
    evolved = accuracy(run(tmp_path / "2", bounds=False, hill_climb=0, nsga2=120))
    assert climbed > heuristic + 0.2
    assert evolved > heuristic + 0.2


def test_the_choice_is_the_best_and_the_smallest_of_equals(tmp_path):
    record = run(tmp_path, evaluate=lambda ranks: Score(0.5, None), hill_climb=5, margin=0)
    chosen = record["candidates"][record["choice"]]
    assert chosen["parameters"] == min(candidate["parameters"] for candidate in record["candidates"])
    assert chosen["origin"] == "smallest"


@pytest.mark.parametrize(
    ("stderr", "origin", "words"),
    [
        (0.01, "smallest", "it leads the median by 2.0 points, more than 1 standard error (1.0 points)"),
        (0.03, "median", "the median; candidate 2 leads it by 2.0 points, no more than 1 standard error (3.0 points)"),
        (None, "smallest", "more than 1 standard error (0.0 points)"),
    ],
)
def test_the_median_is_left_only_for_a_lead_beyond_noise(tmp_path, stderr, origin, words):
    def score(ranks):
        return Score(0.52 if set(ranks.values()) == {2} else 0.5, stderr)

    record = run(tmp_path, evaluate=score, hill_climb=0)
    assert record["candidates"][record["choice"]]["origin"] == origin
    assert words in record["rule"]


def test_a_single_hit_where_the_median_has_none_is_noise(tmp_path):
    record = run(tmp_path, evaluate=lambda ranks: Score(0.01 * (set(ranks.values()) == {2}), 0.01), hill_climb=0)
    assert record["choice"] == 0


def test_the_front_is_what_nothing_dominates(tmp_path):
    record = run(tmp_path, hill_climb=10, nsga2=10)
    front = [record["candidates"][index] for index in record["front"]]
    for one in front:
        for other in record["candidates"]:
            assert not (other["accuracy"] > one["accuracy"] and other["parameters"] <= one["parameters"])
            assert not (other["accuracy"] >= one["accuracy"] and other["parameters"] < one["parameters"])
    assert record["choice"] in record["front"]


@pytest.mark.parametrize("stop", [1, 4, 9, 14])
def test_a_killed_search_arrives_at_the_same_end(tmp_path, stop):
    calm = run(tmp_path / "calm", hill_climb=6, nsga2=8)
    calls = []

    def dies(ranks):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(ranks)
        return quality(ranks)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", evaluate=dies, hill_climb=6, nsga2=8)
    journal = tmp_path / "killed" / "journal.jsonl"
    with journal.open("a") as stream:
        stream.write('{"ranks": {"lay')  # a line that the kill cut short
    measured = []

    def counts(ranks):
        measured.append(ranks)
        return quality(ranks)

    again = run(tmp_path / "killed", evaluate=counts, hill_climb=6, nsga2=8)
    assert len(measured) == len(calm["candidates"]) - stop
    assert [c["ranks"] for c in again["candidates"]] == [c["ranks"] for c in calm["candidates"]]
    assert again["choice"] == calm["choice"]
    assert len([json.loads(line) for line in journal.read_text().splitlines()]) == len(calm["candidates"])


def test_one_rank_leaves_nothing_to_search(tmp_path):
    record = run(tmp_path, space=(8,), hill_climb=10, nsga2=10)
    assert len(record["candidates"]) == 1
    assert record["budget"] == 1


def loss(ranks):
    """What goes down as quality goes up, but for two layers that it sees the other way round."""
    wrong = {"layer3": -1, "layer4": -1}
    return 9 - sum(wrong.get(name, 1) * quality({name: rank}).accuracy for name, rank in ranks.items())


@pytest.mark.parametrize("neighbours", [1, 3])
def test_a_surrogate_finds_as_good_with_fewer_evaluations(tmp_path, neighbours):
    def by_loss(generation):
        return map(loss, generation)

    options = {"bounds": False, "hill_climb": 18, "neighbours": neighbours}
    plain = run(tmp_path / "0", **options)
    ranked = run(tmp_path / "1", losses=by_loss, pool=6, **options)
    assert accuracy(ranked) > accuracy(plain)
    assert len(ranked["candidates"]) == len(plain["candidates"]) == 19
    assert ranked["surrogate"]["pool"] == 6
    assert ranked["surrogate"]["rank_correlation"] > 0.8
    assert "surrogate" not in plain
    for candidate in ranked["candidates"]:
        assert candidate["loss"] == loss(candidate["ranks"])
    entries = [json.loads(line) for line in (tmp_path / "1" / "journal.jsonl").read_text().splitlines()]
    assert sum("loss" in entry for entry in entries) >= 5 * 18
    with pytest.raises(PhoenixError, match="nothing tells the candidates' losses"):
        run(tmp_path / "2", pool=2)


@pytest.mark.parametrize("stop", [3, 20, 41])
def test_a_killed_search_with_a_surrogate_arrives_at_the_same_end(tmp_path, stop):
    options = {"hill_climb": 9, "neighbours": 3, "pool": 4, "nsga2": 9, "population": 4}
    calm = run(tmp_path / "calm", losses=lambda generation: map(loss, generation), **options)
    measured = []

    def counted(measure, limit):
        def measuring(ranks):
            if len(measured) == limit:
                raise KeyboardInterrupt
            measured.append(ranks)
            return measure(ranks)

        return measuring

    for limit in (stop, None):
        measured.clear()
        chosen = {"evaluate": counted(quality, limit), "losses": lambda some, n=limit: map(counted(loss, n), some)}
        if limit is not None:
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "killed", **chosen, **options)
        else:
            again = run(tmp_path / "killed", **chosen, **options)
    assert [c["ranks"] for c in again["candidates"]] == [c["ranks"] for c in calm["candidates"]]
    assert again["choice"] == calm["choice"]
    entries = (tmp_path / "calm" / "journal.jsonl").read_text().splitlines()
    assert len(measured) == len(entries) - stop


def test_optuna_opens_the_study(tmp_path):
    import optuna
    from optuna.storages.journal import JournalFileBackend

    record = run(tmp_path, bounds=False, hill_climb=0, nsga2=10, population=4)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "nsga2.log")))
    study = optuna.load_study(study_name="nsga2", storage=storage)
    complete = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    values = {(c["accuracy"], c["parameters"]) for c in record["candidates"]}
    assert {tuple(trial.values) for trial in complete} == values
    assert len(complete) >= len(record["candidates"]) == 11


def test_an_unmerged_adapter_s_flops_follow_its_parameters(tmp_path):
    for candidate in run(tmp_path, hill_climb=3)["candidates"]:
        assert candidate["unmerged_flops_per_token"] == 2 * candidate["parameters"]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=12))
def test_the_rank_correlation_is_spearman_s(pairs):
    from scipy.stats import spearmanr

    got = rank_correlation(pairs)
    if got is None:
        assert any(len(set(side)) == 1 for side in zip(*pairs, strict=True))
    else:
        assert got == pytest.approx(spearmanr(*zip(*pairs, strict=True)).statistic)
