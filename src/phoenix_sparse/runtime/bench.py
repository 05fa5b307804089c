"""Measured speed: a model dense against packed, and its linears one by one, in one process and in turns."""

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.models import prunable_linears
from phoenix_sparse.progress import Progress
from phoenix_sparse.runtime.cuda.linear import CudaLinear, prepare
from phoenix_sparse.runtime.cuda.many_rows import Prefill
from phoenix_sparse.runtime.decoding import Decoder
from phoenix_sparse.runtime.head import Head, head_of
from phoenix_sparse.runtime.loading import open_model
from phoenix_sparse.runtime.packed import pack, quantize
from phoenix_sparse.runtime.packing import Values
from phoenix_sparse.runtime.resident import growth
from phoenix_sparse.runtime.sparse_linear import SparseLinear
from phoenix_sparse.settings import Device, Dtype

Work = Callable[[], object]


@dataclass
class Spread:
    """Seconds: the median and the quartiles of repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread":
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0])
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(middle, low, high)

    def rate(self, count: int) -> "Spread":
        """So many things a second."""
        return Spread(count / self.median, count / self.high, count / self.low)


def in_turns(work: Mapping[str, Work], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Time each piece of work once a repeat, in an order that turns round, after one run of each to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for one in work.values():
        one()
    for repeat in range(repeats):
        for name in list(work)[:: 1 if repeat % 2 == 0 else -1]:
            _wait(device)
            start = time.perf_counter()
            work[name]()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    directory: Path,
    *,
    values: Values,
    batches: Sequence[int],
    prompt: int,
    tokens: int,
    repeats: int,
    with_layers: bool,
    threads: int | None,
    dtype: Dtype,
    device: Device,
    prefill: Prefill = "packed",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What `phx bench` shows, of a directory packed or not; on a GPU with what `prefill` keeps (`cuda.many_rows`).

    Returns:
        `weight_bytes` of both forms, `throughput` (see there), `layers` (see there; empty unless asked for), and what
        it was measured on: `dtype`, `values`, `prefill`, `copies` (what was kept for it, while the dense form lay on
        the GPU, too), `threads`, `torch`.

    Raises:
        PhoenixError: the model can't be loaded, has too short a context, or is not sparse enough to be packed; or it
            is packed, and other values are asked for.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    model = open_model(directory, dtype, device)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and prompt + tokens > longest:
        raise PhoenixError(f"bench: {prompt} + {tokens} tokens are more than the model's context of {longest}")
    pair = Pair(model, values, prefill)
    first = next(iter(pair.forms["sparse"].values()))
    return {
        "model": directory.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "values": str(_values(first).dtype).removeprefix("torch."),
        "prefill": prefill,
        "copies": pair.copies,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "weight_bytes": {form: pair.bytes(form) for form in pair.forms},
        "throughput": throughput(
            pair, batches=batches, prompt=prompt, tokens=tokens, repeats=repeats, progress=progress
        ),
        "layers": layers(pair, batches=batches, repeats=max(repeats, 10)) if with_layers else [],
    }


class Pair:
    """One model of which the linears can be swapped: dense, or packed. Both forms are in memory.

    Where packed linears are fused for the GPU's kernels, the dense form is fused likewise.
    """

    def __init__(self, model: Any, values: Values, prefill: Prefill = "packed") -> None:
        """Take a dense model or a packed one.

        Raises:
            PhoenixError: no linear of it is smaller packed, or it is packed, and other values are asked for; or what
                `prefill` names can't be had (`cuda.linear.prepare`).
        """
        self.model = model.eval()
        self.forms: dict[str, dict[str, Any]] = {"dense": {}, "sparse": {}}
        before: dict[str, nn.Linear] = {}
        if not _packed_linears(model):
            before = _pack_linears(model, values)
        elif values != "auto":
            raise PhoenixError(f"bench: {values} values of a model that is packed already; leave auto, or unpack it")
        prepare(model, model.get_input_embeddings().weight.device, prefill)
        for name, module in _packed_linears(model).items():
            self.forms["sparse"][name] = module
            self.forms["dense"][name] = before[name] if name in before else _dense(module)
        if not self.forms["sparse"]:
            raise PhoenixError("bench: no linear of this model is sparse enough to be packed; prune it first")
        self.heads = _heads(model)

    @property
    def copies(self) -> list[str]:
        """What packed linears keep beside their packed form: dense, semi, both, or nothing."""
        layers = [layer for layer in self.forms["sparse"].values() if isinstance(layer, CudaLinear)]
        there = {
            "dense": any(layer.dense_copy is not None for layer in layers),
            "semi": any(layer.semi_structured is not None for layer in layers),
        }
        return [name for name, kept in there.items() if kept]

    @contextmanager
    def as_(self, form: str) -> Iterator[Any]:
        """The model in one form."""
        for name, module in self.forms[form].items():
            _put(self.model, name, module)
        if form in self.heads:
            self.model.set_output_embeddings(self.heads[form])
        yield self.model

    def bytes(self, form: str) -> int:
        """Of all weights in one form; tied ones once."""
        with self.as_(form) as model:
            tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if t.numel()}
        return sum(tensors.values())


def _heads(model: Any) -> dict[str, nn.Linear]:
    """torch's own head for the dense form, and for the sparse one that which packed models are loaded with."""
    head = head_of(model)
    if head is None:
        return {}
    with torch.device("meta"):
        plain = nn.Linear(head.in_features, head.out_features, bias=False)
    plain.weight = head.weight
    return {"dense": plain, "sparse": Head.of(head)}


def _packed_linears(model: nn.Module) -> dict[str, SparseLinear | CudaLinear]:
    return {name: part for name, part in model.named_modules() if isinstance(part, SparseLinear | CudaLinear)}


def _pack_linears(model: nn.Module, values: Values) -> dict[str, nn.Linear]:
    """Put the packed form in the place of every linear that is smaller so; the linears that were there."""
    before = {}
    for name, linear in prunable_linears(model).items():
        packed = pack(linear.weight.bfloat16() if values == "bf16" else linear.weight)
        packed = quantize(packed) if values == "int8" else packed
        if sum(part.nbytes for part in packed.tensors().values()) < linear.weight.nbytes:
            before[name] = linear
            _put(model, name, SparseLinear.of(packed, linear.weight.dtype, linear.bias).to(linear.weight.device))
    return before


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _dense(module: SparseLinear | CudaLinear) -> nn.Linear:
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    weight = module.dense().contiguous()
    linear.weight = nn.Parameter(weight, requires_grad=False)
    bias = module.bias if isinstance(module, SparseLinear) else module.offset
    linear.register_parameter(
        "bias", None if bias is None else nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    )
    return linear


def _values(module: SparseLinear | CudaLinear) -> Tensor:
    return module.compressed if isinstance(module, SparseLinear) else module.values


@torch.inference_mode()
def throughput(
    pair: Pair,
    *,
    batches: Sequence[int],
    prompt: int,
    tokens: int,
    repeats: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Prefill and decode, dense and sparse, by batch size.

    Args:
        pair: the model in both forms.
        batches: sequences at once.
        prompt: tokens of each prompt (random ones: the speed doesn't depend on them).
        tokens: decoded after it, one at a time (see `decoding.Decoder`).
        repeats: of each measurement.
        seed: of the tokens.
        progress: called with (what, done, all).

    Returns:
        A row for each batch: for `prefill` and `decode`, `tokens_per_second` of each form with its quartiles, and the
        ratio sparse / dense (the median over repeats); `captured`, whether a form's step was replayed from a CUDA
        graph; `peak_bytes`, the most memory that a form takes: its weights, and what decoding adds to them on the GPU
        or, where the system tells it, in this process (`resident.growth`; else None).
    """
    device = pair.model.get_input_embeddings().weight.device
    vocabulary, generator = pair.model.config.vocab_size, torch.Generator().manual_seed(seed)
    rows = []
    for number, batch in enumerate(batches):
        ids = torch.randint(0, vocabulary, (batch, prompt), generator=generator).to(device)
        seconds: dict[str, dict[str, list[float]]] = {"prefill": {}, "decode": {}}
        peaks: dict[str, int | None] = {}
        decoders: dict[str, Decoder] = {}
        for form in pair.forms:  # warms up as well
            with pair.as_(form) as model:
                decoders[form], peaks[form] = _first(model, ids, tokens, pair.bytes(form), device)
        for repeat in range(repeats):
            for form in ("dense", "sparse") if repeat % 2 == 0 else ("sparse", "dense"):
                with pair.as_(form):
                    for phase, value in _generate(decoders[form], ids, tokens, device).items():
                        seconds[phase].setdefault(form, []).append(value)
        row: dict[str, Any] = {"batch": batch, "prompt": prompt, "tokens": tokens, "peak_bytes": peaks}
        row["captured"] = {form: decoder.captured for form, decoder in decoders.items()}
        for phase, count in (("prefill", batch * prompt), ("decode", batch * tokens)):
            found = seconds[phase]
            ratios = [dense / sparse for dense, sparse in zip(found["dense"], found["sparse"], strict=True)]
            row[phase] = {
                "tokens_per_second": {form: asdict(Spread.of(found[form]).rate(count)) for form in found},
                "ratio": statistics.median(ratios),
            }
        rows.append(row)
        if progress is not None:
            progress("batch size", number + 1, len(batches))
    return rows


def _first(model: Any, ids: Tensor, tokens: int, weights: int, device: torch.device) -> tuple[Decoder, int | None]:
    """A decoder after its first run, and the most memory that it took with so many bytes of weights."""
    gc.collect()
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    decoder = Decoder(model, len(ids), ids.shape[1] + tokens)
    _generate(decoder, ids, tokens, device)
    if device.type == "cuda":
        return decoder, int(torch.cuda.max_memory_allocated(device)) - before + weights
    decoder = Decoder(model, len(ids), ids.shape[1] + tokens)  # anew: weights that were read first aren't growth
    grown = growth(lambda: _generate(decoder, ids, tokens, device))
    return decoder, None if grown is None else grown + weights


def _generate(decoder: Decoder, ids: Tensor, tokens: int, device: torch.device) -> dict[str, float]:
    gc.collect()
    _wait(device)
    start = time.perf_counter()
    decoder.prefill(ids)
    _wait(device)
    middle = time.perf_counter()
    decoder.advance(tokens)
    _wait(device)
    return {"prefill": middle - start, "decode": time.perf_counter() - middle}


@torch.inference_mode()
def layers(pair: Pair, *, batches: Sequence[int], repeats: int, seed: int = 0) -> list[dict[str, Any]]:
    """Each shape of linear by itself, against torch's dense product in the model's dtype, in float32 and in int8.

    Weights of all layers of a shape take turns, so that no cache holds them between two repeats.

    Returns:
        A row for each shape and batch: seconds of each kind, the bytes of weights that it reads, and
        `bandwidth_share`: those bytes a second over the bandwidth that was measured beside it.
    """
    device = pair.model.get_input_embeddings().weight.device
    bandwidth = measure_bandwidth(device)
    by_shape: dict[tuple[int, int], list[str]] = {}
    for name, module in pair.forms["sparse"].items():
        by_shape.setdefault((module.out_features, module.in_features), []).append(name)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for (out, inner), names in by_shape.items():
        kinds = _kinds(pair, names)
        for batch in batches:
            x = torch.randn(batch, inner, generator=generator).to(device, pair.model.dtype)
            work = {kind: _taking_turns(functions, x) for kind, (functions, _) in kinds.items()}
            seconds = in_turns(work, repeats, device)
            rows.append(
                {
                    "shape": [out, inner],
                    "layers": len(names),
                    "batch": batch,
                    "bandwidth": bandwidth,
                    "kinds": {
                        kind: {
                            "seconds": asdict(Spread.of(seconds[kind])),
                            "weight_bytes": size,
                            "bandwidth_share": size / statistics.median(seconds[kind]) / bandwidth,
                        }
                        for kind, (_, size) in kinds.items()
                    },
                }
            )
    return rows


Linears = list[Callable[[Tensor], Tensor]]


def _kinds(pair: Pair, names: list[str]) -> dict[str, tuple[Linears, int]]:
    """The layers of one shape in each kind, and the bytes of one."""
    sparse, dense = ([pair.forms[form][name] for name in names] for form in ("sparse", "dense"))
    size = sparse[0].nbytes
    kinds: dict[str, tuple[Linears, int]] = {"sparse": (list(sparse), size)}
    weight: Tensor = dense[0].weight
    kinds[f"torch {str(weight.dtype).removeprefix('torch.')}"] = (list(dense), weight.nbytes)
    if weight.dtype != torch.float32:
        wide: Linears = [_product(layer.weight.float()) for layer in dense]
        kinds["torch float32"] = (wide, weight.numel() * 4)
    if weight.device.type == "cpu":
        kinds["torch int8"] = ([_int8(layer) for layer in dense], weight.numel())
    return kinds


def _product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: nn.functional.linear(x.float(), weight)


def _int8(linear: Any) -> Callable[[Tensor], Tensor]:
    """torch's weight-only int8: one scale a row, activations quantized as they come."""
    plain = nn.Linear(linear.in_features, linear.out_features, bias=False)
    plain.weight = nn.Parameter(linear.weight.float(), requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated for years, and still torch's int8 linear
        quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(plain), {nn.Linear}, dtype=torch.qint8)
    return lambda x: quantized(x.float())


def _taking_turns(functions: Linears, x: Tensor) -> Work:
    position = 0

    def work() -> Tensor:
        nonlocal position
        position = (position + 1) % len(functions)
        return functions[position](x)

    return work


def measure_bandwidth(device: torch.device, size: int = 2**28) -> float:
    """Bytes a second of reading memory: the best of some sums over a buffer of 256 MiB that no cache holds."""
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    seconds = in_turns({"read": lambda: buffer.sum()}, 7, device)["read"]
    return size / min(seconds)
