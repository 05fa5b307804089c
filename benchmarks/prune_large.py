"""Time and memory of step 1 on a model of Llama-3-8B's shape, made on the spot with random weights.

    PYTHONPATH=src python benchmarks/prune_large.py make DIR
    PYTHONPATH=src python benchmarks/prune_large.py prune DIR WORK [KEY=VALUE ...] [--device cuda] [--write]

What is timed reads the model's files block by block, prunes, and writes each finished block; with --write also the
whole model as a Hugging Face directory. Random weights and tokens take as long as
real ones; of quality they say nothing.
"""

import argparse
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import SEED, facts, llama_config

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import write_json
from phoenix_sparse.models import WEIGHTS, find_device
from phoenix_sparse.pruning.initialise import Calibration, initialise
from phoenix_sparse.pruning.settings import SparsifySettings
from phoenix_sparse.pruning.streaming import FinishedBlocks, open_streamed, write_model
from phoenix_sparse.recipe import check, override


def make(directory: Path, layers: int, width: int) -> None:
    """Write a model of the shape, one shard a block."""
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = llama_config(layers, width)
    with init_empty_weights():
        shapes = {
            name: tuple(value.shape) for name, value in AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(SEED)
    shards: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")
        shards.setdefault(part[2] if part[1] == "layers" else "rest", []).append(name)
    weights: dict[str, str] = {}
    for shard, names in shards.items():
        file = f"model-{shard}.safetensors"
        tensors = {
            name: torch.ones(shapes[name], dtype=torch.bfloat16)
            if len(shapes[name]) == 1
            else torch.randn(shapes[name], generator=generator, device=device).mul_(0.02).bfloat16().cpu()
            for name in names
        }
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weights |= dict.fromkeys(names, file)
    write_json(directory / WEIGHTS[1], {"metadata": {}, "weight_map": weights})


class _NoTokenizer:
    """The tokens are random; there is no tokenizer to write."""

    def save_pretrained(self, directory: Path) -> None:
        del directory


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Prune once, from files to files."""
    settings = check(SparsifySettings, override({}, args.settings), "prune_large")
    device = find_device(args.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    blocks = open_streamed(args.model, "auto", device)
    if blocks is None:
        raise PhoenixError(f"{args.model}: can't be streamed; make it with this script")
    vocabulary, generator = blocks.model.config.vocab_size, torch.Generator().manual_seed(SEED)
    tokens = torch.randint(0, vocabulary, (args.samples, args.length), generator=generator)
    marks: list[float] = []
    masks, _ = initialise(
        blocks,
        settings,
        Calibration(tokens if settings.reads_tokens else None),
        seed=SEED,
        work=args.work,
        progress=lambda _what, _done, _all: marks.append(time.perf_counter() - start),
    )
    pruned = time.perf_counter() - start
    if args.write:
        write_model(blocks, FinishedBlocks(args.work / "blocks"), _NoTokenizer(), args.work / "sparse")
    total = time.perf_counter() - start
    kept = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    return facts(device, torch.bfloat16) | {
        "settings": args.settings,
        "sparsity": 1 - kept,
        "seconds_to_pruned_blocks": pruned,
        "seconds_with_model_written": total if args.write else None,
        "seconds_of_a_block": (marks[-1] - marks[0]) / (len(marks) - 1) if len(marks) > 1 else None,
        "peak_gpu_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "peak_reserved_gpu_gib": torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else None,
        "peak_ram_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("model", type=Path)
    making.add_argument("--layers", type=int, default=32)
    making.add_argument("--width", type=int, default=4096, help="hidden size")
    pruning = commands.add_parser("prune")
    pruning.add_argument("model", type=Path)
    pruning.add_argument("work", type=Path)
    pruning.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    pruning.add_argument("--samples", type=int, default=128)
    pruning.add_argument("--length", type=int, default=2048)
    pruning.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    pruning.add_argument("--write", action="store_true", help="write the whole pruned model too")
    pruning.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.command == "make":
        make(args.model, args.layers, args.width)
        return
    shutil.rmtree(args.work, ignore_errors=True)
    record = measure(args)
    for key, value in record.items():
        print(f"{key}: {value}")
    if args.json:
        write_json(args.json, record)


if __name__ == "__main__":
    try:
        main()
    except PhoenixError as error:
        sys.exit(f"prune_large: {error}")
