"""One linear on the CPU: packed weights against dense ones, by density and batch, beside the memory's bandwidth.

Sparse weights are timed by bitmap, and up to a density as slices, whichever of them a loaded model would hold.

    OMP_NUM_THREADS=2 PYTHONPATH=src python benchmarks/sparse_linear_cpu.py --json sparse_linear_cpu.json

The kernels are those of PHOENIX_KERNEL, or the best. `--beside amx` times another instruction set in the same run, too,
called directly: neither slices nor a dense product are taken in its place.

Everything is timed in one process and in turns, so that between two runs of a variant hundreds of megabytes of other
weights went through the caches. All weights lie on huge pages, torch's too. Before anything is timed, each product is
compared with float64, and so is torch's of the same bfloat16 weights: some machines add bfloat16 sums in parts, and
what is taken in a kernel's place there is torch's. A product that errs by more than both bounds is named; one that errs
grossly ends the run.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import facts, insist_on_huge_pages, print_table, summary, time_in_turn
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import write_json
from phoenix_sparse.runtime.kernels.library import Library, library, proven
from phoenix_sparse.runtime.kernels.linear import sparse_linear
from phoenix_sparse.runtime.kernels.placing import place
from phoenix_sparse.runtime.kernels.sliced import sliced_linear
from phoenix_sparse.runtime.kernels.slices import Slices
from phoenix_sparse.runtime.kernels.slicing import count_steps, fill
from phoenix_sparse.runtime.packed import Packed, pack, quantize, unpack

READ = 2**28  # bytes that bandwidth is measured with
TORCH, OWN = "torch bf16", "own dense bf16"

CHECKED = (3, 17)  # rows of x to compare with float64: a kernel's few, and more than it takes at once
GROSS = 8.0  # times the bound, or times torch's error, beyond which no order of adding up explains an error

Product = Callable[[Tensor], Tensor]


def _dense(weight: Tensor, compiled: Library) -> dict[str, tuple[Product, int]]:
    """Dense products and the bytes of their weights."""
    bf16, fp32 = place(weight), place(weight.float())
    scales = (weight.float().abs().amax(1) / 127).bfloat16()
    int8 = place((weight.float() / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8))
    found: dict[str, tuple[Product, int]] = {
        TORCH: (lambda x: torch.nn.functional.linear(x, bf16), bf16.nbytes),
        "torch fp32": (lambda x: torch.nn.functional.linear(x.float(), fp32), fp32.nbytes),
        "torch int8": (lambda x: torch._weight_int8pack_mm(x, int8, scales), int8.nbytes),
    }
    if compiled.has_dense:
        found[OWN] = (lambda x: compiled.dense(x, bf16), bf16.nbytes)
    return found


def _packed(
    weight: Tensor,
    density: float,
    generator: torch.Generator,
    compiled: Library,
    sliced_to: float,
    beside: list[Library],
    errors: dict[str, list[float]],
) -> dict[str, tuple[Product, int]]:
    """Packed products, by bitmap and, up to some density, by slices, and the bytes of their weights; notes errors."""
    # Not by multiplying: a negative weight times 0 is -0.0, a value that packing keeps.
    kept = pack(weight.masked_fill(torch.rand(weight.shape, generator=generator) >= density, 0.0))
    found = {}
    dense = unpack(kept)
    errors[f"{density:.0%} kept, {TORCH}"] = _errors(kept, lambda x: torch.nn.functional.linear(x, dense))
    for name, packed in (("bf16", kept), ("int8", quantize(kept))):
        parts = (place(packed.bitmask), place(packed.compressed), packed.row_offsets, packed.scales)
        size = sum(part.nbytes for part in parts if part is not None)
        label = f"{density:.0%} kept, {name}"
        found[label] = (_product(parts), size)
        for other in beside:
            found[f"{label}, {other.path}"] = (_directly(other, parts), size)
        if compiled.has_sliced and density <= sliced_to:
            matrix = (packed.bitmask, packed.compressed, packed.row_offsets)
            slices = fill(compiled, *matrix, count_steps(compiled, *matrix, packed.shape[1]))
            held = (slices.steps, slices.windows, slices.starts, slices.order, packed.scales)
            size = sum(part.nbytes for part in held if part is not None)
            found[f"{label}, sliced"] = (_sliced(slices, packed.scales), size)
        errors |= {key: _errors(packed, one) for key, (one, _) in found.items() if key.startswith(label)}
    return found


def _product(parts: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> Product:
    return lambda x: sparse_linear(x, *parts)


def _directly(library: Library, parts: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> Product:
    def product(x: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], len(parts[0]))
        library.linear(x, *parts, None, y, x.shape[1])
        return y

    return product


def _sliced(slices: Slices, scales: Tensor | None) -> Product:
    return lambda x: sliced_linear(x, slices, scales)


def _errors(packed: Packed, product: Product) -> list[float]:
    """The largest error of some rows against its bound, for each of `CHECKED` rows of x.

    The bound is half a step of bfloat16 at the exact value, and 1e-5 of the row's norm for sums in float32.
    """
    weight = unpack(packed).double() if packed.scales is None else _scaled(packed)
    rows = torch.arange(0, packed.shape[0], packed.shape[0] // 16 or 1)
    weight, found = weight[rows], []
    for batch in CHECKED:
        x = torch.randn(batch, packed.shape[1], generator=torch.Generator().manual_seed(batch)).bfloat16()
        exact = x.double() @ weight.t()
        off = (product(x)[:, rows].double() - exact).abs()
        found.append(float((off / (2**-8 * exact.abs() + 1e-5 * weight.norm(dim=1))).max()))
    return found


def _scaled(packed: Packed) -> Tensor:
    """An int8 matrix in float64."""
    assert packed.scales is not None
    whole = Packed(packed.shape, packed.bitmask, packed.compressed.float(), packed.row_offsets)
    return unpack(whole).double() * packed.scales.double()[:, None]


def _judge(errors: dict[str, list[float]]) -> str:
    """One line on all errors.

    Raises:
        PhoenixError: with that line, where an error is gross.
    """
    worst = max(1.0, *(max(found) for name, found in errors.items() if name.endswith(TORCH)))
    marks = {
        name: " GROSS" if not max(found) <= GROSS * worst else " BEYOND TORCH'S" if max(found) > worst else ""
        for name, found in errors.items()
    }
    told = "; ".join(f"{name} {' '.join(f'{one:.2f}' for one in found)}{marks[name]}" for name, found in errors.items())
    line = f"largest error / bound at {' and '.join(map(str, CHECKED))} rows of x: {told}"
    if " GROSS" in marks.values():
        raise PhoenixError(line)
    return line


def _measure(
    products: dict[str, tuple[Product, int]], compiled: Library, batch: int, columns: int, repeats: int
) -> Any:
    x = torch.randn(batch, columns).bfloat16()
    memory = place(torch.ones(READ, dtype=torch.uint8))
    # Batches beyond the dense kernel's are compared with torch alone.
    chosen = {name: one for name, one in products.items() if name != OWN or batch <= 8}
    steps: dict[str, Callable[[], object]] = {name: _step(one, x) for name, (one, _) in chosen.items()}
    with torch.inference_mode():
        seconds = time_in_turn({"read": lambda: compiled.read(memory)} | steps, torch.device("cpu"), repeats, 1)
    read = summary(seconds["read"], {})
    references = {"torch": seconds[TORCH]} | ({"own": seconds[OWN]} if OWN in chosen else {})
    return {"batch": batch, "bandwidth": READ / read["seconds"]}, [
        {"variant": name, "batch": batch, "bytes": size}
        | summary(seconds[name], references)
        # Of two times in one repeat, so that what slows the machine down meanwhile falls out.
        | {"share": size / READ / summary(seconds[name], {"read": seconds["read"]})["ratio_read"]}
        for name, (_, size) in chosen.items()
    ]


def _step(product: Product, x: Tensor) -> Callable[[], object]:
    return lambda: product(x)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    middle, low, high = (f"{row[key] * 1e3:.2f}" for key in ("seconds", "seconds_q1", "seconds_q3"))
    return {
        "variant": row["variant"],
        "ms [quartiles]": f"{middle} [{low}-{high}]",
        "MB": f"{row['bytes'] / 1e6:.0f}",
        "share of read": f"{row['share']:.0%}",
        "x torch bf16": f"{1 / row['ratio_torch']:.2f}",
        "x own dense": f"{1 / row['ratio_own']:.2f}" if "ratio_own" in row else "",
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time packed linears beside dense ones on the CPU.")
    parser.add_argument("--shape", default="14336x4096", metavar="OUTxIN")
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.3, 0.1], help="shares of weights kept")
    parser.add_argument("--sliced-to", type=float, default=0.2, help="densities up to this one by slices, too")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8, 16, 64])
    parser.add_argument("--beside", nargs="+", default=[], metavar="NAME", help="other instruction sets, such as amx")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    if arguments.repeats < 2:
        raise PhoenixError(f"--repeats: {arguments.repeats} is too few for quartiles; give 2 or more")
    compiled = library()
    if compiled is None:
        raise PhoenixError("the CPU kernels are not built, so there is nothing to time")
    beside = [proven(name) for name in arguments.beside]
    out, columns = map(int, arguments.shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(out, columns, generator=generator) / columns**0.5).bfloat16()
    products = _dense(weight, compiled)
    errors = dict[str, list[float]]()
    for density in arguments.density:
        products |= _packed(weight, density, generator, compiled, arguments.sliced_to, beside, errors)
    record = facts(torch.device("cpu"), torch.bfloat16) | {
        "kernels": compiled.describe(),
        "beside": [other.describe() for other in beside],
        "shape": [out, columns],
        "errors": {"rows": list(CHECKED), "of_bound": errors},
        "bandwidth": [],
        "rows": [],
    }
    print(f"{record['hardware']}; {record['threads']} threads; torch {torch.__version__}; {record['kernels']}")
    print(f"{record['date']}, commit {record['commit'] or 'unknown'}; load average {record['load_average']:.1f}")
    print(_judge(errors))
    print("Medians over repeats; ratios and shares are medians of those within a repeat.")
    for batch in arguments.batch:
        read, rows = _measure(products, compiled, batch, columns, arguments.repeats)
        print(f"\n{out}x{columns} (out x in), batch {batch}; reading takes {read['bandwidth'] / 1e9:.1f} GB/s")
        print_table([_cells(row) for row in rows])
        record["bandwidth"].append(read)
        record["rows"] += rows
        if arguments.json is not None:
            write_json(arguments.json, record)


if __name__ == "__main__":
    insist_on_huge_pages()
    try:
        main()
    except PhoenixError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
