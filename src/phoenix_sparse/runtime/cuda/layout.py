"""A packed matrix as the GPU's kernels read it.

The matrix is cut into tiles of 16 x 128. A warp owns 128 columns after 128 columns of its share of a row of tiles, in
eight rows of tiles side by side, and goes on with the next eight. In a tile each of its 32 lanes owns the 64 positions
that it holds in `mma.m16n8k16`: two words of the bitmap. Kept values of even columns form a lane's low stream, those of
odd columns its high stream. Row r of a warp's memory holds value r of the low and of the high stream of every lane,
lane by lane, two bytes each. Of int8 values a lane has one stream, whose values 4 r to 4 r + 3 are in row r.

Lanes keep different numbers of values, so their streams drift apart. At each tile the warp's window moves on, `step`
rows, so far that no lane is more than `slack` rows behind its end; a lane that is further behind skips what lies before
the window. Kernel and layout follow the same rule, hence nothing but the steps is stored.

The streams go on from one warp of a block of threads to the next, or those of all lanes would have to end together, and
the longest of them would say where. So a warp also knows where in its first rows each of its lanes begins.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.cuda.operands import FLOATS
from phoenix_sparse.runtime.cuda.windows import COPIED, part, ring_for, walk
from phoenix_sparse.runtime.kernels import portable

TILE_ROWS, TILE_COLUMNS, LANES = 16, 128, 32
TAIL = {1: 16, 2: 32}
"""Rows that the values of one tile take at most, by bytes of a value."""
TOGETHER = 7  # rows of tiles that a warp takes through its columns together
SLAB = 8192  # columns that one block of threads handles, at most: it reads all of x's for every eight rows of tiles
WORD = 4  # bytes of a lane in a row
MOST_SLACK = 255 // WORD - COPIED  # offsets of lanes are bytes
ABSENT = 127  # the byte that int8 values are subtracted from, which a missing one becomes
CHUNK = 8192  # tiles whose values are placed at a time


@dataclass(frozen=True)
class Plan:
    """What a layout is built for.

    Attributes:
        processors: blocks of threads that run at once, one a multiprocessor.
        warps: of a block.
        slack: rows that streams may drift apart, at most `MOST_SLACK`.
        ring: rows that a warp has shared memory for, at most: enough for `slack` and a tile of nothing but values.
        deepest: tiles that copies may run ahead, at most; the kernel has room for 7, but on an H200 more than 4 make it
            slower.
    """

    processors: int
    warps: int = 8
    slack: int = 24
    ring: int = 112
    deepest: int = 4

    def __post_init__(self) -> None:
        least = self.slack + max(TAIL.values()) + COPIED - 1
        if (
            self.ring < least
            or self.ring % COPIED
            or not 1 <= self.deepest <= 7
            or min(self.processors, self.warps) < 1
            or not 0 <= self.slack <= MOST_SLACK
        ):
            raise PhoenixError(
                f"layout: {self} can't be; its ring needs {least} rows, in eights, and slack at most {MOST_SLACK}"
            )


@dataclass
class Layout:
    """The arrays of one matrix (out, in) of 2-byte floats or of int8.

    Attributes:
        shape: (out, in).
        warps_per_block: of the plan.
        groups: parts that rows of tiles are divided into.
        slabs: parts that columns are divided into; blocks of threads are groups · slabs.
        depth: tiles that copies run ahead, as many as the ring holds.
        ring: rows of it that are needed.
        half: what products are in, 0 for bfloat16 and 1 for float16.
        values: the streams: floats (rows of all blocks, 32, 2), or int8 (rows of all blocks, 32, 4) whose bits are the
            byte 127 - value.
        bitmaps: int32 (tiles + depth, 32, 2); bit 8 (2 h + o) + q of word k is row lane // 4 + 8 h, column
            64 k + 16 (lane % 4) + 2 q + o.
        headers: int32 (tiles + depth,): step, and 256 times the eights of rows to copy for the tile that is `depth`
            ahead.
        warps: int32 (blocks of threads · warps, 4): first tile, first eight of rows, and eights to copy for each of the
            first `depth` tiles, a byte each.
        offsets: uint8 (blocks of threads · warps, 32, streams), where a warp's streams begin, in values from its first
            row.
        counters: int32 (groups,), 0 between launches; for two at once the matrix would need two of them.
    """

    shape: tuple[int, int]
    warps_per_block: int
    groups: int
    slabs: int
    depth: int
    ring: int
    half: int
    values: Tensor
    bitmaps: Tensor
    headers: Tensor
    warps: Tensor
    offsets: Tensor
    counters: Tensor

    @property
    def tiles(self) -> int:
        """Rows of tiles."""
        return -(-self.shape[0] // TILE_ROWS)

    @property
    def blocks(self) -> int:
        """Columns of tiles."""
        return -(-self.shape[1] // TILE_COLUMNS)

    @property
    def dtype(self) -> torch.dtype:
        """That products are in, and W when it is expanded."""
        return FLOATS[self.half]

    @property
    def int8(self) -> bool:
        """Whether values are int8, to be scaled row by row."""
        return self.values.dtype == torch.int8

    @property
    def tail(self) -> int:
        """Rows that a tile's values take at most."""
        return TAIL[self.values.itemsize]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.tensors())

    def tensors(self) -> list[Tensor]:
        """The arrays, in the order of the fields."""
        return [self.values, self.bitmaps, self.headers, self.warps, self.offsets, self.counters]


def divide(tiles: int, blocks: int, processors: int) -> tuple[int, int]:
    """(groups, slabs) for a matrix of so many tiles."""
    slabs = max(1, min(processors, -(-blocks * TILE_COLUMNS // SLAB)))
    return max(1, min(tiles, processors // slabs)), slabs


def _parts(count: int, parts: int) -> Tensor:
    """Where each of `parts` equal parts of `count` begins, and the end: as the kernel divides."""
    return torch.arange(parts + 1) * count // parts


def _shares(count: int, warps: int, tile: int) -> Tensor:
    """Where each warp's part of a row of tiles begins, and the end: as kernels.cu's Share."""
    return (torch.arange(warps + 1) * count + tile * 5 % warps) // warps


def order(tiles: int, blocks: int, groups: int, slabs: int, warps: int) -> tuple[Tensor, Tensor]:
    """The tiles (tile row · blocks + tile column) warp after warp, and how many each warp has."""
    rows = _parts(tiles, groups)
    found, counts = [], []
    columns = _parts(blocks, slabs)
    for slab in range(slabs):
        first, last = int(columns[slab]), int(columns[slab + 1])
        for group in range(groups):
            tiles_here = torch.arange(int(rows[group]), int(rows[group + 1])).split(TOGETHER)
            shares = [
                (some * blocks + first, _shares(last - first, warps, int(some[0])).tolist()) for some in tiles_here
            ]
            for warp in range(warps):
                own = [(torch.arange(at[warp], at[warp + 1])[:, None] + start).flatten() for start, at in shares]
                found.extend(own)
                counts.append(sum(map(len, own)))
    return torch.cat(found), torch.tensor(counts)


def _fragments(matrix: Tensor) -> Tensor:
    """(16 T, 128 B) -> (T · B, lane, stream, place in the stream's tile: word, pair, half)."""
    tiles, blocks = matrix.shape[0] // TILE_ROWS, matrix.shape[1] // TILE_COLUMNS
    parts = matrix.view(tiles, 2, 8, blocks, 2, 4, 8, 2)  # tile, half, row, block, word, quarter, pair, odd
    return parts.permute(0, 3, 2, 5, 7, 4, 6, 1).reshape(tiles * blocks, LANES, 2, -1)


def _joined(fragments: Tensor) -> Tensor:
    """(…, stream, place) -> (…, 1, place) with both streams' places in turn: the only stream of int8 values."""
    return fragments.transpose(-1, -2).flatten(-2).unsqueeze(-2)


def build(
    bitmask: Tensor, values: Tensor, row_offsets: Tensor, columns: int, plan: Plan, dtype: torch.dtype | None = None
) -> Layout:
    """The layout of a packed matrix, on its device.

    Args:
        bitmask: uint8 (out, ⌈columns/8⌉), as in `packed.Packed`.
        values: (nnz,) bfloat16, float16 or int8.
        row_offsets: int64 (out + 1).
        columns: of the matrix.
        plan: what to build it for.
        dtype: bfloat16 or float16, that products with int8 values are in; others are in the values' own.

    Raises:
        PhoenixError: `dtype` is another.
    """
    out, device = bitmask.shape[0], bitmask.device
    dtype = dtype or values.dtype
    if dtype not in FLOATS or values.dtype not in (dtype, torch.int8):
        raise PhoenixError(f"layout: no products of {values.dtype} in {dtype}; give bfloat16 or float16")
    whole = values.dtype == torch.int8
    streams, per_row = (1, WORD) if whole else (2, 1)
    stored = (ABSENT - values.short()).to(torch.uint8) if whole else values.view(torch.int16)
    dense = portable.unpack(bitmask, stored, row_offsets, columns)
    kept = portable.unpack(bitmask, torch.ones_like(values, dtype=torch.int8), row_offsets, columns)
    padding = (0, -columns % TILE_COLUMNS, 0, -out % TILE_ROWS)
    weights = _fragments(torch.nn.functional.pad(dense, padding))
    kept = _fragments(torch.nn.functional.pad(kept, padding))
    del dense
    tiles, blocks = -(-out // TILE_ROWS), -(-columns // TILE_COLUMNS)
    groups, slabs = divide(tiles, blocks, plan.processors)
    sequence, counts = (part.to(device) for part in order(tiles, blocks, groups, slabs, plan.warps))

    # Tiles by warp, those that are missing behind the last one empty.
    longest = int(counts.max())
    first = counts.cumsum(0) - counts
    present = torch.arange(longest, device=device) < counts[:, None]
    number = (first[:, None] + torch.arange(longest, device=device)).where(present, 0)
    sizes = kept.sum(-1, dtype=torch.int32)  # (tiles, 32, 2)
    sizes = (sizes.sum(-1, dtype=torch.int32) if whole else sizes.flatten(1))[sequence]  # (tiles, lanes · streams)
    chains = (number.view(-1, plan.warps * longest), present.view(-1, plan.warps * longest))
    walked = walk(sizes, *chains, plan.slack, per_row)
    rows = (walked[2][:, -1] + COPIED - 1) // COPIED  # eights of each block's memory
    starts, windows, ends = (one.reshape(len(counts), longest, *one.shape[2:]) for one in walked)
    begins, offsets, steps, eights = part(starts, windows, ends, counts, per_row)
    before = (rows.cumsum(0) - rows).repeat_interleave(plan.warps)

    fetch = eights.diff(dim=1, prepend=torch.zeros_like(eights[:, :1]))  # never negative
    depth, ring = ring_for(eights, steps.cumsum(1), plan.ring, plan.deepest, TAIL[stored.itemsize])
    ahead = torch.nn.functional.pad(fetch, (0, depth))[:, depth:]
    headers = torch.nn.functional.pad((steps + ahead * 256)[present], (0, depth))
    at_first = torch.nn.functional.pad(fetch[:, :depth], (0, max(0, 8 - min(depth, longest))))
    words = (at_first.view(-1, 2, 4) << torch.arange(0, 32, 8, device=device)).sum(-1)
    warps = torch.cat([torch.stack([first, before + begins], 1), words], 1).int()

    place = (before[:, None, None] * (COPIED * per_row) + starts)[present]  # (tiles, lanes · streams): of first values
    memory = torch.zeros(max(1, int(rows.sum())) * COPIED, LANES, streams * per_row, dtype=stored.dtype, device=device)
    bitmaps = torch.zeros(len(sequence) + depth, LANES, 2, dtype=torch.int32, device=device)
    lanes = torch.arange(streams * LANES, device=device).view(1, LANES, streams, 1) * per_row
    row = LANES * streams * per_row
    for chunk in range(0, len(sequence), CHUNK):
        some = sequence[chunk : chunk + CHUNK]
        here, found = kept[some], weights[some]
        bitmaps[chunk : chunk + len(some)] = _words(here)
        if whole:
            here, found = _joined(here), _joined(found)
        nth = place[chunk : chunk + CHUNK].view(-1, LANES, streams, 1) + here.cumsum(-1, dtype=torch.int32) - here
        taken = here.bool()
        memory.view(-1)[(nth // per_row * row + lanes + nth % per_row)[taken]] = found[taken]
    headers = headers.int().contiguous()
    counters = torch.zeros(groups, dtype=torch.int32, device=device)
    return Layout(
        (out, columns),
        plan.warps,
        groups,
        slabs,
        depth,
        ring,
        FLOATS.index(dtype),
        memory.view(values.dtype),
        bitmaps,
        headers,
        warps,
        offsets.view(-1, LANES, streams),
        counters,
    )


def _words(kept: Tensor) -> Tensor:
    """Bitmaps (tiles, lane, word) of int8 (tiles, lane, stream, place)."""
    place = torch.arange(kept.shape[-1] // 2, device=kept.device)  # within a word: 2 · pair + half
    shift = (place % 2) * 16 + place // 2 + torch.tensor([0, 8], device=kept.device)[:, None, None]
    words = (kept.unflatten(-1, (2, -1)).long() << shift).sum((-1, -3))
    return torch.where(words >= 2**31, words - 2**32, words).int()
