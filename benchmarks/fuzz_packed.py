"""Open packed models with bytes changed at random: each must open, or be refused in one line; nothing may crash.

    PYTHONPATH=src python benchmarks/fuzz_packed.py [--files 10000] [--seed 0]

A tiny model is packed; each file has some bytes, or a piece of its header, changed, cut or repeated. Every one is
unpacked, and one in twenty loaded as a model that answers a prompt. Kernels run on whatever passed the checks, so a
crash of this process is the failure that is looked for.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, logging

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.loading import load
from phoenix_sparse.runtime.packing import pack_model, unpack_model

WEIGHTS, CONFIG = "model.safetensors", "config.json"
DENSITIES = {"half": 0.5, "few": 0.1}


def make(directory: Path) -> None:
    """Packed Llamas of two blocks: half of the weights zero, or nine tenths, which kernels hold in another layout; with
    values of bfloat16, or int8."""
    for name, density in DENSITIES.items():
        make_one(directory / name, density)


def make_one(directory: Path, density: float) -> None:
    """Both kinds of values at one density."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.masked_fill_(torch.rand(parameter.shape) >= density, 0.0)
    model.save_pretrained(directory / "dense")
    pack_model(directory / "dense", directory / "bf16")
    pack_model(directory / "dense", directory / "int8", values="int8")


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Some bytes of it changed, cut out, repeated or made extreme."""
    changed = bytearray(data)
    header = 8 + int.from_bytes(data[:8], "little") if draw.random() < 0.5 else len(data)
    for _ in range(draw.choice([1, 1, 2, 8, 64])):
        place = draw.randrange(min(header, len(changed)))
        kind = draw.randrange(6)
        if kind == 0:
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[place] = draw.randrange(256)
        elif kind == 2:
            changed[place : place + 8] = draw.choice([b"\xff" * 8, bytes(8), (2**62).to_bytes(8, "little")])
        elif kind == 3:
            del changed[place : place + draw.choice([1, 8, 100])]
        elif kind == 4:
            changed[place:place] = changed[place : place + draw.choice([1, 8, 100])]
        elif data[place : place + 1].isdigit():
            changed[place : place + 1] = str(draw.randrange(10**6)).encode()
        if not changed:
            break
    return bytes(changed)


def attempt(directory: Path, number: int, work: Path) -> str:
    """What became of one changed directory."""
    try:
        unpack_model(directory, work / "out")
        if number % 20 == 0:
            load(directory)(torch.tensor([[1, 2, 3]]))
    except PhoenixError as error:
        return "refused" if "\n" not in str(error) else "refused in more than one line"
    finally:
        shutil.rmtree(work / "out", ignore_errors=True)
    return "opened"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.set_verbosity(logging.CRITICAL)
    draw, found, failures = random.Random(args.seed), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        make(work)
        for number in range(args.files):
            kind = f"{draw.choice(list(DENSITIES))}/{draw.choice(['bf16', 'int8'])}"
            file = CONFIG if draw.random() < 0.2 else WEIGHTS
            original = (work / kind / file).read_bytes()
            (work / kind / file).write_bytes(mutate(original, draw))
            try:
                outcome = attempt(work / kind, number, work)
            except Exception as error:
                outcome = f"{type(error).__name__}"
                failures.append(f"file {number} ({kind}/{file}): {type(error).__name__}: {str(error)[:200]}")
            found[outcome] += 1
            (work / kind / file).write_bytes(original)
    print(json.dumps(found, indent=1))
    for line in failures[:20]:
        print(line)
    if failures or found["refused in more than one line"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
