"""Products with many rows of x on the GPU, and prefill: dense against what packed linears keep, in one process.

    PYTHONPATH=src python benchmarks/gpu_prefill.py --json gpu_prefill.json

First single linears, 2:4 of random weights: cuBLAS (`dense`); W expanded for each product (`expand`, with its expansion
alone beside it); cuSPARSELt as Phoenix uses it, with the algorithm that its search finds for 2048 rows (`semi`), and
with the one that it finds for these rows (`searched`). Launches wait in the queue behind a pause, so that their times
are without the host's, which stands beside them (`host`). Each launch takes another copy of the weights, of which so
many take turns that none is still in the level-2 cache.

Then layers of Llama-3-8B's shape with 2:4 weights: prompts through the model as transformers has it, and with packed
linears by each choice of `prefill`; once as the host launches it, and once behind a pause: the GPU alone. Results are
compared with the dense ones before anything is timed.
"""

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_decode import LIKE, packed_of
from gpu_sparse import COLD, SHAPES
from measuring import SEED, facts, llama_config, print_table
from torch import Tensor

from phoenix_sparse.errors import PhoenixError, first_line
from phoenix_sparse.files import write_json
from phoenix_sparse.models import prunable_linears
from phoenix_sparse.runtime.cuda import many_rows, semi_structured
from phoenix_sparse.runtime.cuda.forms import expand, form_of, numbers_of, parts_of
from phoenix_sparse.runtime.cuda.linear import VARIABLE, CudaLinear, prepare
from phoenix_sparse.runtime.decoding import Decoder
from phoenix_sparse.runtime.sparse_linear import SparseLinear

DEVICE = torch.device("cuda")
ROWS = [64, 128, 256, 512, 1024, 2048, 4096, 8192]
CHOICES = ("packed", "dense", "semi", "auto")
TURNS = 4  # prompts in a row of one choice; the first isn't timed
MOST, LONG = 48, 4e-3  # launches that are timed together: so many, or as many as take so many seconds
LONGEST = 0.01  # seconds of a pause
CYCLES = 2e9  # of a pause of a second, or somewhat more of it
CLOSE = 1e-2  # relative error of a product against cuBLAS's

Launch = Callable[[], object]


def _pause(seconds: float) -> None:
    torch.cuda._sleep(int(seconds * CYCLES))


def timed(work: Launch, pause: float) -> tuple[float, float]:
    """Seconds of the GPU, and of the host until all is launched, behind a pause of so many seconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    _pause(pause)
    start.record()
    begun = time.perf_counter()
    work()
    host = time.perf_counter() - begun
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, host


def microseconds(launches: Sequence[Launch], repeats: int) -> tuple[float, float]:
    """Of one launch, on the GPU and on the host: medians."""

    def run(count: int) -> None:
        for number in range(count):
            launches[number % len(launches)]()

    run(len(launches))
    seconds, host = timed(lambda: run(len(launches)), 1e-3)
    count = max(len(launches), min(MOST, int(LONG * len(launches) / seconds)))
    pause = min(2 * host * count / len(launches) + 2e-4, LONGEST)
    found = [timed(lambda: run(count), pause) for _ in range(repeats)]
    return tuple(statistics.median(part) * 1e6 / count for part in zip(*found, strict=True))  # type: ignore[return-value]


def two_four(out: int, columns: int) -> Tensor:
    """Where a random 2:4 matrix keeps its weights."""
    return (torch.rand(out, columns // 4, 4, device=DEVICE).argsort(-1).argsort(-1) < 2).view(out, columns)


class Searches:
    """Algorithms by cuSPARSELt's search, as long as there is time for it."""

    def __init__(self, seconds: float) -> None:
        self.left, self.why = seconds, "there was no time"

    def __call__(self, x: Tensor, compressed: Tensor, out: int) -> semi_structured.Algorithm | None:
        if self.left <= 0:
            return None
        start = time.perf_counter()
        try:
            return semi_structured.search(x, compressed, out)
        except (PhoenixError, RuntimeError) as error:  # a figure that is missing, not an end
            self.left, self.why = 0.0, first_line(error)
            return None
        finally:
            self.left -= time.perf_counter() - start


def _variants(
    weights: dict[str, list[Any]], x: Tensor, best: semi_structured.Algorithm | None
) -> dict[str, list[Launch]]:
    """Launches of each way to multiply, one for each copy of the weights."""
    linear, out = torch.nn.functional.linear, len(weights["dense"][0])
    ways: dict[str, tuple[str, Callable[[Any], Tensor]]] = {
        "dense": ("dense", lambda w: linear(x, w)),
        "expand": ("forms", lambda form: linear(x, expand(form))),
        "semi": ("compressed", lambda c: semi_structured.multiply(x, c, out)),
    }
    if best is not None:
        ways["searched"] = ("compressed", lambda c: semi_structured.multiply(x, c, out, None, best))
    return {name: [lambda w=w, way=way: way(w) for w in weights[kind]] for name, (kind, way) in ways.items()}


def measure_linear(
    out: int, columns: int, rows: list[int], repeats: int, searches: Searches, dtype: torch.dtype = torch.bfloat16
) -> list[dict[str, Any]]:
    """A row for each number of rows of x.

    Raises:
        PhoenixError: a product differs from cuBLAS's.
    """
    kept = two_four(out, columns)
    weight = torch.where(kept, torch.randn(out, columns, device=DEVICE), 0.0).to(dtype)
    form = CudaLinear.of(SparseLinear.of(packed_of(weight, kept), dtype)).form
    compressed = semi_structured.compress(weight)

    def copies(size: int) -> range:
        return range(max(2, -(-COLD // size)))

    numbers, parts = numbers_of(form), [getattr(form, name) for name in parts_of(type(form))]
    weights: dict[str, list[Any]] = {
        "dense": [weight.clone() for _ in copies(weight.nbytes)],
        "forms": [form_of(numbers, [part.clone() for part in parts]) for _ in copies(form.nbytes)],
        "compressed": [compressed.clone() for _ in copies(compressed.nbytes)],
    }
    torch.cuda.synchronize()  # kernels begin to read weights before what runs ahead of them has ended
    unpacked = microseconds([lambda f=f: expand(f) for f in weights["forms"]], repeats)[0]
    common = semi_structured.settle(weight, compressed, None)
    found = []
    for count in rows:
        x = torch.randn(count, columns, device=DEVICE).to(dtype)
        best = searches(x, compressed, out)
        variants = _variants(weights, x, best)
        times, hosts, absent = {}, {}, {}
        exact = variants["dense"][0]()
        for name, launches in variants.items():
            try:
                y: Any = launches[0]()
            except (PhoenixError, RuntimeError) as error:
                if name in ("dense", "expand"):
                    raise
                absent[name] = first_line(error)  # a figure that is missing, not an end
                print(f"{out}x{columns}, {count} rows: {name} is absent ({absent[name]})", flush=True)
                continue
            differs = float((y.float() - exact).norm() / exact.float().norm())
            if not differs <= CLOSE:
                raise PhoenixError(f"gpu_prefill: {out}x{columns}, {count} rows: {name} differs by {differs:.1%}")
            del y
            times[name], hosts[name] = microseconds(launches, repeats)
        del exact, variants
        row = {"shape": f"{out}x{columns}", "rows": count, "microseconds": times, "host": hosts, "absent": absent}
        row |= {"expand_alone": unpacked, "algorithms": {"semi": common, "searched": best}}
        row["factors"] = {name: times["dense"] / value for name, value in times.items()}
        found.append(row)
        print(_cells(row), flush=True)
    return found


def _cells(row: dict[str, Any]) -> dict[str, str]:
    names = ("dense", "expand", "semi", "searched")
    cells = {"shape": row["shape"], "rows": str(row["rows"])}
    for name in names:
        value, factor = row["microseconds"].get(name), row["factors"].get(name)
        cells[name] = "-" if value is None else f"{value:.1f}" + ("" if name == "dense" else f" ({factor:.2f})")
    cells["expand alone"] = f"{row['expand_alone']:.1f}"
    cells["host: dense, semi"] = ", ".join(f"{row['host'].get(name, float('nan')):.0f}" for name in ("dense", "semi"))
    return cells


def crossovers(rows: list[dict[str, Any]], way: str, factor: float, other: str = "dense") -> dict[str, int | None]:
    """For each shape the fewest rows of x from which on a way is at least so many times as fast as another."""
    found: dict[str, int | None] = {}
    for shape in {row["shape"]: None for row in rows}:
        of_shape = sorted((row for row in rows if row["shape"] == shape), key=lambda row: row["rows"])
        found[shape] = None
        for row in reversed(of_shape):
            times = row["microseconds"]
            if way not in times or not times[other] / times[way] >= factor:
                break
            found[shape] = row["rows"]
    return found


def can_record(compressed: Tensor, out: int, columns: int) -> str:
    """Whether cuSPARSELt's product can be recorded in a CUDA graph, in words."""
    x = torch.randn(128, columns, device=DEVICE).to(compressed.dtype)
    expected = semi_structured.multiply(x, compressed, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            y = semi_structured.multiply(x, compressed, out)
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
    except (PhoenixError, RuntimeError) as error:
        return f"no ({first_line(error)})"
    return "yes" if torch.equal(y, expected) else "yes, with another result"


@torch.no_grad()
def make_models(layers: int, width: int) -> tuple[Any, Any]:
    """A model with random 2:4 linears: as transformers has it, and packed for the kernels."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    with DEVICE:
        dense: Any = AutoModelForCausalLM.from_config(llama_config(layers, width), dtype=torch.bfloat16).eval()
    masks = {name: two_four(*linear.weight.shape) for name, linear in prunable_linears(dense).items()}
    for name, linear in prunable_linears(dense).items():
        linear.weight.mul_(masks[name])
    sparse = copy.deepcopy(dense)
    for name, linear in prunable_linears(sparse).items():
        parent, _, leaf = name.rpartition(".")
        packed = SparseLinear.of(packed_of(linear.weight.detach(), masks[name]), torch.bfloat16)
        setattr(sparse.get_submodule(parent), leaf, packed)
    prepare(sparse, DEVICE)
    return dense, sparse


class Choice:
    """A model with one choice of copies; those of all choices are in memory."""

    def __init__(self, name: str, model: Any, prompt: Tensor) -> None:
        self.layers = [part for part in model.modules() if isinstance(part, CudaLinear)]
        if self.layers:
            many_rows.keep(self.layers, many_rows.check_prefill(name), DEVICE)
        self.copies = [(layer.dense_copy, layer.semi_structured) for layer in self.layers]
        self.bytes = sum(part.nbytes for pair in self.copies for part in pair if part is not None)
        self.prompt, self.decoder = prompt, Decoder(model, 1, prompt.shape[1])
        self.logits = self.run()
        self.seconds: dict[str, list[float]] = {"launched": [], "gpu": []}

    def run(self) -> Tensor:
        """A prompt through the model: logits of the token after it."""
        return self.decoder.prefill(self.prompt)

    def turn(self) -> None:
        """Time some prompts, one after another."""
        for layer, (dense, semi) in zip(self.layers, self.copies, strict=True):
            layer.dense_copy, layer.semi_structured = dense, semi
        self.run()
        self.seconds["launched"].append(timed(lambda: [self.run() for _ in range(TURNS - 1)], 0.0)[0] / (TURNS - 1))
        self.seconds["gpu"].append(timed(self.run, 3 * LONGEST)[0])


def measure_model(dense: Any, sparse: Any, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """A row for the dense model and for each choice; choices take turns.

    Raises:
        PhoenixError: logits differ from the dense model's.
    """
    prompt = torch.randint(dense.config.vocab_size, (1, tokens), device=DEVICE)
    choices = {"dense model": Choice("packed", dense, prompt)}
    choices |= {f"prefill={name}": Choice(name, sparse, prompt) for name in CHOICES}
    exact = choices["dense model"].logits.double()
    errors = {name: float((one.logits.double() - exact).norm() / exact.norm()) for name, one in choices.items()}
    if not max(errors.values()) <= LIKE:
        raise PhoenixError(f"gpu_prefill: logits differ from the dense model's by {errors}; the kernels are wrong")
    for repeat in range(repeats):
        for one in list(choices.values())[:: 1 if repeat % 2 == 0 else -1]:
            one.turn()
    linears = sum(linear.weight.nbytes for linear in prunable_linears(dense).values())
    packed = sum(layer.nbytes for layer in choices["prefill=packed"].layers)
    found = []
    for name, one in choices.items():
        times = {kind: statistics.median(values) for kind, values in one.seconds.items()}
        first = {kind: statistics.median(values) for kind, values in choices["dense model"].seconds.items()}
        memory = 1.0 if name == "dense model" else (packed + one.bytes) / linears
        factors = {kind: first[kind] / times[kind] for kind in times}
        found.append({"model": name, "tokens": tokens, "seconds": times, "factors": factors, "linears": memory})
        found[-1]["logits_error"] = errors[name]
    return found


def _model_cells(row: dict[str, Any]) -> dict[str, str]:
    cells = {"model": row["model"], "tokens": str(row["tokens"])}
    for kind, heading in (("launched", "ms as launched"), ("gpu", "ms of the GPU")):
        cells[heading] = f"{row['seconds'][kind] * 1e3:.3f}"
        cells[f"of dense, {kind}"] = f"{row['factors'][kind]:.2f}"
    return cells | {"linears / dense": f"{row['linears']:.1%}", "logits": f"{row['logits_error']:.2%}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=[f"{out}x{columns}" for out, columns in SHAPES])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--search-seconds", type=float, default=15.0, help="for cuSPARSELt's search, in all")
    parser.add_argument("--layers", type=int, default=4, help="of the model; 0: no model")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    try:
        shapes = [(int(out), int(columns)) for out, columns in (shape.split("x") for shape in options.shape)]
        if any(size % semi_structured.SIZES for shape in shapes for size in shape) or min(options.rows) < 1:
            raise PhoenixError("gpu_prefill: --shape takes multiples of 16, and --rows numbers from 1 on")
        if not torch.cuda.is_available():
            raise PhoenixError("gpu_prefill: torch sees no GPU; run this on a machine with one")
        why = semi_structured.why_not(DEVICE)
        if why is not None:
            raise PhoenixError(f"gpu_prefill: {why}; run this where it can be had")
        os.environ[VARIABLE] = "kernels"
        torch.manual_seed(SEED)
        semi_structured.prove(DEVICE, torch.bfloat16)
        searches, rows, models = Searches(options.search_seconds), [], []
        for out, columns in shapes:
            rows += measure_linear(out, columns, options.rows, options.repeats, searches)
            torch.cuda.empty_cache()
        if options.layers:
            dense, sparse = make_models(options.layers, options.width)
            for tokens in options.tokens:
                models += measure_model(dense, sparse, tokens, options.repeats)
    except PhoenixError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except ValueError:
        print("gpu_prefill: --shape takes OUTxIN, as 14336x4096", file=sys.stderr)
        return 2
    print("\nµs (times as fast as dense)")
    print_table([_cells(row) for row in rows])
    found = {name: crossovers(rows, name, 1.0) for name in ("semi", "searched")}
    found = {f"{name} over dense": by_shape for name, by_shape in found.items()}
    found["expand over 0.95 of dense"] = crossovers(rows, "expand", 0.95)
    found["semi over expand"] = crossovers(rows, "semi", 1.0, "expand")
    for name, by_shape in found.items():
        print(f"{name}, rows from: " + ", ".join(f"{shape} {count}" for shape, count in by_shape.items()))
    if searches.left <= 0:
        print(f"some algorithms were not searched for: {searches.why}")
    if models:
        print()
        print_table([_model_cells(row) for row in models])
    sample = semi_structured.compress(torch.eye(64, device=DEVICE, dtype=torch.bfloat16))
    recorded = can_record(sample, 64, 64)  # last: what fails here may leave torch in disorder
    seconds = time.perf_counter() - started
    print(f"cuSPARSELt in a CUDA graph: {recorded}; all in {seconds:.0f} s")
    if options.json is not None:
        record = {"facts": facts(DEVICE, torch.bfloat16), "cusparselt": torch.backends.cusparselt.version()}
        record |= {"linears": rows, "crossovers": found, "models": models, "recorded": recorded, "seconds": seconds}
        write_json(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
