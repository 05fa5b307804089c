import gc
import mmap

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
