"""The compiled kernels: finding them, opening them, and choosing the instruction set."""

import ctypes
import os
import warnings
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.kernels.proving import prove
from phoenix_sparse.runtime.kernels.slices import Slices

FILE = Path(__file__).with_name("libphoenix.so")
INTERFACE = 3  # phx_interface of csrc/library.cpp
VARIABLE = "PHOENIX_KERNEL"
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""Dtypes as the library numbers them."""
PROVED = ("amx",)
"""Instruction sets that the tests' processors may not have: compared with the portable one before they are used."""

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SLICES = [_POINTER] * 4 + [_LONG] * 2 + [_INT]  # as `_matrix` gives them
_FUNCTIONS = {
    "phx_interface": ([], _INT),
    "phx_paths": ([], _INT),
    "phx_path_name": ([_INT], ctypes.c_char_p),
    "phx_path_note": ([_INT], ctypes.c_char_p),
    "phx_path_available": ([_INT], _INT),
    "phx_path_dense": ([_INT], _INT),
    "phx_path_sliced": ([_INT], _INT),
    "phx_have_threads": ([], _INT),
    "phx_linear": ([_INT] * 2 + [_POINTER] * 7 + [_LONG] * 4 + [_INT] * 4, _INT),
    "phx_expand": ([_INT] * 2 + [_POINTER] * 4 + [_LONG] * 5 + [_INT] * 2, _INT),
    "phx_slice": ([_INT] + [_POINTER] * 4 + [_LONG] * 2 + [_INT] + [_POINTER] * 3, _INT),
    "phx_unslice": ([_INT, *_SLICES] + [_POINTER] * 3, _INT),
    "phx_expand_slices": ([_INT, *_SLICES] + [_LONG] * 2 + [_POINTER, _INT], _INT),
    "phx_sliced": ([_INT] * 2 + _SLICES + [_POINTER] * 4 + [_LONG] + [_INT] * 3, _INT),
    "phx_dense": ([_INT] * 2 + [_POINTER] * 3 + [_LONG] * 3, _INT),
    "phx_read": ([_INT] * 2 + [_POINTER, _LONG], ctypes.c_uint64),
    "phx_check": ([_INT] + [_POINTER] * 2 + [_LONG] * 3 + [ctypes.POINTER(_LONG)], _INT),
}
_FAULTS = {
    1: "the kernels found no memory to work in",
    2: "this instruction set has no such kernel",
    3: "row_offsets end at another number than there are values",
}
NOT_FINITE = 4


class Library:
    """The shared library, with one of its instruction sets.

    Tensors given to its methods are on the CPU, contiguous and of the right sizes: callers have checked.
    """

    def __init__(self, file: Path = FILE, path: str | None = None) -> None:
        """Open it.

        Args:
            file: the library.
            path: the instruction set; the last that this processor has unless given.

        Raises:
            OSError: it isn't there, or can't be opened.
            PhoenixError: this processor, or the library, doesn't have that instruction set.
        """
        # torch was imported above: its OpenMP runtime is then among the process's global symbols, where the library
        # looks for threads.
        self.functions = ctypes.CDLL(str(file))
        if not all(hasattr(self.functions, name) for name in _FUNCTIONS) or self.functions.phx_interface() != INTERFACE:
            raise OSError(f"{file} is of another version than this package")
        for name, (arguments, result) in _FUNCTIONS.items():
            function = getattr(self.functions, name)
            function.argtypes, function.restype = arguments, result
        # From the last on, and no further than needed: to look whether AMX can be used is to ask the system for it.
        for number in reversed(range(self.functions.phx_paths())):
            name = self.functions.phx_path_name(number).decode()
            if path in (None, name) and self.functions.phx_path_available(number):
                self.path, self.number = name, number
                break
        else:
            found = ", ".join([*self.paths, "torch"])
            raise PhoenixError(f"{VARIABLE}: {path!r} can't be used here; choose one of {found}")
        self.has_threads = bool(self.functions.phx_have_threads())
        self.has_dense = bool(self.functions.phx_path_dense(self.number))
        self.has_sliced = bool(self.functions.phx_path_sliced(self.number))

    @cached_property
    def paths(self) -> list[str]:
        """The instruction sets that this processor has."""
        numbers = filter(self.functions.phx_path_available, range(self.functions.phx_paths()))
        return [self.functions.phx_path_name(number).decode() for number in numbers]

    def describe(self) -> str:
        """The instruction set and the threads, in words."""
        note = self.functions.phx_path_note(self.number).decode()
        threads = "torch's threads" if self.has_threads else "one thread (torch's OpenMP runtime was not found)"
        return f"{self.path}: {note}; {threads}"

    def linear(
        self,
        x: Tensor,
        bitmask: Tensor,
        values: Tensor,
        row_offsets: Tensor,
        scales: Tensor | None,
        bias: Tensor | None,
        y: Tensor,
        columns: int,
    ) -> None:
        """y (batch, out) = x (batch, in) Wᵀ; see `sparse_linear`."""
        rows = bitmask.shape[0]
        fault = self.functions.phx_linear(
            self.number,
            torch.get_num_threads(),
            bitmask.data_ptr(),
            values.data_ptr(),
            row_offsets.data_ptr(),
            None if scales is None else scales.data_ptr(),
            None if bias is None else bias.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            rows,
            columns,
            values.numel(),
            x.numel() // columns,
            CODES[values.dtype],
            CODES[x.dtype],
            0 if scales is None else CODES[scales.dtype],
            0 if bias is None else CODES[bias.dtype],
        )
        if fault:
            raise PhoenixError(f"sparse_linear: {_FAULTS[fault]}")

    def expand(self, bitmask: Tensor, values: Tensor, row_offsets: Tensor, first: int, out: Tensor) -> None:
        """Write rows from `first` on, as many as `out` (rows, in) has; float32, or bfloat16 for bfloat16 and int8."""
        fault = self.functions.phx_expand(
            self.number,
            torch.get_num_threads(),
            bitmask.data_ptr(),
            values.data_ptr(),
            row_offsets.data_ptr(),
            out.data_ptr(),
            bitmask.shape[0],
            out.shape[1],
            values.numel(),
            first,
            first + out.shape[0],
            CODES[values.dtype],
            CODES[out.dtype],
        )
        if fault:
            raise PhoenixError(f"sparse_linear: {_FAULTS[fault]}")

    def slice(
        self, bitmask: Tensor, values: Tensor, row_offsets: Tensor, slices: Slices, *, count: bool = False
    ) -> None:
        """Fill `steps` and `windows`, or count the steps of each slice into `starts[1:]` (csrc/slicing.cpp)."""
        fault = self.functions.phx_slice(
            torch.get_num_threads(),
            bitmask.data_ptr(),
            values.data_ptr(),
            row_offsets.data_ptr(),
            slices.order.data_ptr(),
            bitmask.shape[0],
            slices.columns,
            CODES[values.dtype],
            slices.starts.data_ptr(),
            None if count else slices.steps.data_ptr(),
            None if count else slices.windows.data_ptr(),
        )
        if fault:
            raise PhoenixError(f"sparse_linear: {_FAULTS[fault]}")

    def unslice(
        self, slices: Slices, row_offsets: Tensor, bitmask: Tensor | None = None, values: Tensor | None = None
    ) -> None:
        """Fill `bitmask` (of zeros) and `values`, or count the values of each row into `row_offsets[1:]`."""
        self.functions.phx_unslice(
            torch.get_num_threads(),
            *_matrix(slices),
            row_offsets.data_ptr(),
            None if bitmask is None else bitmask.data_ptr(),
            None if values is None else values.data_ptr(),
        )

    def expand_slices(self, slices: Slices, first: int, last: int, out: Tensor) -> None:
        """Write the rows of slices first to last - 1, in their order, to `out` (rows, in), float32 or bfloat16."""
        self.functions.phx_expand_slices(
            torch.get_num_threads(), *_matrix(slices), first, last, out.data_ptr(), CODES[out.dtype]
        )

    def sliced(self, x: Tensor, slices: Slices, scales: Tensor | None, bias: Tensor | None, y: Tensor) -> bool:
        """y (batch, out) = x (batch, in) Wᵀ; see `sliced_linear`. False: x isn't finite, and y is undefined."""
        fault = self.functions.phx_sliced(
            self.number,
            torch.get_num_threads(),
            *_matrix(slices),
            None if scales is None else scales.data_ptr(),
            None if bias is None else bias.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            x.numel() // slices.columns,
            CODES[x.dtype],
            0 if scales is None else CODES[scales.dtype],
            0 if bias is None else CODES[bias.dtype],
        )
        if fault and fault != NOT_FINITE:
            raise PhoenixError(f"sparse_linear: {_FAULTS[fault]}")
        return not fault

    def dense(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (batch, in) · weightᵀ (in, out), all bfloat16, batch 1 to 8.

        Sparse kernels are measured against it, and a packed model's dense head is multiplied by it.

        Raises:
            PhoenixError: this instruction set doesn't have it.
        """
        y = x.new_empty(x.shape[0], weight.shape[0])
        fault = self.functions.phx_dense(
            self.number,
            torch.get_num_threads(),
            weight.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            weight.shape[0],
            weight.shape[1],
            x.shape[0],
        )
        if fault:
            raise PhoenixError(f"dense kernel: {_FAULTS[fault]}")
        return y

    def read(self, memory: Tensor) -> None:
        """Read a tensor's bytes with all threads, to measure how fast that goes."""
        self.functions.phx_read(self.number, torch.get_num_threads(), memory.data_ptr(), memory.nbytes)

    def check(self, bitmask: Tensor, row_offsets: Tensor, columns: int, count: int) -> tuple[int, int]:
        """What is wrong with them, and in which row; (0, 0) if nothing (csrc/library.cpp, phx_check)."""
        where = _LONG()
        wrong = self.functions.phx_check(
            torch.get_num_threads(),
            bitmask.data_ptr(),
            row_offsets.data_ptr(),
            bitmask.shape[0],
            columns,
            count,
            ctypes.byref(where),
        )
        return wrong, where.value


def _matrix(slices: Slices) -> tuple[int, ...]:
    parts = (slices.steps, slices.windows, slices.starts, slices.order)
    return (*(part.data_ptr() for part in parts), slices.order.numel(), slices.columns, CODES[slices.values])


def proven(path: str | None = None) -> Library:
    """The library with an instruction set, compared with the portable one if it is among the `PROVED`.

    Raises:
        OSError: it can't be opened.
        PhoenixError: that instruction set isn't there, or computes wrongly here.
    """
    found = Library(FILE, path)
    if found.path in PROVED:
        prove(found, Library(FILE, "portable"))
    return found


@cache
def library() -> Library | None:
    """The library with the instruction set of `PHOENIX_KERNEL`, or the best; None where torch does the work.

    Where the library can't be opened, or the best computes wrongly here and another is taken, that is said once.

    Raises:
        PhoenixError: `PHOENIX_KERNEL` asks for what isn't there, or for what computes wrongly here.
    """
    path = os.environ.get(VARIABLE) or None
    if path == "torch":
        return None
    try:
        return proven(path)
    except PhoenixError as error:
        if path is not None:
            raise
        other = [name for name in Library(FILE).paths if name not in PROVED][-1]
        warnings.warn(f"phoenix_sparse: {error}; {other!r} is taken", stacklevel=2)
        return Library(FILE, other)
    except OSError as error:
        if path is not None:
            raise PhoenixError(f"{VARIABLE}: {path!r} needs the compiled kernels, and {_reason(error)}") from error
        warnings.warn(
            f"phoenix_sparse: {_reason(error)}; sparse layers work, but a token takes about ten times as long as of a "
            "dense model (they are unpacked for each call). Install phoenix-sparse again, where there is a C++ "
            "compiler, or write the dense model with `phx unpack`",
            stacklevel=2,
        )
        return None


def _reason(error: OSError) -> str:
    found = f"can't be opened ({error})" if FILE.exists() else "were not built when installing"
    return f"the CPU kernels {found}"


def describe() -> str:
    """Which kernels sparse layers use on this machine, in one line."""
    found = library()
    return "torch: weights are unpacked for each call" if found is None else found.describe()
