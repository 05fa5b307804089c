"""One linear on the GPU: Phoenix's kernels against cuBLAS, by shape, density and batch, in one process.

    PYTHONPATH=src python benchmarks/gpu_sparse.py --values bf16 int8 --json gpu_sparse.json

Launches are captured in a graph and replayed; each launch takes another copy of the weights, of which there are so many
that no copy is still in the level-2 cache when its turn comes again. Times are medians of replays. `limit` is what
reading the weights once would take at the bandwidth of a long sum measured beside. Before anything is
timed, products are compared with float64 on other shapes, and two launches with each other. int8 values are multiplied
with a bfloat16 x and scaled row by row, and compared with cuBLAS's bfloat16 product as the others are; the layout that
goes value by value holds none.
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measuring import facts, print_table
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import write_json
from phoenix_sparse.runtime.cuda import layout, product, scattered, scattered_product
from phoenix_sparse.runtime.cuda.forms import Form, expand, multiply, parts_of, plan_for
from phoenix_sparse.runtime.cuda.layout import TILE_COLUMNS, Layout
from phoenix_sparse.runtime.cuda.operands import MOST

SHAPES = [(14336, 4096), (4096, 14336), (6144, 4096), (28672, 4096)]
CHECKED = [(64, 256, 0.5), (33, 130, 0.3), (300, 5000, 0.5), (16, 64, 1.0), (1, 8, 0.5), (1000, 1000, 0.05),
           (2000, 9000, 0.6), (48, 64, 0.0)]  # fmt: skip
COLD = 130_000_000  # bytes that pass between two uses of a copy, twice the level-2 cache
CEILING = 2**30  # bytes of the sum that bandwidth is measured with

FEW = 0.3  # kept, up to which the layout that goes value by value is measured as well

Plan = layout.Plan | scattered.Plan
Launch = Callable[[], object]


def _sparse(out: int, columns: int, density: float, dtype: torch.dtype, values: str) -> Tensor:
    """A random weight; for int8 of all the integers from -128 to 127 but 0."""
    weight = torch.randn(out, columns, device="cuda")
    if values == "int8":
        weight = torch.randint_like(weight, -128, 127)
        weight += weight >= 0
    return torch.where(torch.rand(weight.shape, device="cuda") < density, weight, 0.0).to(dtype)


def _form(weight: Tensor, plan: Plan, values: str) -> Form:
    kept = weight != 0
    out, columns = weight.shape
    bits = torch.nn.functional.pad(kept, (0, -columns % 8)).view(out, -1, 8).to(torch.uint8)
    bitmask = (bits << torch.arange(8, dtype=torch.uint8, device=weight.device)).sum(-1, dtype=torch.uint8)
    offsets = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    if isinstance(plan, scattered.Plan):
        return scattered.build(bitmask, weight[kept], offsets, columns, plan)
    held = weight[kept].to(torch.int8) if values == "int8" else weight[kept]
    return layout.build(bitmask, held, offsets, columns, plan, weight.dtype)


def check(batches: list[int], plan: Plan, values: str) -> None:
    """Compare with float64, and two launches with each other.

    Raises:
        PhoenixError: they differ.
    """
    for dtype in (torch.bfloat16, torch.float16):
        for out, columns, density in CHECKED:
            weight = _sparse(out, columns, density, dtype, values)
            form = _form(weight, plan, values)
            if not torch.equal(expand(form), weight):
                raise PhoenixError(f"gpu_sparse: {out}x{columns} at {density:.0%} {dtype} is not unpacked as it was")
            for batch in batches:
                x = torch.randn(batch, columns, device="cuda").to(dtype)
                y, exact = multiply(x, form), x.double() @ weight.double().t()
                if not torch.equal(y, multiply(x, form)):
                    raise PhoenixError(f"gpu_sparse: {out}x{columns}, batch {batch}: two launches differ")
                if not bool((y.double() - exact).norm() <= 5e-3 * exact.norm()):
                    raise PhoenixError(f"gpu_sparse: {out}x{columns} at {density:.0%}, batch {batch}: wrong {dtype}")
        held = " of int8" if values == "int8" else ""
        print(f"checked: {len(CHECKED)} shapes{held} in {dtype}, batches {batches}", flush=True)


def _copies(form: Form, count: int) -> list[Form]:
    names = parts_of(type(form))
    others = [{name: getattr(form, name).clone() for name in names} for _ in range(count - 1)]
    return [form, *(dataclasses.replace(form, **parts) for parts in others)]


def _expand(form: Form, memory: Tensor) -> Tensor:
    return product.expand(form, memory) if isinstance(form, Layout) else scattered_product.expand(form, memory)


def microseconds(launches: list[Launch], repeats: int) -> float:
    """Of one launch: the median over replays of a graph of them."""
    torch.cuda.synchronize()  # kernels begin to read weights before what runs ahead of them has ended
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for launch in launches:
            launch()
    torch.cuda.synchronize()
    count = max(48, len(launches))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(count):
            launches[number % len(launches)]()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    return statistics.median(times)


def bandwidth(repeats: int) -> float:
    """Bytes a second of a long sum: nothing but reading, as the products."""
    source = torch.randn(CEILING // 4, device="cuda")
    return CEILING / (microseconds([source.sum], repeats) * 1e-6)


def _one(
    weight: Tensor,
    density: float,
    plan: Plan,
    values: str,
    xs: dict[int, Tensor],
    base: dict[int, float],
    limit: float,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    out, columns = weight.shape
    form = _form(weight, plan, values)
    scales = torch.rand(out, device="cuda") if values == "int8" else None
    copies = _copies(form, max(2, -(-COLD // form.nbytes)))
    memory = torch.empty(-(-columns // TILE_COLUMNS) * TILE_COLUMNS * out, dtype=weight.dtype, device="cuda")
    unpacked = microseconds([lambda c=c: _expand(c, memory) for c in copies], repeats)
    name = "value by value"
    if isinstance(plan, layout.Plan) and isinstance(form, Layout):
        name = f"{plan.warps}:{plan.ring}:{plan.slack}, depth {form.depth}"
    for batch, x in xs.items():
        time = microseconds([lambda c=c, x=x: multiply(x, c, scales) for c in copies], repeats)
        yield {
            "shape": f"{out}x{columns}",
            "values": values,
            "kept": density,
            "batch": batch,
            "plan": name,
            "cublas": base[batch],
            "phoenix": time,
            "factor": base[batch] / time,
            "gigabytes": form.nbytes / time / 1e3,
            "share": form.nbytes / limit / (time * 1e-6),
            "bytes": form.nbytes / (out * columns),
            "expand": unpacked,
        }


def measure(
    shapes: list[tuple[int, int]],
    densities: list[float],
    batches: list[int],
    plans: list[Plan],
    values: list[str],
    repeats: int,
) -> list[dict[str, Any]]:
    """A row for each shape, density, kind of values, plan and batch; printed as they come."""
    rows: list[dict[str, Any]] = []
    limit = bandwidth(repeats)
    print(f"reading: {limit / 1e12:.2f} TB/s", flush=True)
    for out, columns in shapes:
        weight = torch.randn(out, columns, device="cuda", dtype=torch.bfloat16)
        dense = [weight.clone() for _ in range(max(2, -(-COLD // weight.nbytes)))]
        xs = {batch: torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16) for batch in batches}
        base = {
            batch: microseconds([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense], repeats)
            for batch, x in xs.items()
        }
        del dense
        for density, kind in itertools.product(densities, values):
            sparse = _sparse(out, columns, density, torch.bfloat16, kind)
            for plan in plans:
                if isinstance(plan, scattered.Plan) and (density > FEW or kind == "int8"):
                    continue
                for row in _one(sparse, density, plan, kind, xs, base, limit, repeats):
                    rows.append(row)
                    print({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.3, 0.1])
    parser.add_argument("--shape", nargs="+", default=[f"{out}x{columns}" for out, columns in SHAPES])
    parser.add_argument("--values", nargs="+", choices=["bf16", "int8"], default=["bf16"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--plan", nargs="+", help="WARPS:RING:SLACK; the one that fits the GPU unless given")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        shapes = [(int(out), int(columns)) for out, columns in (shape.split("x") for shape in options.shape)]
        if not torch.cuda.is_available():
            raise PhoenixError("gpu_sparse: torch sees no GPU; run this on a machine with one")
        if not all(1 <= batch <= MOST for batch in options.batch):
            raise PhoenixError(f"gpu_sparse: --batch {options.batch}; a launch takes 1 to {MOST}")
        torch.manual_seed(0)
        gpu = torch.device("cuda")
        plans: list[Plan] = [plan_for(gpu)]
        if options.plan:
            numbers = [[int(part) for part in text.split(":")] for text in options.plan]
            plans = [layout.Plan(plans[0].processors, warps=w, ring=r, slack=s) for w, r, s in numbers]
        plans.append(scattered_product.plan_for(gpu))
        for plan, values in itertools.product(plans, options.values):
            if not (isinstance(plan, scattered.Plan) and values == "int8"):
                # A plan of one's own may have no memory for more rows than are asked for.
                check(sorted({1, 3, 8, 9, MOST, *options.batch} if not options.plan else options.batch), plan, values)
        rows = measure(shapes, options.density, options.batch, plans, options.values, options.repeats)
    except PhoenixError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except ValueError:
        print(
            "gpu_sparse: --shape takes OUTxIN, as 14336x4096, and --plan WARPS:RING:SLACK, as 8:96:24", file=sys.stderr
        )
        return 2
    print_table(
        [
            {
                "shape": row["shape"],
                "values": row["values"],
                "kept": f"{row['kept']:.0%}",
                "batch": str(row["batch"]),
                "plan": row["plan"],
                "cuBLAS µs": f"{row['cublas']:.1f}",
                "Phoenix µs": f"{row['phoenix']:.1f}",
                "factor": f"{row['factor']:.2f}",
                "GB/s": f"{row['gigabytes']:.0f}",
                "of the limit": f"{row['share']:.0%}",
                "bytes a weight": f"{row['bytes']:.3f}",
                "expand µs": f"{row['expand']:.1f}",
            }
            for row in rows
        ]
    )
    if options.json is not None:
        write_json(options.json, {"facts": facts(torch.device("cuda"), torch.bfloat16), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
