import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from phoenix_sparse.runtime.kernels import library
from runtime.kernels.matrices import libraries

EXERCISE = Path(__file__).with_name("exercise.py")
SOURCES = Path(library.__file__).parents[1] / "csrc"


def exercise(file: Path, cases: int, batches: tuple[int, ...] = (), **environment: str) -> str:
    settings = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    command = [sys.executable, str(EXERCISE), str(file), *map(str, (cases, *batches))]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


@pytest.mark.skipif(not libraries(), reason="the kernels are not built")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses mprotect")
def test_nothing_is_read_or_written_beyond_the_arrays():
    assert "60 matrices" in exercise(library.FILE, 60)


@pytest.mark.slow
def test_nothing_is_found_by_address_sanitizer(request, tmp_path):
    """Takes minutes, so only when asked for: pytest -m slow."""
    if "slow" not in request.config.getoption("-m"):
        pytest.skip("run with -m slow")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no compiler")
    file = tmp_path / "sanitized.so"
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-w", "-fsanitize=address,undefined"]
    subprocess.run([compiler, *flags, "-o", file, *SOURCES.glob("*.cpp")], check=True)
    names = ("libasan.so", "libubsan.so")
    found = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in names]
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
    assert "300 matrices" in exercise(file, 300, LD_PRELOAD=" ".join(found), **options)
