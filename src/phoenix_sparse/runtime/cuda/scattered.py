"""A very sparse matrix as scattered.cu reads it: value after value, each with the way to its column in one byte.

Columns are cut into slabs whose part of x fits in a multiprocessor's shared memory. A row's kept values within a slab
(a line) go to `pieces` lanes of a warp, 32 / pieces lines to a warp: its task. Lines are sorted by their number of
values, so that those of a task are nearly equally long. Each lane has eight ways through the columns. A chunk holds the
next value of each way of each lane, and how many columns lie between it and the one before on that way; where these
are more than 255, fillers of value zero go in between.

Way k of lane l holds columns that are k + l modulo 8, so that eight neighbouring lanes read different banks of shared
memory. Where a line has too many columns of one remainder, the rest goes to ways with too few.

Values are 2-byte floats, also those that were int8: what takes the time are the look-ups of x, not the bytes. At 10%
kept of 14336x4096 a product takes 8.7 µs on an H200 where reading its 22 MB takes 5, and int8 values would have to be
converted in between. Tiles of int8 are smaller there (0.23 bytes a weight instead of 0.37), but take as many
instructions as tiles of floats, which take 16.4 µs.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.kernels import portable

LANES, WAYS = 32, 8
AHEAD = 3  # chunks that the kernel's loads run ahead, as in scattered.cu
FAR = 255  # columns from one value to the next on a way, at most
PIECES = (1, 2, 4, 8, 16, 32)
LATENCY = 10  # a chunk takes a warp alone so many times as long as one of many warps that share the memory
COLUMN = 32  # bytes of shared memory that a column of x takes, at most


@dataclass(frozen=True)
class Plan:
    """What a layout is built for.

    Attributes:
        processors: blocks of threads that run at once, one a multiprocessor.
        warps: of a block.
        shared: bytes of shared memory that a block can have.
        most: columns of a slab, at most.
    """

    processors: int
    warps: int = 16
    shared: int = 99 * 1024
    most: int = 16384

    def __post_init__(self) -> None:
        if min(self.processors, self.warps) < 1 or self.warps > 16 or self.shared < WAYS * COLUMN or self.most < WAYS:
            raise PhoenixError(f"layout: {self} can't be; give 1 to 16 warps and memory for {WAYS} columns of x")

    def slabs(self, columns: int) -> tuple[int, int]:
        """How many slabs so many columns are cut into, and the width of one (the last may be narrower)."""
        widest = min(self.shared // COLUMN, self.most) // WAYS * WAYS
        width = -(-columns // -(-columns // widest))
        width = -(-width // WAYS) * WAYS
        return -(-columns // width), width


@dataclass(frozen=True)
class Scattered:
    """The arrays of one matrix (out, in) in 2-byte floats.

    Attributes:
        shape: (out, in).
        warps_per_block: at most those of the plan, and not more than have something to do.
        slabs: parts that columns are divided into.
        width: columns of a slab.
        pieces: lanes that share a line.
        values: (chunks, 32, 8), by lane and way: the first AHEAD of every warp, which are empty where it has fewer, the
            others warp after warp, and AHEAD empty ones.
        deltas: uint8, likewise: columns from the value before.
        starts: int16 (tasks, 32, 8), the column within the slab where each way begins. Tasks are the first of every
            warp, if only in name, then the others warp after warp.
        rows: int32 (tasks, 32), each lane's row; -1 for none.
        lengths: int32 (tasks,), chunks.
        warps: int32 (blocks of threads · warps, 4): first chunk and task but for those at the front, tasks, slab.
        counters: int32 (out,), 0 between launches; for two at once the matrix would need two of them.
    """

    shape: tuple[int, int]
    warps_per_block: int
    slabs: int
    width: int
    pieces: int
    values: Tensor
    deltas: Tensor
    starts: Tensor
    rows: Tensor
    lengths: Tensor
    warps: Tensor
    counters: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of values and products."""
        return self.values.dtype

    @property
    def grid(self) -> int:
        """Blocks of threads."""
        return len(self.warps) // self.warps_per_block

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.tensors())

    def tensors(self) -> list[Tensor]:
        """The arrays, in the order of the fields."""
        return [self.values, self.deltas, self.starts, self.rows, self.lengths, self.warps, self.counters]


@dataclass(frozen=True)
class _Tasks:
    """How lines are dealt: `of` and `at` give each line's task and place there, `limit` what the task should take in
    chunks, `warp` each task's warp, `own` each warp's tasks, `blocks` each slab's blocks of threads, and `warps` how
    many warps a block has."""

    pieces: int
    warps: int
    of: Tensor
    at: Tensor
    limit: Tensor
    warp: Tensor
    own: Tensor
    blocks: list[int]


def build(bitmask: Tensor, values: Tensor, row_offsets: Tensor, columns: int, plan: Plan) -> Scattered:
    """The layout of a packed matrix, on its device.

    Args:
        bitmask: uint8 (out, ⌈columns/8⌉), as in `packed.Packed`.
        values: (nnz,) bfloat16 or float16.
        row_offsets: int64 (out + 1).
        columns: of the matrix.
        plan: what to build it for.
    """
    out, device = bitmask.shape[0], bitmask.device
    slabs, width = plan.slabs(columns)
    lines = slabs * out
    kept = portable.unpack(bitmask, torch.ones_like(values, dtype=torch.int8), row_offsets, columns)
    row, column = kept.nonzero(as_tuple=True)
    del kept
    line, column = column // width * out + row, column % width
    rest = column % WAYS

    # Ways by remainder first; what is too much for one goes to others of the same line.
    order = ((line * WAYS + rest) * width + column).argsort()
    line, rest, column, number = line[order], rest[order], column[order], order
    _, _, ends, sizes = _chains(line * WAYS + rest, column, lines)
    tasks = _deal(sizes.view(lines, WAYS).sum(1).view(slabs, out), plan)
    rest = _spread(line, rest, ends, sizes, tasks.limit * tasks.pieces)
    order = ((line * WAYS + rest) * width + column).argsort()
    line, rest, column, number = line[order], rest[order], column[order], number[order]
    gaps, fillers, ends, sizes = _chains(line * WAYS + rest, column, lines)

    count, warps = len(tasks.warp), len(tasks.own)
    longest = -(-sizes.view(lines, WAYS).amax(1) // tasks.pieces)
    lengths = longest.new_zeros(count).scatter_reduce_(0, tasks.of, longest, "amax")
    # Chunks of each task's warp before it; a warp's tasks are numbered in order.
    order = tasks.warp.sort(stable=True).indices
    before = torch.empty_like(lengths)
    before[order] = lengths[order].cumsum(0) - lengths[order]
    before -= before[tasks.warp]
    loads = lengths.new_zeros(warps).scatter_add_(0, tasks.warp, lengths)
    later = (loads - AHEAD).clamp(min=0)
    first = warps * AHEAD + later.cumsum(0) - later  # of each warp, but for those at the front

    # A way is cut into as many pieces as lanes share the line, each as long as the task.
    task = tasks.of[line]
    length = lengths[task]
    piece, depth = (ends - 1) // length, (ends - 1) % length
    lane = tasks.at[line] * tasks.pieces + piece
    slot = lane * WAYS + (rest - lane) % WAYS
    depth_in_warp, warp = before[task] + depth, tasks.warp[task]
    begins = depth <= fillers  # before it the way holds nothing but fillers, which need not lead here then
    fillers = fillers.where(~begins, 0)
    size = (warps * AHEAD + int(later.sum()) + AHEAD) * LANES * WAYS
    streams = torch.zeros(size, dtype=torch.int16, device=device)
    deltas = torch.zeros(size, dtype=torch.uint8, device=device)
    place = _places(depth_in_warp, warp, first) + slot
    streams[place] = values.view(torch.int16)[number]
    deltas[place] = (gaps - fillers * FAR).where(~begins, 0).to(torch.uint8)
    filled = fillers.nonzero().flatten().repeat_interleave(fillers[fillers > 0])
    back = torch.arange(1, len(filled) + 1, device=device) - (fillers.cumsum(0) - fillers)[filled]
    deltas[_places(depth_in_warp[filled] - back, warp[filled], first) + slot[filled]] = FAR
    starts = torch.zeros(count, LANES * WAYS, dtype=torch.int16, device=device)
    starts[task[begins], slot[begins]] = column[begins].short()

    rows = torch.full((count, LANES // tasks.pieces, tasks.pieces), -1, dtype=torch.int32, device=device)
    rows[tasks.of, tasks.at] = (torch.arange(lines, device=device) % out).int()[:, None]
    later = (tasks.own - 1).clamp(min=0)
    slab = torch.arange(slabs).repeat_interleave(torch.tensor(tasks.blocks) * tasks.warps).to(device)
    return Scattered(
        (out, columns),
        tasks.warps,
        slabs,
        width,
        tasks.pieces,
        streams.view(values.dtype).view(-1, LANES, WAYS),
        deltas.view(-1, LANES, WAYS),
        starts.view(-1, LANES, WAYS),
        rows.view(-1, LANES),
        lengths.int(),
        torch.stack([first, warps + later.cumsum(0) - later, tasks.own, slab], 1).int(),
        torch.zeros(out, dtype=torch.int32, device=device),
    )


def _chains(way: Tensor, column: Tensor, lines: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values sorted by way and column: (columns from the one before on the way, 0 for the first; fillers that this
    needs; places of the way up to this value, fillers included; places of each way, (lines · WAYS,))."""
    same = torch.nn.functional.pad(way[1:] == way[:-1], (1, 0))[: len(way)]
    gaps = torch.nn.functional.pad(column.diff(), (1, 0))[: len(way)].where(same, 0)
    fillers = ((gaps - 1) // FAR).clamp(min=0)
    sizes = way.new_zeros(lines * WAYS).scatter_add_(0, way, fillers + 1)
    return gaps, fillers, (fillers + 1).cumsum(0) - (sizes.cumsum(0) - sizes)[way], sizes


def _places(depth: Tensor, warp: Tensor, first: Tensor) -> Tensor:
    """Where a warp's chunks are: `depth` counts from its first, `first` is where those behind the front begin."""
    return torch.where(depth < AHEAD, warp * AHEAD + depth, first[warp] + depth - AHEAD) * (LANES * WAYS)


def _spread(line: Tensor, rest: Tensor, ends: Tensor, sizes: Tensor, limit: Tensor) -> Tensor:
    """Each value's way (0 to 7): its remainder, unless that way is longer than the line's limit; then one with room.

    Args:
        line, rest, ends: of each value, as in `build`.
        sizes: (lines · WAYS,) places of each way.
        limit: (lines,) places that a way should have; eight ways of that are enough for the line.
    """
    room = (limit[:, None] - sizes.view(-1, WAYS)).clamp(min=0).cumsum(1)
    many = ends > limit[line]
    line = line[many]
    counts = torch.bincount(line, minlength=len(limit))
    nth = torch.arange(len(line), device=line.device) - (counts.cumsum(0) - counts)[line]
    return rest.masked_scatter(many, (nth[:, None] >= room[line]).sum(1))


def _deal(sizes: Tensor, plan: Plan) -> _Tasks:
    """Lines to tasks, and tasks to warps.

    Args:
        sizes: (slabs, out) places that each line needs, of all its ways together.
        plan: whose processors and warps they are dealt to.
    """
    slabs, out = sizes.shape
    spare = max(plan.processors - slabs, 0)
    upto = sizes.sum(1).cumsum(0).tolist()
    edges = [slab + 1 + spare * upto[slab] // max(upto[-1], 1) for slab in range(slabs - 1)]
    edges = [0, *edges, slabs + spare]
    blocks = [end - start for start, end in pairwise(edges)]

    ordered, order = sizes.sort(dim=1, descending=True, stable=True)
    best = None
    for pieces in reversed(PIECES):
        heads = -(-ordered[:, :: LANES // pieces] // (pieces * WAYS))  # the longest line decides
        busy = min(plan.warps, -(-heads.shape[1] // (min(blocks) * 4)) * 4)
        warps = torch.stack([_warps(heads.shape[1], b, busy) for b in blocks]).to(sizes.device)
        warps += torch.tensor(edges[:-1], device=sizes.device)[:, None] * busy
        cost = _cost(heads, warps, sum(blocks), busy)
        if best is None or cost < best[0]:
            best = cost, pieces, busy, heads, warps
    assert best is not None
    _, pieces, busy, heads, warps = best
    lines = LANES // pieces
    # The first task of each warp has the warp's number, the others come behind.
    warp, by_warp = warps.flatten().sort(stable=True)
    own = torch.bincount(warp, minlength=sum(blocks) * busy)
    nth = torch.arange(len(warp), device=sizes.device) - (own.cumsum(0) - own)[warp]
    later = (own - 1).clamp(min=0)
    number = torch.where(nth > 0, len(own) + (later.cumsum(0) - later)[warp] + nth - 1, warp)
    of_warp = torch.cat([torch.arange(len(own)), torch.arange(len(own)).repeat_interleave(later.cpu())])
    number = torch.empty_like(number).scatter_(0, by_warp, number).view(slabs, -1)
    place = torch.arange(out, device=sizes.device) // lines
    base = torch.arange(slabs, device=sizes.device)[:, None] * out
    of, at, limit = (torch.empty(slabs * out, dtype=torch.int64, device=sizes.device) for _ in range(3))
    of[order + base] = number[:, place]
    at[order + base] = torch.arange(out, device=sizes.device) % lines
    limit[order + base] = heads[:, place]
    return _Tasks(pieces, busy, of, at, limit, of_warp.to(sizes.device), own, blocks)


def _warps(count: int, blocks: int, warps: int) -> Tensor:
    """The warp (block · warps + warp) of each of so many tasks, longest first: round after round over the blocks, to
    and fro, each round to the blocks' next warps."""
    turn, block = torch.arange(count) // blocks, torch.arange(count) % blocks
    return torch.where(turn % 2 == 1, blocks - 1 - block, block) * warps + turn % warps


def _cost(heads: Tensor, warps: Tensor, blocks: int, per_block: int) -> int:
    """What the busiest quarter of a multiprocessor or the busiest warp takes, in chunks; a task costs one more."""
    loads = heads.new_zeros(blocks * per_block).scatter_add_(0, warps.flatten(), heads.flatten() + 1)
    quarters = torch.nn.functional.pad(loads.view(blocks, per_block), (0, -per_block % 4)).view(blocks, -1, 4).sum(1)
    return max(int(quarters.max()) * 4, int(loads.max()) * LATENCY)
