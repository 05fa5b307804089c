"""cuSPARSELt by its C interface: the library that torch brings and has loaded, calls that are checked, compressed 2:4
matrices. Products are `cusparselt_product`'s.

Source: cusparseLt.h of versions 0.7.1, 0.8.0, 0.8.1 and 0.10.0; the numbers below are its enumerators.
"""

import ctypes
import sys
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError

OLDEST = (0, 7)
"""Of the library: older ones have larger structures and other numbers of types."""
LOCK = RLock()
"""Held in calls: handles and plans are all threads'."""

_NAME = "libcusparseLt.so.0"
_BYTES, ALIGNED = 1024, 16  # of each opaque structure: 1024 in 0.7, 512 since
NO, TURNED = 0, 1  # cusparseOperation_t
BY_COLUMNS, BY_ROWS = 1, 2  # cusparseOrder_t
TYPES = {torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
_HALF = 0  # CUSPARSELT_SPARSITY_50_PERCENT
FLOAT32 = 2  # CUSPARSE_COMPUTE_32F
BIAS = 8  # CUSPARSELT_MATMUL_BIAS_POINTER
USUAL = 0  # CUSPARSELT_MATMUL_ALG_DEFAULT
KERNEL, KERNELS, PARTS, MODE = 0, 1, 3, 4  # CUSPARSELT_MATMUL_ALG_CONFIG_ID, _CONFIG_MAX_ID, _SPLIT_K, _SPLIT_K_MODE
_REFUSALS = (3, 8, 10)  # CUSPARSE_STATUS_INVALID_VALUE, _MATRIX_TYPE_NOT_SUPPORTED and _NOT_SUPPORTED

_P, _I, _I64, _U32, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint32, ctypes.c_size_t
_LAUNCH = [_P] * 10 + [ctypes.c_int32]
_ARGUMENTS: dict[str, list[Any]] = {
    "cusparseLtGetProperty": [_I, _P],
    "cusparseLtInit": [_P],
    "cusparseLtDenseDescriptorInit": [_P, _P, _I64, _I64, _I64, _U32, _I, _I],
    "cusparseLtStructuredDescriptorInit": [_P, _P, _I64, _I64, _I64, _U32, _I, _I, _I],
    "cusparseLtMatDescriptorDestroy": [_P],
    "cusparseLtMatmulDescriptorInit": [_P, _P, _I, _I, _P, _P, _P, _P, _I],
    "cusparseLtMatmulDescSetAttribute": [_P, _P, _I, _P, _SIZE],
    "cusparseLtMatmulAlgSelectionInit": [_P, _P, _P, _I],
    "cusparseLtMatmulAlgSetAttribute": [_P, _P, _I, _P, _SIZE],
    "cusparseLtMatmulAlgGetAttribute": [_P, _P, _I, _P, _SIZE],
    "cusparseLtMatmulPlanInit": [_P, _P, _P, _P],
    "cusparseLtMatmulPlanDestroy": [_P],
    "cusparseLtMatmulGetWorkspace": [_P, _P, _P],
    "cusparseLtMatmul": _LAUNCH,
    "cusparseLtMatmulSearch": _LAUNCH,
    "cusparseLtSpMMACompressedSize2": [_P, _P, _P, _P],
    "cusparseLtSpMMACompress2": [_P, _P, _I, _I, _P, _P, _P, _P],
}
_SINCE_0_8 = {"cusparseLtMatmulAlgSelectionDestroy": [_P]}


class Refused(PhoenixError):
    """cuSPARSELt doesn't have what is asked for, as a shape or an algorithm."""


@cache
def library() -> Any:
    """The library, as torch has loaded it.

    Raises:
        PhoenixError: it isn't there, or is older than `OLDEST`.
    """
    folders = [Path(folder) / "nvidia" for folder in sys.path if (Path(folder) / "nvidia").is_dir()]
    for name in [_NAME, *(str(path) for folder in folders for path in sorted(folder.glob(f"*/lib/{_NAME}")))]:
        try:
            found: Any = ctypes.CDLL(name)
        except OSError:
            continue
        return declared(found)
    raise PhoenixError(f"prefill: {_NAME} was not found; install torch's own nvidia-cusparselt")


def declared(found: Any) -> Any:
    """A library with the types of what its functions take.

    Raises:
        PhoenixError: it is older than `OLDEST`.
    """
    found.cusparseLtGetErrorString.argtypes, found.cusparseLtGetErrorString.restype = [_I], ctypes.c_char_p
    for name, arguments in (_ARGUMENTS | _SINCE_0_8).items():
        if name in _ARGUMENTS or hasattr(found, name):
            getattr(found, name).argtypes = arguments
    version = []
    for which in (0, 1):  # MAJOR_VERSION, MINOR_VERSION
        number = _I()
        check(found, found.cusparseLtGetProperty(which, ctypes.byref(number)), "cusparseLtGetProperty")
        version.append(number.value)
    if tuple(version) < OLDEST:
        have, need = (".".join(map(str, pair)) for pair in (version, OLDEST))
        raise PhoenixError(f"prefill: cuSPARSELt {have} is too old; update torch for {need} or newer")
    return found


def check(found: Any, status: int, name: str) -> None:
    if status:
        said = (found.cusparseLtGetErrorString(status) or b"unknown").decode(errors="replace")
        kind = Refused if status in _REFUSALS else PhoenixError
        raise kind(f"prefill: cuSPARSELt's {name} failed ({said}, status {status}); give prefill=dense or packed")


def call(name: str, *arguments: Any) -> None:
    """Call a function of the library.

    Raises:
        Refused: it says that this isn't supported, or no valid value.
        PhoenixError: it fails otherwise.
    """
    found = library()
    check(found, getattr(found, name)(*arguments), name)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """A GPU as the current one, with torch's context."""
    return torch.cuda.device(device)


def stream_of(device: torch.device) -> int:
    """torch's current stream on a GPU."""
    return torch.cuda.current_stream(device).cuda_stream


class Opaque:
    """Memory for one of the library's structures, at an address that it takes."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(_BYTES + ALIGNED)
        self.at = -(-ctypes.addressof(self._memory) // ALIGNED) * ALIGNED


@cache
def handle(device: torch.device) -> Opaque:
    """The library's handle for a GPU, which has to be the current one. It is never destroyed: plans may live on."""
    made = Opaque()
    torch.empty(1, device=device)  # torch's context is there
    call("cusparseLtInit", made.at)
    return made


def sparse(of: int, shape: tuple[int, int], dtype: torch.dtype) -> Opaque:
    """A descriptor of W (out, in), with a handle at `of`."""
    made, (out, columns) = Opaque(), shape
    kind = (TYPES[dtype], BY_ROWS, _HALF)
    call("cusparseLtStructuredDescriptorInit", of, made.at, out, columns, columns, ALIGNED, *kind)
    return made


def compress(weight: Tensor) -> Tensor:
    """The library's form of a 2:4 matrix.

    Args:
        weight: (out, in) in bfloat16 or float16, row by row, on a GPU, of which every four keep at most two.

    Returns:
        (as many values as the library says,) in the same dtype: values and places as only the library reads them.

    Raises:
        Refused: it doesn't take this shape.
        PhoenixError: it fails.
    """
    size, working = _SIZE(), _SIZE()
    with LOCK, on(weight.device):
        of = handle(weight.device).at
        matrix = sparse(of, (weight.shape[0], weight.shape[1]), weight.dtype)
        try:
            sizes = (ctypes.byref(size), ctypes.byref(working))
            call("cusparseLtSpMMACompressedSize2", of, matrix.at, *sizes)
            compressed = weight.new_empty(-(-size.value // weight.itemsize))
            buffer = torch.empty(max(1, working.value), dtype=torch.uint8, device=weight.device)
            pointers = (weight.data_ptr(), compressed.data_ptr(), buffer.data_ptr(), stream_of(weight.device))
            call("cusparseLtSpMMACompress2", of, matrix.at, 1, NO, *pointers)
        finally:
            call("cusparseLtMatDescriptorDestroy", matrix.at)
    return compressed
