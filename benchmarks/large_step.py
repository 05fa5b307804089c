"""A training step of Llama-3-8B's shape, random weights, half of them pruned: ours, PEFT's LoRA, and two products.

    PYTHONPATH=src python benchmarks/large_step.py --json large_step.json

Forward, backward and AdamW of one batch with gradient checkpointing, bfloat16, adapters in float32. The ways of
training take turns on one model, whose adapters are taken off in between. `two products` is SQFT's form,
x·Wᵀ + x·(M⊙s·BA)ᵀ; as its authors do, it multiplies a mask of bytes.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from measuring import RANK, SCALE, SEED, SPARSITY, facts, llama_config, print_table
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional

from phoenix_sparse.errors import CheckFailed, PhoenixError
from phoenix_sparse.files import write_json
from phoenix_sparse.finetuning.adapter import add_adapter, elastic_layers
from phoenix_sparse.finetuning.elastic_linear import ElasticLinear
from phoenix_sparse.models import prunable_linears

WAYS = {"ours": "Phoenix, masked", "lora": "PEFT LoRA (autocast)", "two_products": "masked, two products (SQFT)"}


def make_model(layers: int, width: int) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(llama_config(layers, width), dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in prunable_linears(model).values():
            layer.weight.mul_(torch.rand(layer.weight.shape, device="cuda") >= SPARSITY)
    model.config.use_cache = False
    return model.train()


def two_products(layer: Any, mask: Tensor) -> Any:
    """The forward pass of a layer in SQFT's form."""

    def forward(x: Tensor, *_: Any) -> Tensor:
        a, b = layer.factors()
        base = layer.get_base_layer()
        update = (b.to(x.dtype) @ a.to(x.dtype)) * SCALE * mask
        return base(x) + functional.linear(x, update)

    return forward


@contextmanager
def adapted(model: Any, way: str) -> Iterator[Any]:
    """The model with one way's adapter on."""
    if way == "lora":
        names = sorted({name.rsplit(".", 1)[-1] for name in prunable_linears(model)})
        config = LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules=names, task_type="CAUSAL_LM")
        peft = get_peft_model(model, config)
    else:
        peft = add_adapter(model, rank=RANK, scale=SCALE, masks=None, seed=SEED)
        for layer in elastic_layers(peft).values():
            mask = layer.weight != 0
            if way == "ours":
                layer.set_mask(mask)
            else:
                layer.forward = two_products(layer, mask)
    peft.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    peft.enable_input_require_grads()
    yield peft
    for layer in elastic_layers(peft).values() if way != "lora" else ():
        layer.__dict__.pop("forward", None)
    peft.disable_input_require_grads()
    peft.unload()
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def steps(model: Any, way: str, tokens: Tensor, repeats: int) -> tuple[list[float], int]:
    """Seconds of each step, and the most memory that a step holds, the model included."""
    with adapted(model, way) as peft:
        optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-4, fused=True)
        seconds = []
        for repeat in range(repeats + 2):
            if repeat == 1:
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.autocast("cuda", dtype=torch.bfloat16) if way == "lora" else nullcontext():
                loss = peft(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        if not torch.isfinite(loss):
            raise CheckFailed(f"{way}: the loss is not finite")
        peak = torch.cuda.max_memory_allocated()
        if way == "ours":
            check_zeros(peft)
    torch.cuda.empty_cache()
    return seconds[2:], peak


def check_zeros(peft: Any) -> None:
    layers: list[ElasticLinear] = list(elastic_layers(peft).values())
    for layer in layers:
        if (layer.merged_weight()[layer.weight == 0] != 0).any():
            raise CheckFailed("ours: a zero was not kept")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=4, help="timed steps of a way in a round")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise PhoenixError("large_step: there is no GPU; run it where one is")
    model = make_model(args.layers, args.width)
    generator = torch.Generator("cuda").manual_seed(SEED)
    tokens = torch.randint(128256, (args.batch, args.length), generator=generator, device="cuda")
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks: dict[str, int] = {}
    for number in range(args.rounds):
        for way in list(WAYS) if number % 2 == 0 else list(WAYS)[::-1]:
            found, peaks[way] = steps(model, way, tokens, args.repeats)
            seconds[way] += found
            print(f"{way}: {statistics.median(found):.3f} s, {peaks[way] / 2**30:.1f} GiB", flush=True)
    slowest = statistics.median(seconds["two_products"])
    rows = []
    for way, name in WAYS.items():
        low, middle, high = statistics.quantiles(seconds[way], n=4, method="inclusive")
        rows.append(
            {
                "way": name,
                "s a step [quartiles]": f"{middle:.3f} [{low:.3f}-{high:.3f}]",
                "tokens/s": f"{args.batch * args.length / middle:.0f}",
                "two products / it": f"{slowest / middle:.2f}",
                "peak GiB": f"{peaks[way] / 2**30:.1f}",
            }
        )
    print_table(rows)
    if args.json:
        write_json(
            args.json,
            facts(torch.device("cuda"), torch.bfloat16) | {"seconds": seconds, "peak_bytes": peaks, "rows": rows},
        )


if __name__ == "__main__":
    try:
        main()
    except PhoenixError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
