"""Run every kernel on random matrices whose arrays end where no memory may be read.

    python exercise.py LIBRARY CASES [BATCH ...]

A process of its own, as it may crash.
"""

import ctypes
import mmap
import random
import sys
from pathlib import Path

import torch

from phoenix_sparse.runtime.kernels.library import Library
from phoenix_sparse.runtime.kernels.slicing import count_steps, fill
from runtime.kernels.matrices import DTYPES, VALUES, expected, matrix, multiply, tolerance

KEPT = []
PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)


def at_the_edge(tensor):
    """A copy whose last byte is the last of a page, with a page behind it that may not be touched."""
    if tensor is None or not tensor.numel():
        return tensor
    room = -(-tensor.nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, room + PAGE)
    KEPT.append(memory)
    raw = torch.frombuffer(memory, dtype=torch.uint8)
    copy = raw[room - tensor.nbytes : room].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    if LIBC.mprotect(ctypes.c_void_p(raw.data_ptr() + room), ctypes.c_size_t(PAGE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    return copy


def slices(one, m, x, bias, exact, allowed):
    """The same in slices, made and taken apart."""
    matrix, columns = m.parts[:3], x.shape[1]
    made = fill(one, *matrix, count_steps(one, *matrix, columns))
    for name in ("steps", "windows", "starts", "order"):
        setattr(made, name, at_the_edge(getattr(made, name)))
    one.slice(*matrix, made)
    rows = len(m.bitmask)
    for put in (at_the_edge, torch.clone):
        again = [put(torch.zeros_like(part)) for part in matrix]
        one.unslice(made, again[2])
        again[2].copy_(again[2].cumsum(0))
        one.unslice(made, again[2], *again[:2])
        assert all(torch.equal(*pair) for pair in zip(again, matrix, strict=True))
        for dtype in DTYPES:
            dense = put(torch.ones(rows, columns, dtype=dtype))
            one.expand_slices(made, 0, -(-rows // 16), dense)
            assert torch.equal(dense != 0, m.dense[made.order.long()] != 0)
        if one.has_sliced:
            y = put(torch.zeros(x.shape[0], rows, dtype=x.dtype))
            assert one.sliced(x, made, m.scales, bias, y)
            assert ((y.double() - exact).abs() <= allowed).all()


def main(file: Path, cases: int, batches: list[int]) -> None:
    chance = random.Random(0)
    paths = Library(file).paths
    torch.set_num_threads(2)
    for case in range(cases):
        rows = chance.choice([16, 32, 64]) if case % 2 and max(batches) > 17 else chance.randint(1, 30)
        columns = chance.choice([chance.randint(1, 90), chance.randint(1, 700), 64, 256, 1024, 1100])
        m = matrix(rows, columns, chance.choice([0, 0.1, 0.5, 0.9, 1]), VALUES[case % 3], case, least=-127)
        x = torch.randn(chance.choice(batches), columns).to(chance.choice(DTYPES))
        bias = torch.randn(rows) if chance.random() < 0.5 else None
        exact, allowed = expected(m, x, bias), tolerance(m, x, bias)
        m.bitmask, m.values, m.row_offsets, m.scales = map(at_the_edge, m.parts)
        x, bias = at_the_edge(x), at_the_edge(bias)
        for path in paths:
            one = Library(file, path)
            y = at_the_edge(torch.zeros(x.shape[0], rows, dtype=x.dtype))
            one.linear(x, *m.parts, bias, y, columns)
            # Into memory of malloc's, too, which AddressSanitizer watches.
            assert torch.equal(y, multiply(one, m, x, bias))
            assert ((y.double() - exact).abs() <= allowed).all(), (path, case)
            for dtype in DTYPES if m.values.dtype != torch.float32 else DTYPES[1:]:
                one.expand(m.bitmask, m.values, m.row_offsets, 0, at_the_edge(torch.zeros(rows, columns, dtype=dtype)))
                one.expand(m.bitmask, m.values, m.row_offsets, 0, torch.zeros(rows, columns, dtype=dtype))
            if one.has_dense and x.dtype == torch.bfloat16 and x.shape[0] <= 8:
                one.dense(x, at_the_edge(torch.randn(rows, columns).bfloat16()))
            one.read(m.bitmask)
            if m.values.dtype != torch.float32:
                slices(one, m, x, bias, exact, allowed)
            assert one.check(m.bitmask, m.row_offsets, columns, m.values.numel()) == (0, 0)
        KEPT.clear()
    print(f"{cases} matrices with {', '.join(paths)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [int(batch) for batch in sys.argv[3:]] or [1, 2, 3, 4, 5, 8, 9, 17])
