"""The kernels' sources, compiled for the CPU with the emulator in place of CUDA's instructions."""

import ctypes
import functools
import re
import subprocess
import tempfile
from pathlib import Path

import torch

from phoenix_sparse.runtime.cuda import compiling, scattered_product
from phoenix_sparse.runtime.cuda.layout import TILE_COLUMNS, TILE_ROWS, Layout
from phoenix_sparse.runtime.cuda.product import macros, shape_of
from phoenix_sparse.runtime.cuda.scattered import Scattered

HERE = Path(__file__).parent
ENTRY = """
extern "C" long run_linear(int grid, bool late, void** p, Shape shape) {
    lazy = late;
    return launch(grid, NW * 32, [=] {
        phx_linear((unsigned char*)p[0], (uint2*)p[1], (u32*)p[2], (int4*)p[3], (unsigned char*)p[4], (u16*)p[5],
                   (float*)p[6], (float*)p[7], (u16*)p[8], (float*)p[9], (u32*)p[10], shape);
    });
}
extern "C" long run_expand(int grid, bool late, void** p, Shape shape) {
    lazy = late;
    return launch(grid, NW * 32, [=] {
        phx_expand((unsigned char*)p[0], (uint2*)p[1], (u32*)p[2], (int4*)p[3], (unsigned char*)p[4], (u16*)p[5],
                   shape);
    });
}
"""
SCATTERED_ENTRY = """
extern "C" long run_linear(int grid, bool late, void** p, Shape shape) {
    return launch(grid, NW * 32, [=] {
        phx_scattered((uint4*)p[0], (uint2*)p[1], (uint4*)p[2], (int*)p[3], (int*)p[4], (int4*)p[5], (u16*)p[6],
                      (float*)p[7], (float*)p[8], (u16*)p[9], (float*)p[10], (u32*)p[11], shape);
    });
}
extern "C" long run_expand(int grid, bool late, void** p, Shape shape) {
    return launch(grid, NW * 32, [=] {
        phx_scattered_expand((uint4*)p[0], (uint2*)p[1], (uint4*)p[2], (int*)p[3], (int*)p[4], (int4*)p[5], (u16*)p[6],
                             shape);
    });
}
"""


@functools.cache
def library(options: tuple[tuple[str, int], ...], path: Path = compiling.SOURCE, entry: str = ENTRY) -> ctypes.CDLL:
    parts = [compiling.TILES, path] if path == compiling.SOURCE else [path]
    source = "".join(part.read_text(encoding="utf-8") for part in parts)
    source, cuts = re.subn(r"// -- instructions.*?// -- end of instructions\n", "", source, flags=re.DOTALL)
    assert cuts == (path != compiling.SOURCE)
    source = source.replace("__shared__ u32 arrived", "static u32 arrived").replace("#pragma unroll", "//")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.cpp"
        file.write_text(f'#include <algorithm>\n#include "{HERE}/emulator.h"\n{source}\n{entry}', encoding="utf-8")
        done = subprocess.run(
            ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-fno-strict-aliasing", "-w"]
            + [f"-D{name}={value}" for name, value in options]
            + [str(file), "-o", f"{folder}/kernels.so"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[:3000]
        found = ctypes.CDLL(f"{folder}/kernels.so")
    found.run_linear.restype = found.run_expand.restype = ctypes.c_long
    return found


def _run(name: str, layout: Layout, eights: int, late: bool, batch: int, *tensors: torch.Tensor | None) -> None:
    parts = [layout.values, layout.bitmaps, layout.headers, layout.warps, layout.offsets, *tensors]
    pointers = (ctypes.c_void_p * len(parts))(*[None if part is None else part.data_ptr() for part in parts])
    run = getattr(library(tuple(macros(layout, eights).items())), name)
    assert run(layout.groups * layout.slabs, late, pointers, shape_of(layout, batch)) == 0


def multiply(x: torch.Tensor, layout: Layout, late: bool, scales=None, bias=None) -> torch.Tensor:
    batch, out = x.shape[0], layout.shape[0]
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % TILE_COLUMNS)).contiguous()
    y = torch.full((batch, out), float("nan"), dtype=x.dtype)
    sums = torch.full((layout.slabs * batch * layout.tiles * TILE_ROWS,), float("nan"))
    counters = torch.zeros(layout.groups, dtype=torch.int32)
    _run("run_linear", layout, -(-batch // 8), late, batch, x, scales, bias, y, sums, counters)
    assert not counters.any()
    return y


def expand(layout: Layout, late: bool) -> torch.Tensor:
    dense = torch.full((layout.shape[0], layout.blocks * TILE_COLUMNS), float("nan"), dtype=layout.dtype)
    _run("run_expand", layout, 1, late, 1, dense)
    return dense


def _run_scattered(name: str, layout: Scattered, batch: int, pitch: int, *tensors: torch.Tensor | None) -> None:
    parts = [layout.values, layout.deltas, layout.starts, layout.rows, layout.lengths, layout.warps, *tensors]
    pointers = (ctypes.c_void_p * len(parts))(*[None if part is None else part.data_ptr() for part in parts])
    options = tuple(scattered_product.macros(layout, batch).items())
    run = getattr(library(options, scattered_product.SOURCE, SCATTERED_ENTRY), name)
    assert run(layout.grid, False, pointers, scattered_product.shape_of(layout, batch, pitch)) == 0


def multiply_scattered(x: torch.Tensor, layout: Scattered, scales=None, bias=None) -> torch.Tensor:
    """One launch: at most 16 rows of x."""
    batch, out = x.shape[0], layout.shape[0]
    x = scattered_product.padded(x)
    y = torch.full((batch, out), float("nan"), dtype=x.dtype)
    parts = torch.full((layout.slabs * batch * out,), float("nan"))
    counters = torch.zeros(out, dtype=torch.int32)
    _run_scattered("run_linear", layout, batch, x.shape[1], x, scales, bias, y, parts, counters)
    assert not counters.any()
    return y


def expand_scattered(layout: Scattered) -> torch.Tensor:
    pitch = layout.shape[1] + 8 - layout.shape[1] % 8
    dense = torch.full((layout.shape[0], pitch), float("nan"), dtype=layout.values.dtype)
    _run_scattered("run_expand", layout, 1, pitch, dense)
    return dense[:, : layout.shape[1]]
