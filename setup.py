"""Builds the CPU kernels of phoenix_sparse.runtime. All else about the package stands in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("src/phoenix_sparse/runtime/csrc")


class BuildLibrary(build_ext):
    """Builds a shared library with a C interface, opened with ctypes: it needs no Python and no torch to build."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without the Python version that extension modules carry in their names."""
        return str(Path(*fullname.split("."))) + ".so"


setup(
    ext_modules=[
        Extension(
            "phoenix_sparse.runtime.kernels.libphoenix",
            sources=sorted(map(str, SOURCES.glob("*.cpp"))),
            depends=sorted(map(str, SOURCES.glob("*.h"))),
            # No -fopenmp: it would link a second OpenMP runtime beside torch's (see threads.h). No -march either: each
            # instruction set has its file, and is chosen when the library is loaded. gcc warns about its own headers.
            extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-Wno-uninitialized", "-g0"],
            language="c++",
            # Without a compiler the package installs all the same, and computes with torch.
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary},
)
