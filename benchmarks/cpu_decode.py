"""A whole model on the CPU, token by token: torch's dense bfloat16, packed linears, and OpenVINO, in one process.

    PYTHONPATH=src python benchmarks/cpu_decode.py MODEL --write
    optimum-cli export openvino --model MODEL --task text-generation-with-past --weight-format fp16 IR
    OMP_NUM_THREADS=1 PYTHONPATH=src python benchmarks/cpu_decode.py MODEL --openvino IR --json cpu_decode.json

--write makes a model of Llama-3.2-1B's shape with random weights, some of each linear's zero. OpenVINO is measured if
--openvino names exports of it (needs `pip install openvino`; `optimum-intel[openvino]`, which exports, may live in an
environment of its own). It computes in bfloat16, which is checked in the compiled graph, with a stateful cache of keys
and values, and like the others it makes logits of a prompt's last position alone.

Before anything is timed, the logits of each variant are compared with float32: after a prompt, and after each of some
given tokens more. Then variants take turns: a prompt, and tokens decoded greedily after it. All weights lie on huge
pages.
"""

import argparse
import os
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from measuring import SEED, facts, insist_on_huge_pages, print_table, summary
from openvino_model import in_openvino, openvino_version
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import atomic_path, write_json
from phoenix_sparse.models import load_config, load_model, prunable_linears
from phoenix_sparse.runtime.bench import Pair
from phoenix_sparse.runtime.decoding import Choose, Decoder
from phoenix_sparse.runtime.kernels.library import library
from phoenix_sparse.runtime.kernels.placing import place

CPU = torch.device("cpu")
TORCH, OPENVINO = "torch bf16", "OpenVINO"
LIKE = 0.1  # relative error of logits against float32: bfloat16 through all layers, or int8 weights
FOLLOWED = 32  # tokens that are given after the prompt when logits are compared


class Variant(Protocol):
    """What a variant can do, as `Decoder` does it."""

    def prefill(self, ids: Tensor, choose: Choose | None = None) -> Tensor: ...

    def advance(self, steps: int, choose: Choose | None = None) -> None: ...


class InTorch:
    """A form of a model in torch."""

    def __init__(self, pair: Pair, form: str, length: int) -> None:
        self.pair, self.form = pair, form
        self.decoder = Decoder(pair.model, 1, length)

    def prefill(self, ids: Tensor, choose: Choose | None = None) -> Tensor:
        with self.pair.as_(self.form):
            return self.decoder.prefill(ids, choose)

    def advance(self, steps: int, choose: Choose | None = None) -> None:
        with self.pair.as_(self.form):
            self.decoder.advance(steps, choose)


def write_model(directory: Path, sparsity: float) -> None:
    """A model of Llama-3.2-1B's shape, random weights, a random part of every linear's zero."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters=rope | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        bos_token_id=128000,
        eos_token_id=128001,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(SEED)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for linear in prunable_linears(model).values():
            linear.weight.masked_fill_(torch.rand(linear.weight.shape) < sparsity, 0.0)
    with atomic_path(directory) as temporary:
        model.save_pretrained(temporary)


@torch.inference_mode()
def exact_logits(directory: Path, ids: Tensor, prompt: int) -> Tensor:
    """Logits (tokens after the prompt + 1, vocabulary) in float32."""
    model = load_model(directory, "float32", "cpu")
    logits: Tensor = model(ids, logits_to_keep=ids.shape[1] - prompt + 1, use_cache=False).logits[0]
    return logits


def follow(variant: Variant, ids: Tensor, prompt: int) -> Tensor:
    """The same of a variant, given all tokens after the prompt one by one."""
    found: list[Tensor] = []

    def choose(logits: Tensor) -> Tensor:
        found.append(logits[0].float().clone())
        return ids[:, min(prompt + len(found), ids.shape[1]) - 1]

    variant.prefill(ids[:, :prompt], choose)
    variant.advance(ids.shape[1] - prompt, choose)
    return torch.stack(found)


def compare(name: str, found: Tensor, exact: Tensor) -> dict[str, float]:
    """Relative error, and the share of positions where the likeliest token is the same.

    Raises:
        PhoenixError: the logits are others.
    """
    error = float((found - exact).norm() / exact.norm())
    if not error <= LIKE:
        raise PhoenixError(f"{name}: logits differ from float32's by {error:.1%}; that is no rounding")
    return {"error": error, "same": float((found.argmax(-1) == exact.argmax(-1)).double().mean())}


def in_torch(directory: Path, length: int) -> dict[str, Variant]:
    """The dense form and the packed ones, in one model."""
    model = load_model(directory, "bfloat16", "cpu")
    for parameter in model.parameters():
        parameter.data = place(parameter.data)
    pairs: dict[str, Pair] = {}
    for values in ("bf16", "int8"):
        pairs[values] = Pair(model, values)
        with pairs[values].as_("dense"):  # which the next one packs
            pass
    packed = {f"packed {values}": InTorch(pair, "sparse", length) for values, pair in pairs.items()}
    return {TORCH: InTorch(pairs["bf16"], "dense", length), **packed}


def measure(
    variants: Mapping[str, Variant], ids: Tensor, tokens: int, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of a prompt and of decoding, by phase and variant: [repeats], the same index being the same repeat."""
    seconds: dict[str, dict[str, list[float]]] = {
        phase: {name: [] for name in variants} for phase in ("prefill", "decode")
    }
    for repeat in range(-1, repeats):  # one to warm up
        for name in list(variants)[:: 1 if repeat % 2 == 0 else -1]:
            start = time.perf_counter()
            variants[name].prefill(ids)
            middle = time.perf_counter()
            variants[name].advance(tokens)
            end = time.perf_counter()
            if repeat >= 0:
                seconds["prefill"][name].append(middle - start)
                seconds["decode"][name].append(end - middle)
    return seconds


def rows_of(seconds: Mapping[str, list[float]], count: int) -> list[dict[str, Any]]:
    """Tokens a second of each variant, and its speed in units of the fastest dense bfloat16's and of torch's."""
    dense = [name for name in seconds if name == TORCH or name.startswith(f"{OPENVINO} bf16")]
    best = min(dense, key=lambda name: statistics.median(seconds[name]))
    rows = []
    for name, found in seconds.items():
        one = summary(found, {"best": seconds[best], "torch": seconds[TORCH]})
        rows.append(
            {"variant": name, "best_dense": name == best, "seconds": found}
            | {"tokens_per_second": count / one["seconds"]}
            | {"low": count / one["seconds_q3"], "high": count / one["seconds_q1"]}
            | {"of_best": 1 / one["ratio_best"], "of_torch": 1 / one["ratio_torch"]}
        )
    return rows


def _cells(row: dict[str, Any], logits: Mapping[str, float]) -> dict[str, str]:
    return {
        "variant": row["variant"],
        "tokens/s [quartiles]": f"{row['tokens_per_second']:.2f} [{row['low']:.2f}-{row['high']:.2f}]",
        "x torch bf16": f"{row['of_torch']:.2f}",
        "x best dense": f"{row['of_best']:.2f}" + (" (best)" if row["best_dense"] else ""),
        "logits' error": f"{logits['error']:.2%}",
        "same token": f"{logits['same']:.0%}",
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a dense model with zeros in its linears, or where to write one")
    parser.add_argument("--write", action="store_true", help="write the model, and do nothing else")
    parser.add_argument("--sparsity", type=float, default=0.5, help="of the model that is written")
    parser.add_argument("--openvino", type=Path, nargs="+", default=[], metavar="IR", help="exports of the model")
    parser.add_argument("--cache", nargs="+", default=["bf16"], help="OpenVINO's types of keys and values, or default")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    return parser.parse_args()


def main() -> None:
    options = _arguments()
    least = min(options.prompt, options.tokens, options.repeats - 1, *options.threads)
    if not 0 <= options.sparsity < 1 or least < 1:
        raise PhoenixError("--sparsity is from 0 to below 1; prompt, tokens and threads are 1 or more, repeats 2")
    if options.write:
        if options.model.exists():
            raise PhoenixError(f"--write: {options.model} exists; name a new directory")
        write_model(options.model, options.sparsity)
        return
    compiled = library()
    if compiled is None:
        raise PhoenixError("the CPU kernels are not built, so there is nothing to compare")
    versions = {"openvino": openvino_version(options.openvino)} if options.openvino else {}
    torch.set_num_threads(max(options.threads))
    vocabulary, generator = load_config(options.model).vocab_size, torch.Generator().manual_seed(SEED)
    ids = torch.randint(vocabulary, (1, options.prompt + FOLLOWED), generator=generator)
    exact = exact_logits(options.model, ids, options.prompt)
    models = in_torch(options.model, options.prompt + max(options.tokens, FOLLOWED))
    settings = {name: getattr(options, name) for name in ("cache", "threads", "prompt", "tokens", "repeats")}
    record = facts(CPU, torch.bfloat16) | {"kernels": compiled.describe(), "options": settings, "rows": []}
    record["versions"] |= versions
    print(f"{record['hardware']}; {record['kernels']}")
    print(", ".join(f"{name} {number}" for name, number in record["versions"].items()))
    print(f"{record['date']}, commit {record['commit'] or 'unknown'}")
    for threads in options.threads:
        torch.set_num_threads(threads)
        variants = models | in_openvino(options.openvino, threads, options.cache)
        logits = {name: compare(name, follow(one, ids, options.prompt), exact) for name, one in variants.items()}
        load = os.getloadavg()[0]
        seconds = measure(variants, ids[:, : options.prompt], options.tokens, options.repeats)
        for phase, count in (("prefill", options.prompt), ("decode", options.tokens)):
            rows = rows_of(seconds[phase], count)
            print(f"\n{phase}, {count} tokens, batch 1, threads: {threads}; load average {load:.1f}")
            print_table([_cells(row, logits[row["variant"]]) for row in rows])
            both = {"phase": phase, "threads": threads, "load_average": load}
            record["rows"] += [both | row | {"logits": logits[row["variant"]]} for row in rows]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(f"\nmost memory of this process so far: {peak / 2**30:.1f} GiB", flush=True)
        if options.json is not None:
            write_json(options.json, record)


if __name__ == "__main__":
    insist_on_huge_pages()
    try:
        main()
    except PhoenixError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
