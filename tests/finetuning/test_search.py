import json

import pytest

from phoenix_sparse.finetuning.search import Score, search
from phoenix_sparse.finetuning.settings import SearchSettings

LAYERS = [f"layer{n}" for n in range(20)]
SPACE = (8, 4, 2)


def quality(ranks):
    """Even layers want the largest rank, odd ones the smallest."""
    good = sum(rank == (8 if int(name[5:]) % 2 == 0 else 2) for name, rank in ranks.items())
    return Score(good / len(ranks), 0.01)


def run(tmp_path, evaluate=quality, space=SPACE, **settings):
    return search(
        LAYERS,
        space,
        SearchSettings(**settings),
        evaluate=evaluate,
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
    record = run(tmp_path, evaluate=lambda ranks: Score(0.5, None), hill_climb=5)
    chosen = record["candidates"][record["choice"]]
    assert chosen["parameters"] == min(candidate["parameters"] for candidate in record["candidates"])
    assert chosen["origin"] == "smallest"


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
