"""Run directories of a small sweep, with figures made up for the tests."""

import copy
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml


def write_runs(
    directory: Path,
    files: dict[str, Any],
    *,
    models: Iterable[str] = ("base-65m",),
    tasks: Iterable[str] = ("gsm8k",),
    methods: Iterable[str] = ("wanda", "random"),
    sparsities: Iterable[float] = (0.0, 0.5, 0.9),
    modes: Iterable[str] = ("sparse_to_sparse", "sparse_to_dense"),
    seeds: Iterable[int] = (0, 1),
) -> list[Path]:
    """Write runs whose accuracies fall with sparsity, random below wanda; give their directories."""
    made = []
    for model in models:
        for task in tasks:
            for method in methods:
                for mode in modes:
                    for sparsity in sparsities:
                        for seed in seeds:
                            name = f"{model}-{task}-{method}-{100 * sparsity:g}-{mode[-5:]}-{seed}"
                            values = one(copy.deepcopy(files), model, task, method, mode, sparsity, seed)
                            made.append(_write(directory / name, values))
    return made


def accuracy(method: str, mode: str, sparsity: float, seed: int) -> float:
    height = 0.5 - (0.2 if method == "random" else 0.0) * sparsity - (0.03 if mode == "sparse_to_dense" else 0)
    return height * (1 - sparsity**3) + 0.01 * math.sin(7 * seed + 10 * sparsity)


def one(
    files: dict[str, Any], model: str, task: str, method: str, mode: str, sparsity: float, seed: int
) -> dict[str, Any]:
    files["manifest.json"] |= {"name": f"{model}-{task}", "seed": seed}
    files["manifest.json"]["stages"]["report"] = {"status": "done", "seconds": 0.3, "outputs": {}}
    structured = method == "structured"
    importance = "magnitude" if structured else method
    files["recipe.yaml"] = {
        "name": f"{model}-{task}",
        "model": f"models/{model}",
        "task": {"name": task},
        "seed": seed,
        "sparsify": {
            **{"sparsity": sparsity, "importance": importance, "update": "none", "allocation": "uniform"},
            "pattern": "structured" if structured else "unstructured",
        },
        "finetune": {"mode": mode, "dense_merge": "dense"},
    }
    measured = {"metric": "exact_match,strict-match", "split": "test", "examples": 1319, "num_fewshot": 0}
    for place, value in (
        ("", accuracy(method, mode, sparsity, seed)),
        ("baselines/pruned/", accuracy(method, mode, sparsity, seed) / 3),
        ("baselines/dense/", 0.12),
        ("baselines/dense_lora/", 0.51),
    ):
        files[f"{place}eval.json"] = {"phoenix": {"accuracy": value, "stderr": 0.013, "task": task} | measured}
    filled = mode == "sparse_to_dense"
    density = 1.0 if filled else 1 - sparsity
    for phase, factor in (("prefill", 1e9), ("decode", 1e7)):
        total = files["flops.json"][phase]["total"]
        total |= {"dense": factor, "sparse": factor * (0.2 + 0.8 * density)}
    certificate = files["certificate.json"]
    certificate |= {"mode": mode, "sparsity": 0.0 if filled else sparsity}
    certificate["off_mask_nonzeros"] = round(1e5 * sparsity) if filled else 0
    return files


def _write(directory: Path, values: dict[str, Any]) -> Path:
    for name, value in values.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(value, sort_keys=False) if path.suffix == ".yaml" else json.dumps(value)
        path.write_text(text, encoding="utf-8")
    return directory
