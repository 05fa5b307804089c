"""Tokens per second of decoding on the GPU: Llama-3-8B's shape, dense against Phoenix's kernels, in one process.

    PYTHONPATH=src python benchmarks/gpu_decode.py --compiled --json gpu_decode.json

Random weights, a random half of each linear's kept; both forms have the same weights, and q, k, v and gate, up in one
launch; with --values int8 the packed ones are rounded to int8, and the dense form is what they hold. Both run the
same loop: a static cache, and a CUDA graph of the step from the embedding to the next token. With --compiled each
form is also measured with the step put through torch.compile before it is recorded; what fails there is reported as
absent; torch's compiled kernels begin before the ones ahead have ended, as Phoenix's do anyway. Forms take turns,
times are between CUDA events. `packed / dense` are bytes of the linears that are packed; peak memory is that of a
process with this form alone: its weights, and what building the decoder and running it allocates. Before anything is
timed, logits of both forms are compared; after it, those of each form compiled and not, and the tokens with those
decoded first.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import SEED, facts, llama_config, print_table, summary, time_in_turn
from torch import Tensor

from phoenix_sparse.errors import PhoenixError, first_line
from phoenix_sparse.files import write_json
from phoenix_sparse.models import prunable_linears
from phoenix_sparse.runtime.bench import Pair
from phoenix_sparse.runtime.cuda.linear import VARIABLE, prepare
from phoenix_sparse.runtime.decoding import Decoder
from phoenix_sparse.runtime.packed import Packed, quantize
from phoenix_sparse.runtime.sparse_linear import SparseLinear

DEVICE = torch.device("cuda")
LIKE = 0.1  # relative error of logits between the forms: bfloat16 through all layers, in another order


def packed_of(weight: Tensor, kept: Tensor) -> Packed:
    """As `packed.pack`, on the GPU, which takes milliseconds where a CPU takes seconds."""
    out, columns = weight.shape
    bits = torch.nn.functional.pad(kept, (0, -columns % 8)).view(out, -1, 8).to(torch.uint8)
    bitmask = (bits << torch.arange(8, dtype=torch.uint8, device=weight.device)).sum(-1, dtype=torch.uint8)
    offsets = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    return Packed((out, columns), bitmask, weight[kept], offsets)


@torch.no_grad()
def make_pair(layers: int, width: int, density: float, values: str) -> Pair:
    """A model of random weights, its linears packed as they come, in both forms."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    with DEVICE:
        model: Any = AutoModelForCausalLM.from_config(llama_config(layers, width), dtype=torch.bfloat16)
    for name, linear in prunable_linears(model).items():
        kept = torch.rand(linear.weight.shape, device=DEVICE) < density
        packed = packed_of(linear.weight.detach(), kept)
        sparse = SparseLinear.of(quantize(packed) if values == "int8" else packed, torch.bfloat16)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, sparse)
    prepare(model.eval(), DEVICE)
    return Pair(model, "auto")


def linear_bytes(pair: Pair) -> dict[str, int]:
    """Of the linears that are packed, in each form."""
    return {
        "dense": sum(linear.weight.nbytes for linear in pair.forms["dense"].values()),
        "sparse": sum(linear.nbytes for linear in pair.forms["sparse"].values()),
    }


def compare(pair: Pair, ids: Tensor) -> float:
    """The relative error of the sparse form's logits: after a prompt, and of a step after that.

    Raises:
        PhoenixError: they are others.
    """
    found: dict[str, list[Tensor]] = {}
    for form in ("dense", "sparse"):
        with pair.as_(form) as model:
            decoder = Decoder(model, len(ids), ids.shape[1] + 2)
            first = decoder.prefill(ids, lambda logits: torch.zeros_like(logits[:, 0], dtype=torch.int64))
            decoder.advance(1)
            assert decoder.logits is not None
            found[form] = [first.float(), decoder.logits.float().clone()]
    errors = [float((s - d).norm() / d.norm()) for d, s in zip(*found.values(), strict=True)]
    if not max(errors) <= LIKE:
        raise PhoenixError(f"gpu_decode: logits of the forms differ by {errors}; the kernels are wrong")
    return max(errors)


class Variants:
    """A decoder for each form and way, their peak memory, and why some are absent."""

    def __init__(self, pair: Pair, ids: Tensor, tokens: int, compiled: bool) -> None:
        self.decoders: dict[str, Decoder] = {}
        self.peaks: dict[str, int] = {}
        self.absent: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.tokens: dict[str, Tensor] = {}
        self.logits: dict[str, Tensor] = {}
        for way in ("graph", "compiled")[: 2 if compiled else 1]:
            for form in ("dense", "sparse"):
                self._add(f"{form}, {way}", pair, form, ids, tokens, way == "compiled")

    def _add(self, name: str, pair: Pair, form: str, ids: Tensor, tokens: int, compiled: bool) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        torch._dynamo.reset()
        with pair.as_(form) as model:
            try:
                decoder = Decoder(model, len(ids), ids.shape[1] + tokens, compiled=compiled)
                decoder.prefill(ids)
                decoder.advance(1)
                logits = decoder.logits
                assert logits is not None
                self.logits[name] = logits.float().clone()
                decoder.advance(tokens - 1)
            except Exception as error:  # whatever torch's compiler runs into: a figure that is missing, not an end
                if not compiled:
                    raise
                self.absent[name] = f"{type(error).__name__}: {first_line(error)}"
                return
        torch.cuda.synchronize()
        if not decoder.captured:
            self.absent[name] = f"not recorded: {decoder.reason}"
            return
        self.seconds[name] = time.perf_counter() - start
        self.decoders[name] = decoder
        self.tokens[name] = decoder.tokens.clone()
        self.peaks[name] = int(torch.cuda.max_memory_allocated()) - before + pair.bytes(form)

    def check(self) -> None:
        """Compiled or not, a form does the same, and whatever ran before.

        Raises:
            PhoenixError: it does not.
        """
        for name, logits in self.logits.items():
            plain = self.logits[name.replace("compiled", "graph")]
            error = float((logits - plain).norm() / plain.norm())
            if not error <= LIKE:
                raise PhoenixError(f"gpu_decode: logits of {name!r} are {error:.2g} off those that aren't compiled")
        for name, decoder in self.decoders.items():
            if not torch.equal(decoder.tokens, self.tokens[name]):
                raise PhoenixError(f"gpu_decode: {name!r} decoded other tokens the second time; its kernels race")


def measure(pair: Pair, batch: int, prompt: int, tokens: int, repeats: int, compiled: bool) -> list[dict[str, Any]]:
    """A row for each form and way at one batch size."""
    generator = torch.Generator(DEVICE).manual_seed(SEED)
    ids = torch.randint(pair.model.config.vocab_size, (batch, prompt), generator=generator, device=DEVICE)
    variants = Variants(pair, ids, tokens, compiled)
    for name, why in variants.absent.items():
        print(f"batch {batch}: {name} is absent ({why})", flush=True)

    def decode(decoder: Decoder) -> None:
        decoder.rewind(prompt + 1)
        decoder.advance(tokens)

    steps = {name: (lambda d=decoder: decode(d)) for name, decoder in variants.decoders.items()}
    if not any(name.startswith("dense") for name in steps):
        raise PhoenixError("gpu_decode: no dense loop could be recorded; there is nothing to compare with")
    found = time_in_turn(steps, DEVICE, repeats, warmup=1)
    variants.check()
    best = min((name for name in found if name.startswith("dense")), key=lambda name: statistics.median(found[name]))
    rows = []
    for name, seconds in found.items():
        facts_of = summary(seconds, {"best_dense": found[best]})
        row = {
            "batch": batch,
            "form": name,
            "tokens_per_second": batch * tokens / facts_of["seconds"],
            "low": batch * tokens / facts_of["seconds_q3"],
            "high": batch * tokens / facts_of["seconds_q1"],
            "milliseconds": facts_of["seconds"] / tokens * 1e3,
            "factor": 1 / facts_of["ratio_best_dense"],
            "best_dense": name == best,
            "peak_bytes": variants.peaks[name],
            "start_seconds": variants.seconds[name],
        }
        rows.append(row)
        print({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
    return [*rows, *({"batch": batch, "form": name, "absent": why} for name, why in variants.absent.items())]


def _cells(row: dict[str, Any], share: float) -> dict[str, str]:
    return {
        "form": row["form"],
        "batch": str(row["batch"]),
        "tokens/s [quartiles]": f"{row['tokens_per_second']:.1f} [{row['low']:.1f}-{row['high']:.1f}]",
        "ms a token": f"{row['milliseconds']:.3f}",
        "of best dense": f"{row['factor']:.2f}" + (" (best)" if row["best_dense"] else ""),
        "packed / dense": f"{share:.1%}" if row["form"].startswith("sparse") else "",
        "peak GiB": f"{row['peak_bytes'] / 2**30:.2f}",
        "start s": f"{row['start_seconds']:.1f}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--values", choices=["bf16", "int8"], default="bf16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compiled", action="store_true", help="measure both forms through torch.compile too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        if not torch.cuda.is_available():
            raise PhoenixError("gpu_decode: torch sees no GPU; run this on a machine with one")
        if not 0 < options.density <= 1 or min(options.repeats - 1, options.tokens, options.prompt, *options.batch) < 1:
            raise PhoenixError(
                "gpu_decode: --density is above 0 and up to 1; batches, tokens and prompt are 1 or more, repeats 2"
            )
        os.environ[VARIABLE] = "kernels"
        start = time.perf_counter()
        pair = make_pair(options.layers, options.width, options.density, options.values)
        gc.collect()
        torch.cuda.empty_cache()
        sizes = linear_bytes(pair)
        share = sizes["sparse"] / sizes["dense"]
        print(f"made in {time.perf_counter() - start:.0f} s; linears {sizes['dense'] / 2**30:.2f} GiB dense, "
              f"{sizes['sparse'] / 2**30:.2f} packed ({share:.1%})", flush=True)  # fmt: skip
        differ = compare(pair, torch.randint(pair.model.config.vocab_size, (2, options.prompt), device=DEVICE))
        print(f"logits of the forms differ by {differ:.2%}", flush=True)
        rows = []
        for batch in options.batch:
            rows += measure(pair, batch, options.prompt, options.tokens, options.repeats, options.compiled)
            gc.collect()
            torch.cuda.empty_cache()
    except PhoenixError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print_table([_cells(row, share) for row in rows if "absent" not in row])
    if options.json is not None:
        record = {"facts": facts(DEVICE, torch.bfloat16), "options": {**vars(options), "json": None}}
        write_json(options.json, record | {"linear_bytes": sizes, "logits_error": differ, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
