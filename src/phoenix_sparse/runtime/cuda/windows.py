"""How the streams of lanes keep together: the window over them, and the ring in shared memory that holds a part."""

import torch
from torch import Tensor

COPIED = 8  # rows that are copied at once


def walk(sizes: Tensor, number: Tensor, present: Tensor, slack: int, per_row: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where streams begin in each tile, as they go from one of a block's warps on to the next.

    Args:
        sizes: int32 (tiles, streams), values of each stream.
        number: (blocks of threads, steps), the tiles of each block.
        present: likewise, whether there is such a tile.
        slack: rows that streams may drift apart.
        per_row: values of a stream in a row.

    Returns:
        starts (blocks, steps, streams), values of the stream before that, holes included; and rows of the block's
        memory: where the window begins (blocks, steps), and the ends of what the tile needs (blocks, steps).
    """
    end = sizes.new_zeros(len(number), sizes.shape[1], dtype=torch.int64)
    window = end[:, 0]
    starts, windows, ends = [], [], []
    for i in range(number.shape[1]):
        here = present[:, i]
        window = torch.maximum(window, _rows(end, per_row) - slack).where(here, window)
        begin = torch.maximum(end, window[:, None] * per_row)
        end = (begin + sizes[number[:, i]]).where(here[:, None], end)
        starts.append(begin)
        windows.append(window)
        ends.append(_rows(end, per_row))
    return torch.stack(starts, 1), torch.stack(windows, 1), torch.stack(ends, 1)


def part(starts: Tensor, windows: Tensor, ends: Tensor, counts: Tensor, per_row: int) -> tuple[Tensor, ...]:
    """What `walk` found, cut into the warps of each block: neighbours share the rows in which both have values.

    Args:
        starts: (warps, longest, streams), as `walk` gives it for the warps of a block one after another.
        windows: (warps, longest).
        ends: (warps, longest).
        counts: (warps,), tiles of each.
        per_row: values of a stream in a row.

    Returns:
        begins (warps,), the eights of rows of the block's memory before each warp's first; offsets uint8
        (warps, streams), where its streams begin, in values from there; steps (warps, longest), rows that its window
        moves; eights (warps, longest) of rows, from its first, up to the end of each tile.
    """
    begins = windows[:, 0] // COPIED
    steps = windows.diff(dim=1, prepend=begins[:, None] * COPIED)
    some = (counts > 0)[:, None]
    eights = ((ends + COPIED - 1) // COPIED - begins[:, None]) * some
    offsets = (starts[:, 0] - begins[:, None] * (COPIED * per_row)) * some
    return begins, offsets.to(torch.uint8), steps, eights


def _rows(values: Tensor, per_row: int) -> Tensor:
    """(blocks,), the rows that the longest of each block's streams (blocks, streams) takes."""
    return (values.amax(1) + per_row - 1) // per_row


def ring_for(eights: Tensor, windows: Tensor, most: int, deepest: int, tail: int) -> tuple[int, int]:
    """The depth, and the rows of the ring that it needs, in sixteens to have few kernels.

    When a warp has decoded tile i, rows up to the last one of tile i + depth are copied over those that lie before the
    window of tile i + 1.

    Args:
        eights: (warps, longest) eights of rows up to the end of each tile.
        windows: likewise, the row at which the window begins.
        most: rows of the ring.
        deepest: tiles that copies may run ahead, at most.
        tail: rows that the ring has at least.
    """
    last = eights.shape[1] - 1
    number = torch.arange(last + 1, device=eights.device)
    later = windows[:, (number + 1).clamp(max=last)]
    for depth in range(deepest, 0, -1):
        until = eights[:, (number + depth).clamp(max=last)] * COPIED
        at_first = int(eights[:, min(depth - 1, last)].max()) * COPIED
        needed = -(-max(int((until - later).max()), at_first, tail) // 16) * 16
        if needed <= most or depth == 1:
            break
    return depth, min(needed, most)
