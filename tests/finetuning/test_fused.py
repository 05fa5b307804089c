"""The fused kernels against float64, and the packed masks that they read."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.finetuning.masked_linear import (
    effective_weight,
    masked_linear,
    pack_mask,
    unpack_mask,
    uses_kernels,
)

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**31))
def test_masks_are_packed_and_unpacked(out, columns, seed):
    mask = torch.rand(out, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (out, (columns + 7) // 8)
    assert torch.equal(unpack_mask(packed, columns), mask)
    for row, column in mask.nonzero().tolist():
        assert int(packed[row, column // 8]) >> column % 8 & 1
    assert sum(int(byte).bit_count() for byte in packed.flatten()) == int(mask.sum())


def test_a_packed_mask_computes_what_a_plain_one_does():
    """Where the kernels can't run, such as in float64."""
    torch.manual_seed(0)
    mask = torch.rand(12, 21) < 0.5
    weight = torch.randn(12, 21, dtype=torch.float64) * mask
    x, a, b = (torch.randn(*size, dtype=torch.float64) for size in ((4, 21), (3, 21), (12, 3)))
    packed = pack_mask(mask)
    assert torch.equal(effective_weight(weight, packed, a, b, 2.0), effective_weight(weight, mask, a, b, 2.0))
    found = []
    for gate in (mask, packed):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
        y = masked_linear(leaves[0], weight, None, gate, leaves[1], leaves[2], 2.0)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_cpu_computes_without_the_kernels():
    assert not uses_kernels(torch.zeros(4, 4))


def _compare(device: str, **environment: str) -> None:
    program = Path(__file__).with_name("fused_check.py")
    result = subprocess.run(
        [sys.executable, str(program), device],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == "equal"


@needs_triton
def test_the_kernels_interpreted():
    _compare("cpu", TRITON_INTERPRET="1")


@needs_triton
@needs_gpu
def test_the_kernels_on_a_gpu():
    _compare("cuda")
