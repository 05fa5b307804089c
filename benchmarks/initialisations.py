"""Perplexity of a model after every initialisation of step 1, at several sparsities, before any fine-tuning.

    PYTHONPATH=src python benchmarks/initialisations.py --model DIR --calibration FILE --text FILE --json OUT.json

Calibration passages come from one text and the perplexity from another. Gradients are those of the language modelling
loss on the calibration passages. Every method prunes a fresh copy of the same dense model.
"""

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import SEED, facts, print_table

from phoenix_sparse.determinism import be_deterministic
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.evaluation.perplexity import perplexity
from phoenix_sparse.files import read_text, write_json
from phoenix_sparse.models import find_device, load_model, load_tokenizer
from phoenix_sparse.pruning.blocks import Blocks
from phoenix_sparse.pruning.calibration import calibration_tokens
from phoenix_sparse.pruning.initialise import Calibration, initialise
from phoenix_sparse.pruning.settings import CalibrationSettings, SparsifySettings

METHODS: dict[str, dict[str, Any]] = {
    "random": {"importance": "random"},
    "magnitude": {"importance": "magnitude"},
    "gradient": {"importance": "gradient"},
    "Taylor": {"importance": "taylor"},
    "Wanda": {"importance": "wanda"},
    "GBLM": {"importance": "gblm"},
    "RIA": {"importance": "ria"},
    "RIA by rows": {"importance": "ria", "group": "row"},
    "DSnoT from Wanda": {"importance": "wanda", "update": "dsnot"},
    "Wanda + OWL": {"importance": "wanda", "allocation": "owl"},
    "Wanda + AlphaPruning": {"importance": "wanda", "allocation": "alphapruning"},
    "Wanda + evolutionary": {"importance": "wanda", "allocation": "evolutionary"},
    "SparseGPT": {"update": "sparsegpt"},
    "SparseGPT + OWL": {"update": "sparsegpt", "allocation": "owl"},
    "SparseGPT + AlphaPruning": {"update": "sparsegpt", "allocation": "alphapruning"},
    "SparseGPT + evolutionary": {"update": "sparsegpt", "allocation": "evolutionary"},
    "ALPS": {"update": "alps"},
    "ALPS + evolutionary": {"update": "alps", "allocation": "evolutionary"},
    "Wanda 16x1 blocks": {"importance": "wanda", "pattern": "16x1"},
    "Wanda structured": {"importance": "wanda", "pattern": "structured"},
    "Wanda 2:4": {"importance": "wanda", "pattern": "2:4"},
    "SparseGPT 2:4": {"update": "sparsegpt", "pattern": "2:4"},
    "ALPS 2:4": {"update": "alps", "pattern": "2:4"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True, help="a text file")
    parser.add_argument("--text", type=Path, required=True, help="the text of the perplexity")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=METHODS, metavar="NAME")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=None)
    parser.add_argument("--budget", type=int, default=1000, help="evaluations of the evolutionary search")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    be_deterministic()
    dense, tokenizer = load_model(args.model, args.dtype, args.device), load_tokenizer(args.model)
    measure = Measure(dense, tokenizer, read_text(args.text, "--text"), args.length, args.max_tokens)
    settings = CalibrationSettings(source="text", text=args.calibration, samples=args.samples, length=args.length)
    tokens = calibration_tokens(settings, [], tokenizer, max_length=args.length, seed=SEED)
    record: dict[str, Any] = {
        "facts": facts(find_device(args.device), dense.dtype),
        "dense": measure(dense),
        "rows": [],
    }
    print(f"dense: {record['dense']:.2f}", flush=True)
    for name in args.method:
        for sparsity in args.sparsity:
            if METHODS[name].get("pattern") == "2:4" and sparsity != 0.5:
                continue
            values = METHODS[name] | {"sparsity": sparsity, "evolution": {"budget": args.budget}}
            row = one(dense, SparsifySettings(**values), tokens, measure)
            record["rows"].append({"method": name, "sparsity": sparsity, **row})
            print(f"{name:26} {sparsity:.0%}  {row['perplexity']:12.2f}  {row['seconds']:7.1f} s", flush=True)
            if args.json:
                write_json(args.json, record)
    table(record, args.sparsity)


class Measure:
    """The perplexity of models on one text."""

    def __init__(self, dense: Any, tokenizer: Any, text: str, length: int, max_tokens: int | None) -> None:
        self.tokenizer, self.text, self.length, self.max_tokens = tokenizer, text, length, max_tokens
        self.batch = 16 if next(dense.parameters()).is_cuda else 1

    def __call__(self, model: Any) -> float:
        found = perplexity(
            model,
            self.tokenizer,
            self.text,
            context_length=self.length,
            max_tokens=self.max_tokens,
            batch_size=self.batch,
        )
        return float(found["perplexity"])


def one(dense: Any, settings: SparsifySettings, tokens: torch.Tensor, measure: Measure) -> dict[str, Any]:
    """Prune a copy and measure it."""
    model = copy.deepcopy(dense)
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens] if settings.reads_gradients else []
    start = time.perf_counter()
    try:
        masks, _ = initialise(Blocks(model), settings, Calibration(tokens, rows=rows), seed=SEED)
    except PhoenixError as error:
        return {"perplexity": float("nan"), "seconds": time.perf_counter() - start, "refused": str(error)}
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    dropped = sum(int((~mask).sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    return {"perplexity": measure(model), "seconds": seconds, "reached": dropped}


def table(record: dict[str, Any], sparsities: list[float]) -> None:
    """One line a method, one column a sparsity."""
    found = {(row["method"], row["sparsity"]): row for row in record["rows"]}
    names = list(dict.fromkeys(row["method"] for row in record["rows"]))
    print_table(
        [
            {"perplexity": name}
            | {f"{s:.0%}": f"{found[name, s]['perplexity']:.2f}" if (name, s) in found else "–" for s in sparsities}
            for name in names
        ]
    )


if __name__ == "__main__":
    try:
        main()
    except PhoenixError as error:
        sys.exit(f"initialisations: {error}")
