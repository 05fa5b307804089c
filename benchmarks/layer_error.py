"""How much of a linear's output is lost by pruning: Wanda, DSnoT, SparseGPT and ALPS on a real model's inputs.

    PYTHONPATH=src python benchmarks/layer_error.py --model DIR --text FILE --json layer_error.json

The error is ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² on the inputs X of the dense model: those that the methods were given, and those of
as many other passages of the text, drawn anew. A weight update fits the first and is there for the second.

Without a model, `--shape 14336x4096` times the methods on random weights and correlated random inputs.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import SEED, facts, print_table
from torch import Tensor, nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import write_json
from phoenix_sparse.models import decoder_blocks, find_device, linears, load_model, load_tokenizer
from phoenix_sparse.pruning.calibration import calibration_tokens
from phoenix_sparse.pruning.importance import wanda_importance
from phoenix_sparse.pruning.patterns import Pattern, parse_pattern
from phoenix_sparse.pruning.reconstruction.alps import alps
from phoenix_sparse.pruning.reconstruction.dsnot import dsnot
from phoenix_sparse.pruning.reconstruction.gram import Gram, relative_error
from phoenix_sparse.pruning.reconstruction.moments import Moments
from phoenix_sparse.pruning.reconstruction.sparsegpt import sparsegpt
from phoenix_sparse.pruning.selection import keep
from phoenix_sparse.pruning.settings import CalibrationSettings

KINDS = ("q_proj", "up_proj", "down_proj")
TARGETS = ("50%", "60%", "70%", "80%", "2:4")


@dataclass
class Layer:
    """A linear's weight and what was seen of its inputs, twice."""

    name: str
    weight: Tensor
    gram: Gram
    moments: Moments
    unseen: Gram


def _wanda(layer: Layer, sparsity: float, pattern: Pattern) -> Tensor:
    return keep(wanda_importance(layer.weight, layer.moments.squared_norm.sqrt()), sparsity, "row", pattern)


def methods(damp: float) -> dict[str, Callable[[Layer, float, Pattern], Tensor]]:
    """Each gives a layer's new weight."""
    return {
        "Wanda": lambda layer, sparsity, pattern: layer.weight * _wanda(layer, sparsity, pattern),
        "DSnoT": lambda layer, sparsity, pattern: (
            layer.weight * dsnot(layer.weight, _wanda(layer, sparsity, pattern), layer.moments, pattern=pattern)
        ),
        "SparseGPT": lambda layer, sparsity, pattern: sparsegpt(
            layer.weight, layer.gram.matrix, sparsity, pattern, damp=damp, name=layer.name
        )[0],
        "ALPS": lambda layer, sparsity, pattern: alps(
            layer.weight, layer.gram.matrix, sparsity, pattern, damp=damp, name=layer.name
        )[0],
    }


def read_layers(arguments: argparse.Namespace, device: torch.device) -> list[Layer]:
    """The chosen linears of the chosen blocks, with their inputs on two draws of passages."""
    model = load_model(arguments.model, dtype="float32", device=arguments.device)
    tokenizer = load_tokenizer(arguments.model)
    blocks = list(decoder_blocks(model).items())
    numbers = arguments.blocks or sorted({0, len(blocks) // 2, len(blocks) - 1})
    if max(numbers) >= len(blocks):
        raise PhoenixError(f"--blocks: {max(numbers)} is not among the model's blocks, 0 to {len(blocks) - 1}")
    found = {
        name: linear for number in numbers for name, linear in linears(blocks[number][1], blocks[number][0]).items()
    }
    chosen = {name: linear for name, linear in found.items() if name.rsplit(".", 1)[1] in arguments.linears}
    if not chosen:
        raise PhoenixError(
            f"--linears: the model's blocks have {', '.join(sorted({n.rsplit('.', 1)[1] for n in found}))}"
        )
    # The first half of the passages is for the methods; what the second does to them is only measured.
    settings = CalibrationSettings(
        source="text", text=arguments.text, samples=2 * arguments.samples, length=arguments.length
    )
    length = model.config.max_position_embeddings
    tokens = calibration_tokens(settings, [], tokenizer, max_length=length, seed=SEED)
    layers = {}
    for name, linear in chosen.items():
        tools = (
            Gram(linear.in_features, device),
            Moments(linear.in_features, device),
            Gram(linear.in_features, device),
        )
        layers[name] = Layer(name, linear.weight.detach(), *tools)
    _observe(model, chosen, tokens[: arguments.samples], {n: (one.gram, one.moments) for n, one in layers.items()})
    _observe(model, chosen, tokens[arguments.samples :], {n: (one.unseen,) for n, one in layers.items()})
    return list(layers.values())


@torch.no_grad()
def _observe(
    model: Any, chosen: Mapping[str, nn.Linear], tokens: Tensor, observers: Mapping[str, Iterable[Gram | Moments]]
) -> None:
    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            for observer in observers[name]:
                observer.add(inputs[0])

        return hook

    hooks = [linear.register_forward_pre_hook(observe(name)) for name, linear in chosen.items()]
    for row in tokens:
        model(row[None].to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()


def random_layers(shapes: Iterable[tuple[int, int]], tokens: int, device: torch.device) -> Iterator[Layer]:
    """Normal weights; inputs of a falling spectrum, of unlike sizes and not around zero, as a language model's."""
    for out, columns in shapes:
        generator = torch.Generator(device).manual_seed(SEED)
        layer = Layer(
            f"random {out}x{columns}",
            torch.randn(out, columns, generator=generator, device=device) / columns**0.5,
            *(Gram(columns, device), Moments(columns, device), Gram(columns, device)),
        )
        mixing = torch.randn(columns, columns, generator=generator, device=device)
        mixing *= torch.arange(1, columns + 1, device=device)[:, None] ** -0.5
        sizes, centre = torch.randn(2, columns, generator=generator, device=device)
        for observers in ((layer.gram, layer.moments), (layer.unseen,)):
            for start in range(0, tokens, 2048):
                drawn = torch.randn(min(2048, tokens - start), columns, generator=generator, device=device)
                inputs = (drawn @ mixing + centre) * sizes.exp()
                for observer in observers:
                    observer.add(inputs)
        yield layer


def measure(layer: Layer, targets: Iterable[str], chosen: Iterable[str], damp: float) -> list[dict[str, Any]]:
    """Prune one layer by each method to each target."""
    rows = []
    for target in targets:
        pattern = parse_pattern(target if ":" in target else "unstructured")
        sparsity = 1 - pattern.first / pattern.second if ":" in target else float(target.rstrip("%")) / 100
        for method, function in methods(damp).items():
            if method not in chosen:
                continue
            held = _reset_peak(layer.weight.device)
            start = _now(layer.weight.device)
            new_weight = function(layer, sparsity, pattern)
            seconds = _now(layer.weight.device) - start
            memory = torch.cuda.max_memory_allocated() - held if layer.weight.is_cuda else None
            rows.append(
                {
                    "layer": layer.name,
                    "method": method,
                    "target": target,
                    "error": relative_error(layer.weight, new_weight, layer.gram.matrix),
                    "error_unseen": relative_error(layer.weight, new_weight, layer.unseen.matrix),
                    "seconds": seconds,
                    "memory_bytes": memory,
                    "zeros": float((new_weight == 0).float().mean()),
                }
            )
    return rows


def _reset_peak(device: torch.device) -> int:
    """Count the GPU's peak memory from here; what is held now."""
    if device.type == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def print_kind(kind: str, rows: list[dict[str, Any]]) -> None:
    """Means over the layers of one kind: errors on seen and on unseen inputs."""
    layers, targets = {row["layer"] for row in rows}, list(dict.fromkeys(row["target"] for row in rows))
    print(f"\n{kind}, mean of {len(layers)}: error on the inputs given | on others")
    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        cells = {"method": method}
        for target in targets:
            seen, unseen = (
                sum(row[key] for row in mine if row["target"] == target) / len(layers)
                for key in ("error", "error_unseen")
            )
            cells[target] = f"{seen:.4f} | {unseen:.4f}"
        cells["s a layer"] = f"{sum(row['seconds'] for row in mine) / len(mine):.2f}"
        if mine[0]["memory_bytes"] is not None:
            cells["GiB"] = f"{max(row['memory_bytes'] for row in mine) / 2**30:.1f}"
        table.append(cells)
    print_table(table)


def _shape(text: str) -> tuple[int, int]:
    out, inner = text.split("x")
    return int(out), int(inner)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare what pruning methods lose of a linear's output.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, metavar="DIR", help="a Llama-like Hugging Face directory")
    source.add_argument("--shape", type=_shape, nargs="+", metavar="OUTxIN", help="random layers instead of a model's")
    parser.add_argument("--text", type=Path, metavar="FILE", help="calibration text, for --model")
    parser.add_argument("--samples", type=int, default=16, help="passages; as many again are for the unseen error")
    parser.add_argument("--length", type=int, default=512, help="tokens a passage")
    parser.add_argument("--linears", nargs="+", default=KINDS, help="kinds of linears")
    parser.add_argument("--blocks", type=int, nargs="+", help="decoder blocks; first, middle and last unless given")
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="sparsities, 50%%, and patterns, 2:4")
    parser.add_argument("--methods", nargs="+", default=list(methods(0)), choices=list(methods(0)))
    parser.add_argument("--damp", type=float, default=0.01, help="of SparseGPT and ALPS, a share of the mean diagonal")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's own choice unless given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    if arguments.model and not arguments.text:
        raise PhoenixError("--text: a model's inputs need a text; give a text file")
    device = find_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    tokens = arguments.samples * arguments.length
    source = str(arguments.model.name) if arguments.model else "random layers"
    record = facts(device, torch.float32) | {"source": source, "tokens": tokens, "damp": arguments.damp, "rows": []}
    print(f"{record['hardware']}; torch {record['versions']['torch']}; {record['date']}, commit {record['commit']}")
    print(f"{source}; {tokens} tokens given, as many not; damping {arguments.damp:g}")
    layers = read_layers(arguments, device) if arguments.model else random_layers(arguments.shape, tokens, device)
    for layer in layers:
        record["rows"] += measure(layer, arguments.targets, arguments.methods, arguments.damp)
        if arguments.json:
            write_json(arguments.json, record)
    kinds = dict.fromkeys(row["layer"].rsplit(".", 1)[-1] for row in record["rows"])
    for kind in kinds:
        print_kind(kind, [row for row in record["rows"] if row["layer"].rsplit(".", 1)[-1] == kind])


if __name__ == "__main__":
    try:
        main()
    except PhoenixError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
