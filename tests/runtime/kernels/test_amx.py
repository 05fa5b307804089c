"""The products with AMX's tiles, compiled with an emulation of them (amx_emulated.h): no such processor is needed."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.kernels import choice, library
from phoenix_sparse.runtime.kernels.library import Library
from phoenix_sparse.runtime.kernels.linear import sparse_linear
from runtime.kernels.matrices import DTYPES, VALUES, expected, matrix, multiply, packed, tolerance
from runtime.kernels.test_memory import exercise

HERE = Path(__file__).parent
SOURCES = Path(library.__file__).parents[1] / "csrc"
PARTS = ("library", "cpu", "portable", "sliced", "slicing", "amx_bf16")
FLAGS = ["-std=c++17", "-fPIC", "-shared", "-w", f"-I{HERE}", f"-I{SOURCES}"]
EMULATED = ("-O1", "-DPHOENIX_AMX_EMULATED")
BATCHES = (1, 4, 5, 8, 16, 17, 33, 64, 70)
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


def build(to: Path, *sources: Path, flags: tuple[str, ...] = EMULATED) -> Path:
    subprocess.run([COMPILER, *FLAGS, *flags, "-o", to, *sources], check=True)
    return to


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no compiler")
    found = build(tmp_path_factory.mktemp("amx") / "emulated.so", *(SOURCES / f"{part}.cpp" for part in PARTS))
    if "amx" not in Library(found).paths:
        pytest.skip("expands with AVX-512, which this processor, or this compiler, lacks")
    return found


@pytest.fixture(scope="module")
def amx(file):
    return Library(file, "amx")


@settings(max_examples=100, deadline=None)
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 70), st.integers(1, 300)),
        st.tuples(st.sampled_from([15, 16, 17, 32, 33, 64]), st.sampled_from([31, 32, 33, 127, 128, 129, 256, 700])),
    ),
    density=st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.7, 1.0]),
    batch=st.one_of(st.integers(5, 130), st.sampled_from([5, 15, 16, 17, 32, 33, 48, 64, 65, 80, 128])),
    x_dtype=st.sampled_from([torch.bfloat16] * 4 + [torch.float32]),
    values=st.sampled_from([torch.bfloat16, torch.int8] * 3 + [torch.float32]),
    others=st.sampled_from(DTYPES),
    biased=st.booleans(),
    seed=st.integers(0, 10**6),
)
@example((1, 1), 1.0, 16, torch.bfloat16, torch.bfloat16, torch.float32, False, 0)
@example((5, 40), 0.0, 70, torch.bfloat16, torch.int8, torch.bfloat16, True, 0)
def test_products_agree_with_float64(amx, shape, density, batch, x_dtype, values, others, biased, seed):
    m = matrix(*shape, density, values, seed, others)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, shape[1], generator=generator).to(x_dtype)
    bias = torch.randn(shape[0], generator=generator).to(others) if biased else None
    y = multiply(amx, m, x, bias)
    assert ((y.double() - expected(m, x, bias)).abs() <= tolerance(m, x, bias)).all()
    assert torch.equal(y, multiply(amx, m, x, bias))


@pytest.mark.parametrize("kept", ["none", "all", "one row", "but one row", "last column", "first column"])
@pytest.mark.parametrize("values", [torch.bfloat16, torch.int8])
def test_empty_and_full_rows(amx, kept, values):
    mask = torch.full((37, 161), kept in ("all", "but one row"))
    if "row" in kept:
        mask[20] = ~mask[20]
    elif "column" in kept:
        mask[:, -1 if kept == "last column" else 0] = True
    weight = torch.randint(-127, 128, mask.shape).to(values)
    m = packed(weight, mask, torch.full((37,), 0.01) if values == torch.int8 else None)
    x = torch.randn(50, 161).bfloat16()
    assert ((multiply(amx, m, x).double() - expected(m, x)).abs() <= tolerance(m, x, None)).all()


@pytest.mark.parametrize("values", VALUES)
def test_results_do_not_depend_on_the_number_of_threads(amx, values):
    m = matrix(200, 515, 0.5, values, 2)
    before = torch.get_num_threads()
    try:
        for batch in (16, 40, 100):
            x = torch.randn(batch, 515).bfloat16()
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(multiply(amx, m, x))
            assert all(torch.equal(found[0], other) for other in found)
    finally:
        torch.set_num_threads(before)


def test_a_row_of_x_does_not_see_the_others(amx):
    """Nor how many blocks of sixteen it comes with, but for the order of sums."""
    m = matrix(40, 300, 0.5, torch.bfloat16, 3)
    x = torch.randn(600, 300).bfloat16()
    whole = multiply(amx, m, x)
    for first, last in [(0, 5), (0, 16), (500, 533), (100, 148), (3, 67)]:
        part = multiply(amx, m, x[first:last].contiguous())
        assert ((part.double() - whole[first:last].double()).abs() <= tolerance(m, x[first:last], None)).all()
    x[7] = float("nan")
    assert torch.equal(multiply(amx, m, x)[8:], whole[8:])
    assert multiply(amx, m, x)[7].isnan().all()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses mprotect")
def test_nothing_is_read_or_written_beyond_the_arrays(file):
    assert "12 matrices with portable, amx" in exercise(file, 12, BATCHES)


@pytest.mark.skipif(platform.machine() != "x86_64" or not sys.platform.startswith("linux"), reason="decodes signals")
def test_the_instructions_themselves(file, tmp_path):
    """As the compiler wrote them into the real library: each traps (amx_trapped.cpp), and is decoded and emulated. What
    they take over from AVX-512 ends the process where it is asked for what they should do."""
    parts = (SOURCES / f"{part}.cpp" for part in PARTS if part != "cpu")
    trapped = build(tmp_path / "trapped.so", *parts, HERE / "amx_trapped.cpp", flags=("-O2",))
    if "amx" not in Library(trapped).paths:
        pytest.skip("this compiler doesn't know AMX")
    assert "8 matrices with portable, amx" in exercise(trapped, 8, BATCHES)


@pytest.mark.slow
def test_nothing_is_found_by_address_sanitizer(request, tmp_path):
    """Only when asked for: pytest -m slow."""
    if "slow" not in request.config.getoption("-m"):
        pytest.skip("run with -m slow")
    if COMPILER is None:
        pytest.skip("no compiler")
    flags = (*EMULATED, "-g", "-fsanitize=address,undefined")
    file = build(tmp_path / "sanitized.so", *(SOURCES / f"{part}.cpp" for part in PARTS), flags=flags)
    names = ("libasan.so", "libubsan.so")
    found = [subprocess.check_output([COMPILER, f"-print-file-name={name}"], text=True).strip() for name in names]
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
    assert "100 matrices" in exercise(file, 100, BATCHES, LD_PRELOAD=" ".join(found), **options)


@pytest.fixture
def asked_for(monkeypatch, file):
    monkeypatch.setattr(library, "FILE", file)
    monkeypatch.setenv(library.VARIABLE, "amx")
    monkeypatch.setenv(choice.VARIABLE, "off")
    library.library.cache_clear()
    yield
    library.library.cache_clear()


def test_whoever_asks_for_it_gets_it(asked_for):
    assert library.describe().startswith("amx: AMX's tiles from 5 rows on")
    m = matrix(30, 100, 0.5, torch.int8, 4)
    x = torch.randn(2, 10, 100).bfloat16()
    flat = x.view(20, 100)
    y = sparse_linear(x, *m.parts).view(20, 30)
    assert ((y.double() - expected(m, flat)).abs() <= tolerance(m, flat, None)).all()


@pytest.mark.parametrize("row", [0, 4])
def test_whoever_asks_for_it_is_told_if_it_computes_wrongly(asked_for, monkeypatch, row):
    right = Library.linear

    def wrong(self, x, *operands):
        right(self, x, *operands)
        if self.path == "amx" and len(x) >= 5:
            operands[-2][row, 74] += 0.5

    monkeypatch.setattr(Library, "linear", wrong)
    with pytest.raises(PhoenixError, match="^CPU kernels: 'amx' gives wrong products on this processor .*, 5 rows"):
        library.library()


def test_it_is_taken_where_it_is_there(asked_for, monkeypatch):
    monkeypatch.delenv(library.VARIABLE)
    assert library.library().path == "amx"


def test_where_it_computes_wrongly_another_is_taken(asked_for, monkeypatch):
    monkeypatch.delenv(library.VARIABLE)
    right = Library.linear

    def wrong(self, x, *operands):
        right(self, x, *operands)
        if self.path == "amx":
            operands[-2].add_(0.5)

    monkeypatch.setattr(Library, "linear", wrong)
    with pytest.warns(UserWarning, match=r"^phoenix_sparse: CPU kernels: 'amx' gives wrong products .*; 'portable' is"):
        assert library.library().path == "portable"


ENTRY = """
#include <cstdint>
#include "kernels.h"
#include "amx_tiles.h"
using namespace phx::tile;
extern "C" void dot_once(const void* a, const void* b, void* c) {
    configure(full());
    load<0>(c); load<4>(a); load<6>(b);
    dot<0, 4, 6>();
    store<0>(c);
    release();
}
"""


@pytest.fixture(scope="module")
def dot(tmp_path_factory):
    """One dot product of tiles: (A, B, C) as the instruction takes them, C replaced."""
    if COMPILER is None:
        pytest.skip("no compiler")
    folder = tmp_path_factory.mktemp("dot")
    (folder / "entry.cpp").write_text(ENTRY)
    once = ctypes.CDLL(str(build(folder / "entry.so", folder / "entry.cpp"))).dot_once

    def run(a, b, c):
        c = c.clone()
        pairs = b.view(16, 2, 16).transpose(1, 2).contiguous()  # (32, 16): rows of B in pairs, side by side
        once(*(ctypes.c_void_p(each.data_ptr()) for each in (a, pairs, c)))
        return c

    return run


def test_the_emulated_dot_product_is_a_product(dot):
    a, b, c = torch.randn(16, 32).bfloat16(), torch.randn(32, 16).bfloat16(), torch.randn(16, 16)
    exact = c.double() + a.double() @ b.double()
    assert ((dot(a, b, c).double() - exact).abs() <= 1e-6 * (a.double().abs() @ b.double().abs() + c.abs())).all()
    whole_a = torch.randint(-50, 51, (16, 32)).bfloat16()
    whole_b = torch.randint(-50, 51, (32, 16)).bfloat16()
    assert torch.equal(dot(whole_a, whole_b, torch.ones(16, 16)), (whole_a.float() @ whole_b.float()) + 1)


def test_the_emulated_dot_product_rounds_as_the_manual_says(dot):
    """Even columns and odd ones for themselves, in order, each product added with one rounding; then both; then C."""

    def one(row, column, start=0.0):
        a, b = torch.zeros(16, 32).bfloat16(), torch.zeros(32, 16).bfloat16()
        a[3, : len(row)], b[: len(column), 5] = torch.tensor(row).bfloat16(), torch.tensor(column).bfloat16()
        c = torch.full((16, 16), start)
        return dot(a, b, c)[3, 5].item()

    big = 2.0**24
    assert one([big, 1.0, 1.0, 1.0], [1.0] * 4) == big + 2  # 1 is lost beside 2^24, twice 1 isn't
    assert one([big, 0, 1.0, 0, -big], [1.0] * 5) == 0  # to even
    assert one([big, 0, 3.0, 0, -big], [1.0] * 5) == 4  # to even, upward
    assert one([1.0, 1.0], [1.0, 1.0], big) == big + 2
    assert one([1.0, 0, 1.0], [1.0] * 3, big) == big + 2  # C comes last
    assert one([2.0**-130], [2.0**100]) == 0  # a denormal operand is zero
    assert one([2.0**-70], [2.0**-70]) == 0  # so is a denormal sum
    assert one([2.0**-63], [2.0**-63]) == 2.0**-126
    assert one([0.0], [0.0], 2.0**-130) == 0
    # The product itself is neither rounded nor flushed: 2^-140 takes 2^-125 just below it, and that is kept.
    assert one([2.0**-100, 0, 2.0**-102], [2.0**-25, 0, -(2.0**-40)]) == 2.0**-125 - 2.0**-142
    assert one([float("inf"), 1.0], [1.0, 1.0]) == float("inf")
