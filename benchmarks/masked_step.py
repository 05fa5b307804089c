"""What training through a mask costs beside plain PEFT LoRA: one linear (part A) and a whole training step (part B).

    PYTHONPATH=src python benchmarks/masked_step.py --json masked_step.json

Float32 on a CPU, bfloat16 on a GPU; adapters are float32, as PEFT makes them. Before anything is timed, the masked
linear is compared with float64. All variants of a part share their random weights, half of which are pruned. On a
CPU that others use, `--threads 1` gives steadier times.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from measuring import FLOOR, LORA, RANK, SPARSITY, facts, print_table
from one_linear import measure_linear
from training_step import measure_training

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import write_json
from phoenix_sparse.models import find_device

SHAPES = {"cuda": [(14336, 4096), (4096, 14336)], "cpu": [(1728, 640), (640, 1728)]}
TOKENS = {"cuda": [8192, 2048], "cpu": [1024]}
BATCHES = {"cuda": [32, 256], "cpu": [4]}
REPEATS = {"cuda": (60, 40), "cpu": (15, 7)}  # of part A, of part B

NAMES = {
    "frozen": "frozen W, gradient of x only",
    LORA: "PEFT LoRA",
    "lora_plain": "PEFT LoRA, no autocast",
    "ours": "Phoenix, masked",
    "ours_dense": "Phoenix, dense update",
    "two_products": "masked, two products (SQFT)",
    FLOOR: "full weight gradient (floor)",
    "full_finetuning": "linears trained in full",
}


def _cells(row: dict[str, Any], unit: str) -> dict[str, str]:
    """A row as the table shows it."""
    factor = {"us": 1e6, "ms": 1e3}[unit]
    digits = 0 if unit == "us" else 2
    middle, low, high = (f"{row[key] * factor:.{digits}f}" for key in ("seconds", "seconds_q1", "seconds_q3"))
    cells = {"variant": NAMES[row["variant"]], f"{unit} [quartiles]": f"{middle} [{low}-{high}]"}
    if "tokens_per_second" in row:
        cells["tokens/s"] = f"{row['tokens_per_second']:.0f}"
    if "ratio_floor" in row:
        cells["/ floor"] = f"{row['ratio_floor']:.2f}"
    cells |= {"/ LoRA": f"{row['ratio_lora']:.2f}", "memory MiB": f"{row['memory_bytes'] / 2**20:.1f}"}
    if "resident_bytes" in row:
        cells["resident MiB"] = f"{row['resident_bytes'] / 2**20:.1f}"
        cells["trained"] = f"{row['trained'] / 1e6:.1f}M"
    return cells


def _shape(text: str) -> tuple[int, int]:
    out, inner = text.split("x")
    return int(out), int(inner)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time masked LoRA training beside plain PEFT LoRA.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's own choice unless given")
    parser.add_argument("--shape", type=_shape, nargs="+", metavar="OUTxIN", help="part A: weights")
    parser.add_argument("--tokens", type=int, nargs="+", help="part A: tokens a step")
    parser.add_argument("--batch", type=int, nargs="+", help="part B: rows a step")
    parser.add_argument("--length", type=int, default=128, help="part B: tokens a row")
    parser.add_argument("--repeats", type=int, nargs=2, metavar=("A", "B"), help="timed steps a variant")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    return parser.parse_args()


def _notes(device: torch.device) -> list[str]:
    """How to read the figures."""
    notes = [
        f"Rank {RANK}, adapters float32, {SPARSITY:.0%} of the weights pruned.",
        "Times: medians with quartiles, variants taken in turn; ratios: medians of the ratios within a repeat.",
    ]
    if device.type == "cuda":
        return [
            *notes,
            "Memory: the peak above what is there before (weights, masks, inputs; in B the optimizer's state, too).",
            "PEFT LoRA runs under autocast, as Trainer(bf16=True) runs it, and again without; all else without.",
        ]
    return [
        *notes,
        "Memory: what the forward pass keeps for the backward pass, less parameters, masks and inputs; not the peak.",
        "A load average near the number of cores or above means that others disturb these times.",
    ]


def _print_head(record: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    print(f"{record['hardware']}; {versions}; {record['dtype']}")
    print(f"threads: {record['threads']}; load average at the start: {record['load_average']:.1f}")
    print(f"{record['date']}, commit {record['commit'] or 'unknown'}")
    print("\n".join(record["notes"]))


def _write(path: Path | None, record: dict[str, Any]) -> None:
    """Write what is measured so far, so that a run that is cut short leaves its first part."""
    if path is not None:
        write_json(path, record)


def main() -> None:
    arguments = _arguments()
    device = find_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    repeats = arguments.repeats or REPEATS[device.type]
    if min(repeats) < 2:
        raise PhoenixError(f"--repeats: {min(repeats)} is too few for quartiles; give 2 or more")
    record: dict[str, Any] = facts(device, dtype) | {
        "notes": _notes(device),
        "linear": [],
        "checks": [],
        "training": [],
    }
    _print_head(record)
    unit = "us" if device.type == "cuda" else "ms"
    for shape in arguments.shape or SHAPES[device.type]:
        for tokens in arguments.tokens or TOKENS[device.type]:
            errors, rows = measure_linear(device, dtype, shape, tokens, repeats[0])
            worst = max(errors, key=lambda name: errors[name])
            print(f"\nA. Linear {shape[0]}x{shape[1]} (out x in), {tokens} tokens, forward and backward")
            print(f"   checked: largest of {len(errors)} relative errors {errors[worst]:.1e} ({worst})")
            print_table([_cells(row, unit) for row in rows])
            record["checks"].append({"shape": list(shape), "tokens": tokens, "relative_errors": errors})
            record["linear"] += rows
            _write(arguments.json, record)
    for batch in arguments.batch or BATCHES[device.type]:
        stray, rows = measure_training(device, dtype, batch, arguments.length, repeats[1])
        print(f"\nB. Training step of a 65M Llama, {batch} x {arguments.length} tokens: forward, backward, AdamW")
        print(f"   checked: {stray} non-zeros off the masks after training")
        print_table([_cells(row, "ms") for row in rows])
        record["training"] += rows
        _write(arguments.json, record)


if __name__ == "__main__":
    try:
        main()
    except PhoenixError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
