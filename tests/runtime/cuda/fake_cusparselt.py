"""cuSPARSELt's functions as cusparseLt.h declares them, on the CPU: they check what they get, and compute."""

import ctypes
from types import SimpleNamespace

import torch

P, INT, I64, U32, SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint32, ctypes.c_size_t
INVALID, FAILED, UNSUPPORTED = 3, 6, 10
ROW, COLUMN = 2, 1
DTYPES = {2: torch.float16, 14: torch.bfloat16}
STREAM = 0x5EED
FOUND = (17, -1, 2)
SPACE = 96  # bytes that a product with a split sum works in
STRUCTURE = 512


def at(address, count, dtype):
    """Memory as a tensor."""
    size = count * torch.empty(0, dtype=dtype).element_size()
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=dtype)


def value_at(address, kind=INT):
    return kind.from_address(address).value


class Fake:
    """The library; `functions` are real C function pointers, so that arguments go through ctypes as to the real one."""

    def __init__(self, version=(0, 8), kernels=lambda rows: 20):
        self.version, self.kernels = version, kernels
        self.calls, self.wrong, self.alive, self.refuse, self.fail = [], [], {}, set(), {}
        library = SimpleNamespace()
        for name, arguments in DECLARED.items():
            if name != "MatmulAlgSelectionDestroy" or version >= (0, 8):
                pointer = ctypes.CFUNCTYPE(INT, *arguments)(self.wrapped(name))
                setattr(library, f"cusparseLt{name}", pointer)
        library.cusparseLtGetErrorString = self.text
        self.library = library

    @staticmethod
    def text(status):
        return {INVALID: b"invalid value", FAILED: b"kernel launch failure"}.get(status, b"operation not supported")

    def wrapped(self, name):
        function = getattr(self, name)

        def run(*arguments):
            self.calls.append(name)
            if name in self.fail:
                return self.fail[name]
            try:
                return function(*arguments) or 0
            except Exception as error:  # an exception can't pass through C
                self.wrong.append(f"{name}: {error!r}")
                return FAILED

        return run

    def count(self, name):
        return self.calls.count(name)

    def new(self, address, **facts):
        assert address % 16 == 0, "16-byte aligned"
        ctypes.memset(address, 0xAB, STRUCTURE)  # the memory is there, and nobody else's
        self.alive[address] = SimpleNamespace(**facts)

    def gone(self, address):
        assert address in self.alive, "destroyed twice, or never made"
        del self.alive[address]

    def GetProperty(self, which, value):
        INT.from_address(value).value = self.version[which]

    def Init(self, handle):
        self.new(handle, kind="handle")

    def matrix(self, handle, address, rows, columns, ld, alignment, dtype, order, sizes, **facts):
        assert self.alive[handle].kind == "handle"
        if alignment % 16 or rows % sizes or columns % sizes or dtype not in DTYPES or (rows, columns) in self.refuse:
            return UNSUPPORTED
        if ld < (columns if order == ROW else rows):
            return INVALID
        facts |= {"rows": rows, "columns": columns, "ld": ld, "dtype": DTYPES[dtype], "order": order}
        return self.new(address, kind="matrix", **facts)

    def DenseDescriptorInit(self, handle, address, rows, columns, ld, alignment, dtype, order):
        return self.matrix(handle, address, rows, columns, ld, alignment, dtype, order, 8, sparse=False)

    def StructuredDescriptorInit(self, handle, address, rows, columns, ld, alignment, dtype, order, sparsity):
        assert sparsity == 0
        return self.matrix(handle, address, rows, columns, ld, alignment, dtype, order, 16, sparse=True)

    def MatmulDescriptorInit(self, handle, address, op_a, op_b, a, b, c, d, compute):
        a, b, c, d = (self.alive[matrix] for matrix in (a, b, c, d))
        assert (a.sparse, b.sparse, op_a, op_b, compute) == (True, False, 0, 1, 2)
        assert (a.order, b.order, c.order) == (ROW, ROW, COLUMN)
        assert c is d
        assert (b.columns, c.rows, c.columns) == (a.columns, a.rows, b.rows)
        assert (a.ld, b.ld, c.ld) == (a.columns, b.columns, c.rows)
        self.new(address, kind="product", a=a, b=b, bias=None)

    def MatmulDescSetAttribute(self, handle, product, which, data, size):
        assert (which, size) == (8, 8)
        self.alive[product].bias = value_at(data, ctypes.c_uint64)

    def MatmulAlgSelectionInit(self, handle, address, product, which):
        assert which == 0
        self.new(address, kind="way", product=self.alive[product], found=[0, 1, 1])

    def MatmulAlgSetAttribute(self, handle, address, which, data, size):
        assert size == 4
        way, value = self.alive[address], value_at(data)
        if (which == 0 and not 0 <= value < self.kernels(way.product.b.rows)) or (which == 4 and value not in (1, 2)):
            return INVALID
        way.found[{0: 0, 3: 1, 4: 2}[which]] = value
        return 0

    def MatmulAlgGetAttribute(self, handle, address, which, data, size):
        assert size == 4
        way = self.alive[address]
        known = dict(zip((0, 3, 4), way.found, strict=True)) | {1: self.kernels(way.product.b.rows)}
        INT.from_address(data).value = known[which]

    def MatmulPlanInit(self, handle, address, product, way):
        assert self.alive[way].product is self.alive[product]
        self.new(address, kind="plan", product=self.alive[product], way=self.alive[way])

    def MatmulGetWorkspace(self, handle, plan, size):
        SIZE.from_address(size).value = SPACE if self.alive[plan].way.found[1] != 1 else 0

    def MatDescriptorDestroy(self, address):
        self.gone(address)

    MatmulAlgSelectionDestroy = MatmulPlanDestroy = MatDescriptorDestroy

    def SpMMACompressedSize2(self, handle, matrix, size, buffer):
        a = self.alive[matrix]
        SIZE.from_address(size).value = a.rows * a.columns + a.rows * a.columns // 4  # values, places of each four
        SIZE.from_address(buffer).value = 48

    def SpMMACompress2(self, handle, matrix, is_a, op, dense, compressed, buffer, stream):
        a = self.alive[matrix]
        assert (is_a, op, stream) == (1, 0, STREAM)
        ctypes.memset(buffer, 1, 48)
        fours = at(dense, a.rows * a.columns, a.dtype).view(-1, 4)
        places = torch.argsort((fours != 0).int(), dim=-1, descending=True, stable=True)[:, :2]
        at(compressed, a.rows * a.columns // 2, a.dtype).copy_(fours.gather(1, places).view(-1))
        at(compressed + a.rows * a.columns, len(fours), torch.uint8).copy_(places[:, 0] * 4 + places[:, 1])

    def Matmul(self, handle, plan, one, compressed, x, zero, c, d, workspace, streams, count):
        assert self.alive[handle].kind == "handle"
        assert (value_at(one, ctypes.c_float), value_at(zero, ctypes.c_float)) == (1.0, 0.0)
        assert (value_at(streams, ctypes.c_uint64), count) == (STREAM, 1)
        assert c == d
        assert not any(address % 16 for address in (compressed, x, d))
        plan = self.alive[plan]
        if plan.way.found[1] != 1:
            ctypes.memset(workspace, 0xCD, SPACE)
        product = plan.product
        out, columns, rows, dtype = product.a.rows, product.a.columns, product.b.rows, product.a.dtype
        places = at(compressed + out * columns, out * columns // 4, torch.uint8).long()
        values = at(compressed, out * columns // 2, dtype).view(-1, 2).float()
        weight = torch.zeros(len(values), 4)
        weight.scatter_(1, torch.stack([places // 4, places % 4], 1), values)
        y = at(x, rows * columns, dtype).view(rows, columns).float() @ weight.view(out, columns).t()
        if product.bias is not None:
            y += at(product.bias, out, dtype).float()
        at(d, rows * out, dtype).copy_(y.to(dtype).view(-1))  # column by column, (out, rows) is (rows, out)

    def MatmulSearch(self, *arguments):
        self.alive[arguments[1]].way.found = list(FOUND)
        self.Matmul(
            *arguments[:8], arguments[8] or ctypes.addressof(ctypes.create_string_buffer(SPACE)), *arguments[9:]
        )


LAUNCH = [P] * 10 + [ctypes.c_int32]
DECLARED = {  # as the header has it, whatever the code under test believes
    "GetProperty": [INT, P],
    "Init": [P],
    "DenseDescriptorInit": [P, P, I64, I64, I64, U32, INT, INT],
    "StructuredDescriptorInit": [P, P, I64, I64, I64, U32, INT, INT, INT],
    "MatDescriptorDestroy": [P],
    "MatmulDescriptorInit": [P, P, INT, INT, P, P, P, P, INT],
    "MatmulDescSetAttribute": [P, P, INT, P, SIZE],
    "MatmulAlgSelectionInit": [P, P, P, INT],
    "MatmulAlgSelectionDestroy": [P],
    "MatmulAlgSetAttribute": [P, P, INT, P, SIZE],
    "MatmulAlgGetAttribute": [P, P, INT, P, SIZE],
    "MatmulPlanInit": [P, P, P, P],
    "MatmulPlanDestroy": [P],
    "MatmulGetWorkspace": [P, P, P],
    "Matmul": LAUNCH,
    "MatmulSearch": LAUNCH,
    "SpMMACompressedSize2": [P, P, P, P],
    "SpMMACompress2": [P, P, INT, INT, P, P, P, P],
}
