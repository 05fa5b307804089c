"""Where packed weights lie in memory: on huge pages, where reading them is several times faster."""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

PAGE = 2**21


def place(tensor: Tensor) -> Tensor:
    """A copy of a CPU tensor on huge pages, where the system gives them; to be done once, when loading.

    A tensor of less than 2 MiB is returned as it is.

    Returns:
        A tensor of the same values that owns its memory.
    """
    if tensor.device.type != "cpu" or tensor.nbytes < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor
    return reserve(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def reserve(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A CPU tensor to be filled, on huge pages where the system gives them, if it takes 2 MiB or more.

    It begins at a multiple of 2 MiB. Its last, incomplete 2 MiB get a huge page if they fill half of it, so that less
    than 1 MiB is wasted.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if size < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    huge = (size + PAGE // 2) // PAGE * PAGE
    # Private: what mmap shares unless told lies in shared memory, which gets no huge pages on most systems.
    memory = mmap.mmap(-1, max(size, huge) + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw = torch.frombuffer(memory, dtype=torch.uint8)  # keeps `memory` alive
    start = -raw.data_ptr() % PAGE
    with suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, huge)
    return raw[start : start + size].view(dtype).view(shape)
