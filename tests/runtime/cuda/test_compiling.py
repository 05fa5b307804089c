import re
import shutil
import subprocess

import pytest
import torch

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.cuda import compiling
from phoenix_sparse.runtime.cuda.layout import TAIL, TILE_COLUMNS, TOGETHER, WORD
from phoenix_sparse.runtime.cuda.linear import CudaLinear, prove
from phoenix_sparse.runtime.cuda.product import ROW, SLOTS, shared_bytes
from phoenix_sparse.runtime.packed import pack
from phoenix_sparse.runtime.sparse_linear import SparseLinear

MACROS = {"NT": 1}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "phoenix_sparse" / "kernels"


def test_compiled_once_for_each_set_of_options(own_cache, monkeypatch):
    calls = []
    monkeypatch.setattr(compiling, "compile_source", lambda source, options: calls.append(options) or b"code")
    assert compiling.compiled((9, 0), MACROS) == b"code"
    assert compiling.compiled((9, 0), MACROS) == b"code"
    assert calls == [["--gpu-architecture=sm_90", "--std=c++17", "-DNT=1"]]
    compiling.compiled((8, 0), MACROS)
    compiling.compiled((9, 0), {"NT": 2})
    assert len(calls) == 3
    assert len(list(own_cache.iterdir())) == 3


def test_a_cache_that_cannot_be_written_is_no_obstacle(own_cache, monkeypatch):
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text("a file in the directory's place")
    monkeypatch.setattr(compiling, "compile_source", lambda source, options: b"code")
    assert compiling.compiled((9, 0), MACROS) == b"code"


def test_an_old_gpu_is_an_error():
    with pytest.raises(PhoenixError, match=r"capability 7\.5; they need 8\.0"):
        compiling.compiled((7, 5), MACROS)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has NVRTC")
def test_without_nvrtc_it_says_so(own_cache):
    with pytest.raises(PhoenixError, match="NVRTC of CUDA any version was not found"):
        compiling.compiled((9, 0), MACROS)


def test_source_and_launcher_agree_on_sizes():
    source = compiling.TILES.read_text(encoding="utf-8")
    found = re.findall(r"^#define (\w+) +(\d+)(?![.\w])", source, re.MULTILINE)
    sizes = [
        ("TAIL", TAIL[1]),
        ("TAIL", TAIL[2]),
        ("BITS", 8 * WORD),
        ("ROW", ROW),
        ("SLOTS", SLOTS),
        ("COLUMNS", TILE_COLUMNS),
        ("TOGETHER", TOGETHER),
    ]
    assert [(name, int(size)) for name, size in found] == sizes


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize(("eights", "warps", "ring", "int8"), [(1, 8, 112, 0), (2, 6, 96, 1), (4, 8, 112, 0)])
def test_source_and_launcher_agree_on_shared_memory(tmp_path, eights, warps, ring, int8):
    lines = compiling.TILES.read_text(encoding="utf-8").splitlines()
    macros = [line for line in lines if line.startswith(("#define", "#if", "#else", "#endif"))]
    each = "WARP_BYTES + (SHARED_PLACE ? std::max(X_BYTES, SUMS_BYTES) : X_BYTES + SUMS_BYTES)"
    main = f'int main() {{ return std::printf("%d", NW * ({each})) < 0; }}'
    (tmp_path / "sizes.cpp").write_text("\n".join(["#include <algorithm>", "#include <cstdio>", *macros, main]))
    options = {"HALF": 0, "INT8": int8, "NT": eights, "NW": warps, "DEPTH": 3, "RING": ring}
    subprocess.run(
        ["g++", *[f"-D{name}={value}" for name, value in options.items()], "sizes.cpp", "-o", "sizes"],
        cwd=tmp_path,
        check=True,
    )
    found = int(subprocess.run([tmp_path / "sizes"], capture_output=True, check=True).stdout)
    assert found == shared_bytes(warps, ring, eights * 8, TAIL[1 if int8 else 2])


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("out", "columns", "density"), [(300, 5000, 0.5), (33, 130, 0.3), (16, 64, 1.0), (40, 90, 0.0), (300, 700, 0.1)]
)
def test_on_the_gpu(out, columns, density, dtype):
    for few in (False, True):
        prove(torch.device("cuda"), dtype, few)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, columns, generator=generator)
    weight = torch.where(torch.rand(out, columns, generator=generator) < density, weight, 0.0).to(dtype)
    layer = CudaLinear.of(SparseLinear.of(pack(weight), dtype).cuda())
    assert torch.equal(layer.dense().cpu(), weight)
    for batch in (1, 3, 8, 9, 16, 32, 64, 65, 256, 257):
        x = torch.randn(batch, columns, generator=generator).to(dtype)
        y, exact = layer(x.cuda()), x.double() @ weight.double().t()
        assert (y.cpu().double() - exact).norm() <= 6e-3 * exact.norm()
        assert torch.equal(layer(x.cuda()), y)
