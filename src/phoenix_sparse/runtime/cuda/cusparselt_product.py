"""Products of 2:4 matrices by cuSPARSELt: plans that are kept, their launches, and the search for an algorithm.

torch's own way to this library makes descriptors and a plan anew for each product, which takes the host 600 to 1200 µs.
Here a plan is made once for a shape and a number of rows.
"""

import ctypes
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.cuda.cusparselt import (
    ALIGNED,
    BIAS,
    BY_COLUMNS,
    BY_ROWS,
    FLOAT32,
    KERNEL,
    KERNELS,
    LOCK,
    MODE,
    NO,
    PARTS,
    TURNED,
    TYPES,
    USUAL,
    Opaque,
    Refused,
    call,
    check,
    handle,
    library,
    on,
    sparse,
    stream_of,
)

MOST_PLANS = 1024  # kept at a time, of all devices and shapes; 6 KiB of the host's memory each

Algorithm = tuple[int, int, int]
"""cuSPARSELt's number of a kernel, into how many parts the sum is split (-1: as the kernel does it), and how."""


class Plan:
    """A product of one shape with one number of rows, ready to be launched: W (out, in) · xᵀ + bias.

    The sparse matrix has to stand to the left. x (rows, in) is described as it lies and turned by the product, and the
    result (out, rows) is written column by column, which is (rows, out) row by row: nothing is copied.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        shape: tuple[int, int],
        rows: int,
        bias: int | None = None,
        algorithm: Algorithm | None = None,
    ) -> None:
        """Make it; nothing runs.

        Args:
            device: the GPU, which is the current one.
            dtype: of W, x, bias and the result.
            shape: (out, in) of W.
            rows: of x.
            bias: where the bias (out,) lies, or None. It is part of a plan.
            algorithm: the way to compute, as `search` finds it; None for the library's own choice.

        Raises:
            Refused: the library doesn't take this shape, or doesn't have this algorithm for it.
            PhoenixError: it fails.
        """
        (out, columns), kind = shape, TYPES[dtype]
        self._handle, self._made = handle(device).at, list[tuple[str, Opaque]]()
        self._factors = (ctypes.c_float * 2)(1.0, 0.0)
        self._one = ctypes.addressof(self._factors)
        self._zero = self._one + ctypes.sizeof(ctypes.c_float)
        try:
            weight = sparse(self._handle, shape, dtype)
            self._made.append(("cusparseLtMatDescriptorDestroy", weight))
            dense, into = "cusparseLtDenseDescriptorInit", "cusparseLtMatDescriptorDestroy"
            x = self._make(dense, into, rows, columns, columns, ALIGNED, kind, BY_ROWS)
            y = self._make(dense, into, out, rows, out, ALIGNED, kind, BY_COLUMNS)
            of = (NO, TURNED, weight.at, x.at, y.at, y.at, FLOAT32)
            product = self._make("cusparseLtMatmulDescriptorInit", "", *of)
            if bias is not None:
                self._set("cusparseLtMatmulDescSetAttribute", product, BIAS, ctypes.c_void_p(bias))
            gone = "cusparseLtMatmulAlgSelectionDestroy"  # since 0.8
            gone = gone if hasattr(library(), gone) else ""
            self._way = self._make("cusparseLtMatmulAlgSelectionInit", gone, product.at, USUAL)
            if algorithm is not None:
                number, parts, mode = algorithm
                if number > self._get(KERNELS):  # asked for first, since the library prints what it refuses
                    raise Refused(
                        f"prefill: cuSPARSELt has no kernel {number} for {rows} rows; give prefill=dense or packed"
                    )
                self._set("cusparseLtMatmulAlgSetAttribute", self._way, KERNEL, ctypes.c_int(number))
                if parts != 1:
                    self._set("cusparseLtMatmulAlgSetAttribute", self._way, PARTS, ctypes.c_int(parts))
                    if mode > 0:
                        self._set("cusparseLtMatmulAlgSetAttribute", self._way, MODE, ctypes.c_int(mode))
            plan = self._make("cusparseLtMatmulPlanInit", "cusparseLtMatmulPlanDestroy", product.at, self._way.at)
            workspace = ctypes.c_size_t()
            call("cusparseLtMatmulGetWorkspace", self._handle, plan.at, ctypes.byref(workspace))
        except PhoenixError:
            self.close()
            raise
        self._plan, self.workspace = plan.at, workspace.value
        """Bytes of the GPU's memory that a launch works in."""
        self._launch: Callable[..., int] = library().cusparseLtMatmul

    def _make(self, name: str, destroy: str, *arguments: int) -> Opaque:
        made = Opaque()
        call(name, self._handle, made.at, *arguments)
        self._made.append((destroy, made))  # kept in any case: plans point to what they are made of
        return made

    def _set(self, name: str, of: Opaque, which: int, value: ctypes.c_int | ctypes.c_void_p) -> None:
        call(name, self._handle, of.at, which, ctypes.byref(value), ctypes.sizeof(value))

    def _get(self, which: int) -> int:
        value = ctypes.c_int()
        size = ctypes.sizeof(value)
        call("cusparseLtMatmulAlgGetAttribute", self._handle, self._way.at, which, ctypes.byref(value), size)
        return value.value

    def run(self, x: Tensor, compressed: Tensor, y: Tensor, searching: bool = False) -> None:
        """Launch it on torch's current stream, on x's GPU as the current one.

        A launch takes memory to work in from torch's cache, as any product does: it is one stream's own, and a recorded
        graph's own, where memory of ours for all of them would be written to by two at once.
        """
        space = torch.empty(self.workspace, dtype=torch.uint8, device=x.device) if self.workspace else None
        stream, to = ctypes.c_void_p(stream_of(x.device)), y.data_ptr()
        work = None if space is None else space.data_ptr()
        operands = (self._one, compressed.data_ptr(), x.data_ptr(), self._zero, to, to, work)
        if searching:
            call("cusparseLtMatmulSearch", self._handle, self._plan, *operands, ctypes.byref(stream), 1)
            return
        status = self._launch(self._handle, self._plan, *operands, ctypes.byref(stream), 1)
        if status:
            check(library(), status, "cusparseLtMatmul")

    def way(self) -> Algorithm:
        """The algorithm that it has, or that a search has found."""
        return self._get(KERNEL), self._get(PARTS), self._get(MODE)

    def close(self) -> None:
        """Free what the library holds for it; launches that are under way go on."""
        while self._made:
            destroy, made = self._made.pop()
            if destroy:
                call(destroy, made.at)


_Key = tuple[torch.device, torch.dtype, tuple[int, int], int, int | None, Algorithm | None]
_PLANS: OrderedDict[_Key, Plan] = OrderedDict()


def _plan(key: _Key) -> Plan:
    """The plan for this, made if need be; those that have waited longest for use go when there are too many.

    An algorithm that these rows don't have, found for others, is left out: the library then chooses.
    """
    plan = _PLANS.get(key)
    if plan is not None:
        _PLANS.move_to_end(key)
        return plan
    try:
        plan = Plan(*key)
    except Refused:
        if key[-1] is None:
            raise
        plan = Plan(*key[:-1])
    _PLANS[key] = plan
    while len(_PLANS) > MOST_PLANS:
        _PLANS.popitem(last=False)[1].close()
    return plan


def multiply(x: Tensor, compressed: Tensor, out: int, bias: Tensor | None, algorithm: Algorithm | None) -> Tensor:
    """x (rows, in) · Wᵀ + bias.

    Args:
        x: (rows, in), one row after another at an address in sixteens, rows in eights.
        compressed: W (out, in) as `compress` gives it, in x's dtype.
        out: W's rows.
        bias: (out,) in x's dtype, or None. Each address has plans of its own: best one that stays.
        algorithm: as `search` finds it, for whichever number of rows; None for the library's choice.

    Returns:
        (rows, out) in x's dtype.

    Raises:
        PhoenixError: the library fails, or has no kernel for this.
    """
    rows, columns = x.shape
    device = x.device
    with LOCK, on(device):
        plan = _plan((device, x.dtype, (out, columns), rows, None if bias is None else bias.data_ptr(), algorithm))
        y = x.new_empty(rows, out)
        plan.run(x, compressed, y)
    return y


def search(x: Tensor, compressed: Tensor, out: int, bias: Tensor | None) -> Algorithm:
    """The fastest algorithm for x's number of rows, by trying all: that takes up to a second, and waits for the GPU.

    Not while a CUDA graph is recorded. Arguments and errors are `multiply`'s.
    """
    with LOCK, on(x.device):
        plan = Plan(x.device, x.dtype, (out, x.shape[1]), len(x), None if bias is None else bias.data_ptr())
        try:
            plan.run(x, compressed, x.new_empty(len(x), out), searching=True)
            return plan.way()
        finally:
            plan.close()


def takes(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], rows: int) -> bool:
    """Whether the library has a kernel for W's shape (out, in) and so many rows of x: it is asked; nothing runs."""
    with LOCK, on(device):
        try:
            Plan(device, dtype, shape, rows).close()
        except Refused:
            return False
    return True
