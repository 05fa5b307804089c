"""How much memory of the machine some work takes, as the system counts it for this process (on Linux)."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def growth(work: Callable[[], object]) -> int | None:
    """Bytes by which this process grows at most while `work` runs, above what it has before.

    What was freed earlier is given back to the system first, as far as the C library lets go of it; what threads keep
    for the next call (scratch memory of kernels, ours and torch's) counts only for the work that first asks for it.

    Returns:
        None where the system doesn't tell, or doesn't let the highest mark be reset; `work` was run all the same.
    """
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library than glibc
        trim = None
    if trim is not None:
        trim(0)
    try:
        RESET.write_text("5")  # the highest mark becomes what there is now: Linux, proc(5)
        before = _kilobytes("VmRSS")
    except (OSError, KeyError):
        work()
        return None
    work()
    return max(0, _kilobytes("VmHWM") - before) * 1024


def _kilobytes(name: str) -> int:
    lines = (line.partition(":") for line in STATUS.read_text(encoding="utf-8").splitlines())
    return int({key: value for key, _, value in lines}[name].split()[0])
