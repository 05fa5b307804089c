"""A run directory as a run would leave it, with figures made up for the tests."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

from phoenix_sparse.evaluation.flops import count_flops

BLOCKS, RANKS = 6, (8, 12, 16)
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (160, 64),
    "mlp.up_proj": (160, 64),
    "mlp.down_proj": (64, 160),
}


def answers(right: int, examples: int = 240) -> list[dict[str, Any]]:
    """So many of them right, the first ones."""
    return [
        {
            "example": number,
            "hash": f"{number:016x}",
            "prompt": f"Question: what is {number} + 1?\nAnswer:",
            "target": f"{number + 1}",
            "prediction": f"{number + 1}" if number < right else "no idea",
            "output": " It is so.",
            "score": float(number < right),
        }
        for number in range(examples)
    ]


def run_files() -> dict[str, Any]:
    """The run's files by relative path, as values to be changed by a test before they are written."""
    layers = {f"model.layers.{block}.{name}": shape for block in range(BLOCKS) for name, shape in SHAPES.items()}
    sparsity = {
        name: round(0.35 + 0.3 * math.sin(index * 1.7) ** 2 + 0.02 * (index // 7), 4)
        for index, name in enumerate(layers)
    }
    nnz = {name: round((1 - sparsity[name]) * math.prod(shape)) for name, shape in layers.items()}
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    densities = {name: 1 - value for name, value in sparsity.items()}
    return {
        "manifest.json": {
            "phoenix": "0.1.0",
            "name": "maths at half the weights",
            "created": "2026-11-20T10:11:12+00:00",
            "git_commit": "0123456789abcdef0123456789abcdef01234567",
            "versions": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "python": "3.11.9"},
            "host": {
                "platform": "Linux-6.1",
                "cpu": "Some CPU @ 2.1 GHz",
                "cores": 2,
                "gpu": None,
                "memory_bytes": 8 * 2**30,
            },
            "seed": 7,
            "inputs": {
                "model": {"path": "some-owner/base-65m", "sha256": "a" * 64},
                "task": {"name": "sums", "train": 7000, "validation": 400, "test": 1319, "dropped_overlap": 3},
            },
            "stages": {
                name: {"status": "done", "seconds": seconds, "outputs": {}}
                for name, seconds in {
                    "sparsify": 41.24,
                    "finetune": 1834.9,
                    "search": 912.0,
                    "merge": 3.1,
                    "baselines": 8123.0,
                    "evaluate": 301.5,
                    "flops": 0.4,
                }.items()
            }
            | {"report": {"status": "running", "outputs": {}}},
        },
        "recipe.yaml": {
            "name": "maths at half the weights",
            "model": {"path": "some-owner/base-65m"},
            "sparsify": {"sparsity": 0.5, "method": "wanda", "calibration": {"samples": 128}},
            "finetune": {"ranks": list(RANKS), "learning_rate": 0.0003, "checkpointing": False, "limit": None},
        },
        "allocation.json": {
            "sparsity": 0.5,
            "method": "owl",
            "importance": "wanda",
            "update": "alps",
            "pattern": "2:4",
            "layers": {
                name: {"shape": list(shape), "nnz": nnz[name], "sparsity": sparsity[name]}
                for name, shape in layers.items()
            },
        },
        "tune.json": tune(120, 2.1),
        "baselines/dense_lora/tune.json": tune(120, 1.8),
        "search.json": search(list(layers)),
        "certificate.json": {
            "off_mask_nonzeros": 0,
            "max_abs_logit_difference": 1.9e-06,
            "logits_compared": 524288,
            "argmax_agreement": 1.0,
            "sparsity": 0.5012,
            "layers": {
                name: {"sparsity": sparsity[name], "mask_sparsity": sparsity[name], "nnz": nnz[name]} for name in layers
            },
            "masks_sha256": "b" * 64,
            "adapter_sha256": "c" * 64,
            "merged_sha256": "d" * 64,
            "dtype": "float32",
            "mode": "sparse_to_sparse",
        },
        "eval.json": scores(0.4117, 0.0136),
        "baselines/dense/eval.json": scores(0.1203, 0.0090),
        "baselines/dense_lora/eval.json": scores(0.4246, 0.0136),
        "baselines/pruned/eval.json": scores(0.0318, 0.0048),
        "perplexity.json": perplexity(27.454),
        "baselines/dense/perplexity.json": perplexity(21.337),
        "baselines/pruned/perplexity.json": perplexity(30.018),
        "flops.json": count_flops(config, densities, prompt_length=1024, context_length=1024),
    }


def scores(accuracy: float, stderr: float | None) -> dict[str, Any]:
    return {
        "results": {"sums": {"exact_match,strict-match": accuracy}},
        "phoenix": {
            "accuracy": accuracy,
            "stderr": stderr,
            "metric": "exact_match,strict-match",
            "task": "sums",
            "split": "test",
            "examples": 1319,
            "num_fewshot": 0,
            "seconds": 95.2,
        },
    }


def perplexity(value: float) -> dict[str, Any]:
    return {"perplexity": value, "context_length": 2048, "tokens": 289_001, "text": "wikitext-2, test"}


def tune(steps: int, start: float) -> dict[str, Any]:
    return {
        "log": [
            {
                "step": step,
                "epoch": step / steps,
                "loss": start * (0.3 + 0.7 * math.exp(-step / 30)) + 0.1 * math.sin(step * 2.3),
                "learning_rate": 3e-4,
                "grad_norm": 1.0,
            }
            for step in range(1, steps + 1)
        ],
        "steps": steps,
        "examples": 7000,
        "tokens": 1_234_567,
        "seconds": 1834.9,
        "peak_memory_bytes": None,
        "trainable_parameters": 129024,
    }


def search(layers: list[str]) -> dict[str, Any]:
    candidates = [
        {
            "id": index,
            "origin": "median" if index == 0 else "largest" if index == 1 else "nsga2",
            "ranks": {layer: RANKS[(index * 5 + place) % 3] for place, layer in enumerate(layers)},
            "accuracy": 0.36 + 0.05 * math.sin(index * 1.3) ** 2 * (index % 7) / 6,
            "stderr": 0.024,
            "parameters": 70_000 + 2_700 * ((index * 11) % 23),
            "seconds": 20.0,
        }
        for index in range(20)
    ]
    front = [
        one["id"]
        for one in candidates
        if not any(
            other["accuracy"] >= one["accuracy"] and other["parameters"] <= one["parameters"] and other is not one
            for other in candidates
        )
    ]
    return {
        "space": list(RANKS),
        "method": "nsga2",
        "budget": 20,
        "validation_examples": 400,
        "candidates": candidates,
        "front": front,
        "choice": front[-1],
        "rule": "the fewest parameters within one standard error of the best accuracy",
    }


@pytest.fixture
def files() -> dict[str, Any]:
    return run_files()


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Write a run's files; give their directory."""

    def write(files: dict[str, Any]) -> Path:
        directory = tmp_path / "run"
        for name, value in files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(value, sort_keys=False) if path.suffix == ".yaml" else json.dumps(value)
            if path.suffix == ".jsonl":
                text = "".join(json.dumps(row) + "\n" for row in value)
            path.write_text(text, encoding="utf-8")
        return directory

    return write
