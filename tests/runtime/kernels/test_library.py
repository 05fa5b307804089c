import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.kernels import library
from phoenix_sparse.runtime.kernels.library import Library, describe
from runtime.kernels.matrices import libraries

LIBRARIES = libraries()
built = pytest.mark.skipif(not LIBRARIES, reason="the kernels are not built")


@pytest.fixture(autouse=True)
def anew():
    library.library.cache_clear()
    yield
    library.library.cache_clear()


@built
def test_each_instruction_set_can_be_asked_for(monkeypatch):
    assert LIBRARIES[0].path == "portable"
    assert Library().path == LIBRARIES[-1].path
    for one in LIBRARIES:
        monkeypatch.setenv(library.VARIABLE, one.path)
        library.library.cache_clear()
        assert describe().startswith(f"{one.path}: ")
        assert describe().endswith("; torch's threads")


@built
@pytest.mark.parametrize("name", ["sse", "neon", "AVX2"])
def test_another_is_refused(monkeypatch, name):
    monkeypatch.setenv(library.VARIABLE, name)
    with pytest.raises(PhoenixError, match=f"PHOENIX_KERNEL: '{name}' can't be used here; choose one of portable"):
        describe()


def test_torch_can_be_asked_for(monkeypatch):
    monkeypatch.setenv(library.VARIABLE, "torch")
    with warnings.catch_warnings(action="error"):
        assert library.library() is None
    assert describe().startswith("torch: ")


def test_a_missing_library_is_said_once(monkeypatch, tmp_path):
    monkeypatch.delenv(library.VARIABLE, raising=False)
    monkeypatch.setattr(library, "FILE", tmp_path / "none.so")
    with pytest.warns(
        UserWarning,
        match="the CPU kernels were not built when installing.*ten times as long.*where there is a C\\+\\+ compiler",
    ):
        assert library.library() is None
    with warnings.catch_warnings(action="error"):
        assert library.library() is None
    monkeypatch.setenv(library.VARIABLE, "portable")
    library.library.cache_clear()
    with pytest.raises(PhoenixError, match="needs the compiled kernels"):
        library.library()


def test_a_damaged_library_is_said_too(monkeypatch, tmp_path):
    monkeypatch.delenv(library.VARIABLE, raising=False)
    monkeypatch.setattr(library, "FILE", tmp_path / "bad.so")
    (tmp_path / "bad.so").write_bytes(b"no library")
    with pytest.warns(UserWarning, match="the CPU kernels can't be opened"):
        assert library.library() is None


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("older", [True, False])
def test_a_library_of_another_version_is_said_too(monkeypatch, tmp_path, older):
    """Whether it lacks functions of today, or has them all and one that works otherwise."""
    names = ["phx_interface"] if older else library._FUNCTIONS
    (tmp_path / "other.c").write_text("\n".join(f"int {name}(void) {{ return 99; }}" for name in names))
    subprocess.run(["cc", "-shared", "-fPIC", "other.c", "-o", "other.so"], cwd=tmp_path, check=True)
    monkeypatch.delenv(library.VARIABLE, raising=False)
    monkeypatch.setattr(library, "FILE", tmp_path / "other.so")
    with pytest.warns(UserWarning, match="other.so is of another version than this package.*Install"):
        assert library.library() is None


@built
def test_the_threads_are_torch_s():
    """One OpenMP runtime in the process, and as many threads of it as torch was told to use."""
    code = """
import os, torch
from runtime.kernels.matrices import libraries, matrix, multiply
m, x = matrix(2000, 1000, 0.5, torch.bfloat16, 0), torch.randn(1, 1000)
torch.set_num_threads(4)
torch.randn(3000, 3000).sum()
threads = len(os.listdir("/proc/self/task"))
multiply(libraries()[-1], m, x)
assert len(os.listdir("/proc/self/task")) == threads, "new threads"
torch.set_num_threads(7)
multiply(libraries()[-1], m, x)
assert len(os.listdir("/proc/self/task")) == threads + 3, "not three more"
torch.randn(3000, 3000).sum()
assert len(os.listdir("/proc/self/task")) == threads + 3, "another pool"
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]}
assert len(runtimes) == 1, runtimes
"""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("threads are counted in /proc")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@built
def test_the_dense_kernel_to_compare_with():
    generator = torch.Generator().manual_seed(0)
    for one in LIBRARIES:
        for rows, columns in [(5, 33), (64, 256), (70, 1000)]:
            weight = torch.randn(rows, columns, generator=generator).bfloat16()
            for batch in (1, 3, 8):
                x = torch.randn(batch, columns, generator=generator).bfloat16()
                if not one.has_dense:
                    with pytest.raises(PhoenixError, match="no such kernel"):
                        one.dense(x, weight)
                    continue
                exact = x.double() @ weight.double().T
                slack = 1e-6 * (x.double().abs() @ weight.double().abs().T)
                assert ((one.dense(x, weight).double() - exact).abs() <= 2**-8 * exact.abs() + slack).all()
        one.read(torch.ones(1001, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["library", "linear"])
def test_a_part_of_them_can_be_what_is_imported_first(name):
    """torch's import brings the others, with which the first must not be half done."""
    code = f"import phoenix_sparse.runtime.kernels.{name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
