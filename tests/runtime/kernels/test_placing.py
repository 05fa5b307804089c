import gc
import mmap
from pathlib import Path

import pytest
import torch

from phoenix_sparse.runtime.kernels.placing import PAGE, place


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.int8, torch.float32, torch.int64])
@pytest.mark.parametrize("count", [PAGE, PAGE + 3, 2 * PAGE + 17])
def test_a_placed_tensor_is_a_copy_at_a_multiple_of_two_mebibytes(dtype, count):
    tensor = torch.arange(count, dtype=torch.int64).to(dtype).view(-1)
    placed = place(tensor)
    assert torch.equal(placed, tensor)
    assert placed.dtype == dtype
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert placed.data_ptr() % PAGE == 0
        assert placed.data_ptr() != tensor.data_ptr()


def test_it_keeps_its_shape_and_outlives_its_source():
    tensor = torch.randn(1024, 1025)
    copy, placed = tensor.clone(), place(tensor)
    del tensor
    gc.collect()
    assert torch.equal(placed, copy)
    view = placed[5]
    del placed
    gc.collect()
    assert torch.equal(view, copy[5])


def test_small_tensors_stay_where_they_are():
    tensor = torch.randn(100)
    assert place(tensor) is tensor


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads the kernel's list of mappings")
def test_the_copy_is_memory_that_can_have_huge_pages():
    """Private, and asked for: memory that processes share gets none, unless the system is told to."""
    placed = place(torch.ones(3 * PAGE + PAGE // 2, dtype=torch.uint8))
    flags = mapping_flags(placed.data_ptr())
    assert "sh" not in flags
    # A kernel without huge pages has no such flag anywhere.
    assert "hg" in flags or not Path("/sys/kernel/mm/transparent_hugepage").exists()
    assert mapping_flags(placed.data_ptr() + placed.nbytes - 1) == flags


def mapping_flags(address):
    """VmFlags (proc(5)) of the mapping that an address lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(end, 16) for end in first.split("-"))
            inside = low <= address < high
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"{address:x} is not mapped")
