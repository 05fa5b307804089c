"""Recipes whose runs take seconds."""

from pathlib import Path

from phoenix_sparse.recipe import Recipe, check, override


def small(model: Path, task: Path, *changes: str) -> Recipe:
    """A recipe of seconds."""
    values = {
        "name": "small",
        "model": str(model),
        "task": str(task),
        "sparsify": {"calibration": {"samples": 6, "length": 16}},
        "finetune": {
            **{"ranks": [4, 2, 1], "epochs": 1, "batch_size": 10, "micro_batch_size": 5, "learning_rate": 0.01},
            **{"max_length": 32, "checkpoint_every": 2, "log_every": 1, "trackers": []},
        },
        "search": {"hill_climb": 2, "nsga2": 2, "population": 2},
        "evaluate": {"batch_size": 20, "prompt_length": 8, "context_length": 16},
    }
    return check(Recipe, override(values, changes), "test")


QUICK = ("evaluate.baselines=[]", "search={bounds: false, hill_climb: 0}", "finetune.max_steps=3")
