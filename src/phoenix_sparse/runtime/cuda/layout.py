"""A packed matrix as the GPU's kernels read it.

The matrix is cut into tiles of 16 x 128. A warp owns 128 columns after 128 columns of its share of a row of tiles, in
eight rows of tiles side by side, and goes on with the next eight. In a tile each of its 32 lanes owns the 64 positions
that it holds in `mma.m16n8k16`: two words of the bitmap. Kept values of even columns form a lane's low stream, those of
odd columns its high stream. Row r of a warp's memory holds value r of the low and of the high stream of every lane,
lane by lane, two bytes each.

Lanes keep different numbers of values, so their streams drift apart. At each tile the warp's window moves on, `step`
rows, so far that no lane is more than `slack` rows behind its end; a lane that is further behind skips what lies before
the window. Kernel and layout follow the same rule, hence nothing but the steps is stored.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.kernels import portable

TILE_ROWS, TILE_COLUMNS, LANES = 16, 128, 32
PER_STREAM = 32
"""Positions of one stream in one tile."""
TOGETHER = 8  # rows of tiles that a warp takes through its columns together
SLAB = 8192  # columns that one block of threads handles, at most: it reads all of x's for every eight rows of tiles
COPIED = 8  # rows that are copied at once
CHUNK = 8192  # tiles whose values are placed at a time


@dataclass(frozen=True)
class Plan:
    """What a layout is built for.

    Attributes:
        processors: blocks of threads that run at once, one a multiprocessor.
        warps: of a block.
        slack: rows that streams may drift apart.
        ring: rows that a warp has shared memory for, at most: enough for `slack` and a tile of nothing but values.
        deepest: tiles that copies may run ahead, at most; the kernel has room for 7.
    """

    processors: int
    warps: int = 8
    slack: int = 24
    ring: int = 96
    deepest: int = 7

    def __post_init__(self) -> None:
        least = self.slack + PER_STREAM + COPIED - 1
        if (
            self.ring < least
            or self.ring % COPIED
            or not 1 <= self.deepest <= 7
            or min(self.processors, self.warps) < 1
        ):
            raise PhoenixError(f"layout: {self} can't be; its ring needs {least} rows, in eights")


@dataclass
class Layout:
    """The arrays of one matrix (out, in) in 2-byte floats.

    Attributes:
        shape: (out, in).
        warps_per_block: of the plan.
        groups: parts that rows of tiles are divided into.
        slabs: parts that columns are divided into; blocks of threads are groups · slabs.
        depth: tiles that copies run ahead, as many as the ring holds.
        ring: rows of it that are needed.
        values: (rows of all warps, 32, 2), the streams.
        bitmaps: int32 (tiles + depth, 32, 2); bit 8 (2 h + o) + q of word k is row lane // 4 + 8 h, column
            64 k + 16 (lane % 4) + 2 q + o.
        headers: int32 (tiles + 2,): step, and 256 times the eights of rows to copy for the tile that is `depth` ahead.
        warps: int32 (blocks of threads · warps, 4): first tile, first eight of rows, tiles, eights to copy at first.
        counters: int32 (groups,), 0 between launches; for two at once the matrix would need two of them.
    """

    shape: tuple[int, int]
    warps_per_block: int
    groups: int
    slabs: int
    depth: int
    ring: int
    values: Tensor
    bitmaps: Tensor
    headers: Tensor
    warps: Tensor
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
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.tensors())

    def tensors(self) -> list[Tensor]:
        """The arrays, in the order of the fields."""
        return [self.values, self.bitmaps, self.headers, self.warps, self.counters]


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
    return parts.permute(0, 3, 2, 5, 7, 4, 6, 1).reshape(tiles * blocks, LANES, 2, PER_STREAM)


def build(bitmask: Tensor, values: Tensor, row_offsets: Tensor, columns: int, plan: Plan) -> Layout:
    """The layout of a packed matrix, on its device.

    Args:
        bitmask: uint8 (out, ⌈columns/8⌉), as in `packed.Packed`.
        values: (nnz,) bfloat16 or float16.
        row_offsets: int64 (out + 1).
        columns: of the matrix.
        plan: what to build it for.
    """
    out, device = bitmask.shape[0], bitmask.device
    dense = portable.unpack(bitmask, values.view(torch.int16), row_offsets, columns)
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
    sizes = kept.sum(-1, dtype=torch.int32).flatten(1)[sequence]  # (tiles, 64)
    starts, steps, ends = _walk(sizes, number, present, plan.slack)

    eights = (ends + COPIED - 1) // COPIED  # by warp and tile, never falling
    per_warp = eights[:, -1]
    fetch = eights.diff(dim=1, prepend=torch.zeros_like(eights[:, :1]))
    depth, ring = _ring(eights, steps.cumsum(1), plan)
    ahead = torch.nn.functional.pad(fetch, (0, depth))[:, depth:]
    headers = torch.nn.functional.pad((steps + ahead * 256)[present], (0, 2))
    begins = per_warp.cumsum(0) - per_warp
    warps = torch.stack([first, begins, counts, eights[:, min(depth, longest) - 1]], 1).int()

    place = (begins[:, None, None] * COPIED + starts)[present]  # (tiles, 64): the row of a stream's first value
    streams = torch.zeros(max(1, int(per_warp.sum())) * COPIED, LANES, 2, dtype=torch.int16, device=device)
    bitmaps = torch.zeros(len(sequence) + depth, LANES, 2, dtype=torch.int32, device=device)
    lanes = torch.arange(2 * LANES, device=device).view(1, LANES, 2, 1)
    for chunk in range(0, len(sequence), CHUNK):
        some = sequence[chunk : chunk + CHUNK]
        here = kept[some]
        rows = place[chunk : chunk + CHUNK].view(-1, LANES, 2, 1) + here.cumsum(-1, dtype=torch.int32) - here
        taken = here.bool()
        streams.view(-1)[(rows * (2 * LANES) + lanes)[taken]] = weights[some][taken]
        bitmaps[chunk : chunk + len(some)] = _words(here)
    headers = headers.int().contiguous()
    streams = streams.view(values.dtype)
    counters = torch.zeros(groups, dtype=torch.int32, device=device)
    return Layout((out, columns), plan.warps, groups, slabs, depth, ring, streams, bitmaps, headers, warps, counters)


def _walk(sizes: Tensor, number: Tensor, present: Tensor, slack: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where streams begin in each tile.

    Args:
        sizes: int32 (tiles, 64), values of each stream.
        number: (warps, longest), the tiles of each warp.
        present: likewise, whether there is such a tile.
        slack: rows that streams may drift apart.

    Returns:
        Rows of the warp's memory: starts (warps, longest, 64), the window's steps (warps, longest), and the ends of
        what the tile needs (warps, longest).
    """
    end = sizes.new_zeros(len(number), sizes.shape[1], dtype=torch.int64)
    window = end[:, 0]
    starts, steps, ends = [], [], []
    for i in range(number.shape[1]):
        here = present[:, i]
        moved = torch.maximum(window, end.amax(1) - slack).where(here, window)
        begin = torch.maximum(end, moved[:, None])
        end = (begin + sizes[number[:, i]]).where(here[:, None], end)
        starts.append(begin)
        steps.append(moved - window)
        ends.append(end.amax(1))
        window = moved
    return torch.stack(starts, 1), torch.stack(steps, 1), torch.stack(ends, 1)


def _ring(eights: Tensor, windows: Tensor, plan: Plan) -> tuple[int, int]:
    """The depth, and the rows of the ring that it needs, in sixteens to have few kernels.

    When a warp has decoded tile i, rows up to the last one of tile i + depth are copied over those that lie before the
    window of tile i + 1.

    Args:
        eights: (warps, longest) eights of rows up to the end of each tile.
        windows: likewise, the row at which the window begins.
        plan: its `ring` and `deepest` are limits.
    """
    last = eights.shape[1] - 1
    number = torch.arange(last + 1, device=eights.device)
    later = windows[:, (number + 1).clamp(max=last)]
    for depth in range(plan.deepest, 0, -1):
        until = eights[:, (number + depth).clamp(max=last)] * COPIED
        at_first = int(eights[:, min(depth - 1, last)].max()) * COPIED
        needed = -(-max(int((until - later).max()), at_first, PER_STREAM) // 16) * 16
        if needed <= plan.ring or depth == 1:
            break
    return depth, min(needed, plan.ring)


def _words(kept: Tensor) -> Tensor:
    """Bitmaps (tiles, lane, word) of int8 (tiles, lane, stream, place)."""
    place = torch.arange(PER_STREAM // 2, device=kept.device)  # within a word: 2 · pair + half
    shift = (place % 2) * 16 + place // 2 + torch.tensor([0, 8], device=kept.device)[:, None, None]
    words = (kept.unflatten(-1, (2, -1)).long() << shift).sum((-1, -3))
    return torch.where(words >= 2**31, words - 2**32, words).int()
