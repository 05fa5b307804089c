"""The kernels, compiled by NVRTC at first use and kept in the user's cache; started through the CUDA driver.

Neither a CUDA toolkit nor a C++ compiler is needed: torch's own packages bring NVRTC.
"""

import ctypes
import hashlib
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import atomic_path

SOURCE, TILES, COMMON = (Path(__file__).with_name(name) for name in ("kernels.cu", "tiles.cu", "instructions.cu"))
OLDEST = (8, 0)  # compute capability: cp.async and mma.m16n8k16 with bfloat16

_OPT_IN_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_MOST_SHARED = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
_EARLY = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *[
            (name, ctypes.c_uint)
            for name in ("grid", "grid_y", "grid_z", "threads", "threads_y", "threads_z", "shared")
        ],
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


def cache_directory() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/phoenix_sparse/kernels, or that under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "phoenix_sparse" / "kernels"


@cache
def _nvrtc() -> Any:
    """The library that this torch's CUDA version comes with.

    Raises:
        PhoenixError: it isn't there.
    """
    version = (torch.version.cuda or "").split(".")[0]
    names = [f"libnvrtc.so.{version}", "libnvrtc.so"]
    folders = [Path(folder) / "nvidia" for folder in sys.path if (Path(folder) / "nvidia").is_dir()]
    found = [str(path) for folder in folders for path in sorted(folder.glob(f"*/lib/{names[0]}"))]
    for name in [*found, *names]:
        try:
            # NVRTC asks for its second half by name alone, which the loader finds only where it is open already.
            for half in sorted(Path(name).parent.glob("libnvrtc-builtins.so.*")) if "/" in name else []:
                ctypes.CDLL(str(half))
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise PhoenixError(
        f"sparse kernels: NVRTC of CUDA {version or 'any version'} was not found; install nvidia-cuda-nvrtc, or use "
        "device=cpu"
    )


@cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise PhoenixError(
            "sparse kernels: no CUDA driver (libcuda.so.1); install NVIDIA's, or use device=cpu"
        ) from error


def compile_source(source: str, options: list[str]) -> bytes:
    """Compile CUDA C++ to machine code.

    Raises:
        PhoenixError: NVRTC is missing, or refuses it; the first line of its log is given.
    """
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    try:
        array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        if nvrtc.nvrtcCompileProgram(program, len(options), array):
            size = ctypes.c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            lines = log.value.decode(errors="replace").strip().splitlines() or ["no log"]
            raise PhoenixError(
                f"sparse kernels: NVRTC can't compile them ({lines[0]}); update torch, or use device=cpu"
            )
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def compiled(capability: tuple[int, int], macros: dict[str, int], file: Path = SOURCE) -> bytes:
    """Machine code of a source file for a compute capability, from the cache where it is there.

    Raises:
        PhoenixError: the GPU is older than `OLDEST`, or compiling fails.
    """
    if capability < OLDEST:
        have, need = (".".join(map(str, pair)) for pair in (capability, OLDEST))
        raise PhoenixError(f"sparse kernels: this GPU has compute capability {have}; they need {need} or newer")
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in sorted(macros.items())]
    parts = [COMMON, TILES, file] if file == SOURCE else [COMMON, file]
    source = "".join(part.read_text(encoding="utf-8") for part in parts)
    facts = "\n".join([source, *options, torch.version.cuda or ""])
    path = cache_directory() / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.cubin"
    if path.is_file():
        return path.read_bytes()
    code = compile_source(source, options)
    with suppress(PhoenixError, OSError), atomic_path(path) as part:  # a home that can't be written only costs time
        part.write_bytes(code)
    return code


class Kernel:
    """One function of a source file, for one device."""

    def __init__(
        self,
        name: str,
        device: torch.device,
        macros: dict[str, int],
        threads: int,
        shared: int,
        file: Path,
    ) -> None:
        """Compile and load it.

        Args:
            name: of the function.
            device: a GPU.
            macros: as the file lists them.
            threads: of a block.
            shared: bytes of dynamic shared memory.
            file: CUDA C++. From compute capability 9.0 on a kernel begins before what runs ahead of it has ended, and
                has to wait for that by itself.

        Raises:
            PhoenixError: it can't be compiled or loaded.
        """
        self.device, self.threads, self.shared = device, threads, shared
        capability = torch.cuda.get_device_capability(device)
        self.early = capability >= (9, 0)
        code = compiled(capability, macros, file)
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # makes torch's context current
            torch.zeros(1, device=device)
            _check(_driver().cuModuleLoadData(ctypes.byref(module), code), "loading")
            _check(_driver().cuModuleGetFunction(ctypes.byref(self.function), module, name.encode()), name)
            _check(_driver().cuFuncSetAttribute(self.function, _OPT_IN_SHARED, shared), "shared memory")

    def __call__(self, grid: int, *arguments: Tensor | ctypes.Structure | None) -> None:
        """Launch on torch's current stream: tensors as pointers, None as a null pointer, structures by value."""
        values: list[Any] = [
            ctypes.c_void_p(None if a is None else a.data_ptr()) if a is None or isinstance(a, Tensor) else a
            for a in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.cast(ctypes.pointer(v), ctypes.c_void_p) for v in values])
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        attribute = _Attribute(_EARLY, 0, 1)
        config = _Config(grid, 1, 1, self.threads, 1, 1, self.shared, stream, ctypes.pointer(attribute), self.early)
        with torch.cuda.device(self.device):
            code = _driver().cuLaunchKernelEx(ctypes.byref(config), self.function, pointers, None)
        _check(code, "launching")


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        said = (text.value or b"unknown").decode()
        raise PhoenixError(f"sparse kernels: {what} failed ({said}); use device=cpu, or report it")


def most_shared(device: torch.device) -> int:
    """Bytes of shared memory that a block of threads can have on a GPU."""
    torch.cuda.init()
    found = ctypes.c_int()
    index = torch.cuda.current_device() if device.index is None else device.index
    _check(_driver().cuDeviceGetAttribute(ctypes.byref(found), _MOST_SHARED, index), "asking the GPU")
    return found.value


@cache
def kernel(
    name: str,
    device: torch.device,
    macros: tuple[tuple[str, int], ...],
    threads: int,
    shared: int,
    file: Path = SOURCE,
) -> Kernel:
    """A kernel, compiled and loaded once. The arguments are `Kernel`'s."""
    return Kernel(name, device, dict(macros), threads, shared, file)
