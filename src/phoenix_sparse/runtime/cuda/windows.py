"""How the streams of a warp's lanes keep together: its window, and the ring in shared memory that holds it."""

import torch
from torch import Tensor

COPIED = 8  # rows that are copied at once


def walk(sizes: Tensor, number: Tensor, present: Tensor, slack: int, per_row: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where streams begin in each tile.

    Args:
        sizes: int32 (tiles, streams), values of each stream.
        number: (warps, longest), the tiles of each warp.
        present: likewise, whether there is such a tile.
        slack: rows that streams may drift apart.
        per_row: values of a stream in a row.

    Returns:
        starts (warps, longest, streams), values of the stream before that, holes included; and rows of the warp's
        memory: the window's steps (warps, longest), and the ends of what the tile needs (warps, longest).
    """
    end = sizes.new_zeros(len(number), sizes.shape[1], dtype=torch.int64)
    window = end[:, 0]
    starts, steps, ends = [], [], []
    for i in range(number.shape[1]):
        here = present[:, i]
        moved = torch.maximum(window, _rows(end, per_row) - slack).where(here, window)
        begin = torch.maximum(end, moved[:, None] * per_row)
        end = (begin + sizes[number[:, i]]).where(here[:, None], end)
        starts.append(begin)
        steps.append(moved - window)
        ends.append(_rows(end, per_row))
        window = moved
    return torch.stack(starts, 1), torch.stack(steps, 1), torch.stack(ends, 1)


def _rows(values: Tensor, per_row: int) -> Tensor:
    """(warps,), the rows that the longest of each warp's streams (warps, streams) takes."""
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
