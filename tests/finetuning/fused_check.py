"""Compare the fused kernels with the plain path, run by Triton's interpreter on the CPU, or on a GPU.

A program of its own: Triton decides on import whether it interprets.
"""

import itertools
import sys

import torch

from phoenix_sparse.finetuning.fused import factor_gradients, write_effective
from phoenix_sparse.finetuning.masked_linear import pack_mask

DEVICE = sys.argv[1]
CASES = [(64, 128, 16), (33, 70, 3), (1, 9, 1), (130, 257, 24), (300, 40, 33)]
# The interpreter knows no arithmetic in bfloat16.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
BOUND = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def close(one: torch.Tensor, reference: torch.Tensor, bound: float) -> None:
    error = float((one.double() - reference).norm() / reference.norm().clamp(min=1e-30))
    assert error <= bound, f"relative error {error:.1e}"


for (out, columns, rank), dtype, kind, density in itertools.product(
    CASES, DTYPES, ["mask", "hira", "none"], [0.5, 0.1]
):
    generator = torch.Generator().manual_seed(out * columns + rank)
    mask = (torch.rand(out, columns, generator=generator) < density).to(DEVICE)
    weight = (torch.randn(out, columns, generator=generator).to(DEVICE) * mask).to(dtype)
    # Prefixes of a larger super-adapter: B's rows are further apart than they are long.
    a = torch.randn(rank + 5, columns, generator=generator).to(DEVICE)[:rank]
    b = torch.randn(out, rank + 5, generator=generator).to(DEVICE)[:, :rank]
    grad = torch.randn(out, columns, generator=generator).to(DEVICE, dtype)
    gate = {"mask": pack_mask(mask), "hira": weight, "none": None}[kind]
    factor = {"mask": mask.double(), "hira": weight.double(), "none": 1.0}[kind]
    scale, bound = 1.7, BOUND[dtype]
    update = factor * (scale * b.double() @ a.double())
    found = write_effective(weight, gate, a, b, scale)
    assert found.dtype == dtype
    close(found, weight.double() + update, bound)
    if kind == "mask":
        assert not found[~mask].any(), "a zero was lost"
    gated = grad.double() * factor
    grad_a, grad_b = factor_gradients(grad, gate, a, b, scale)
    close(grad_a, scale * b.double().t() @ gated, bound)
    close(grad_b, scale * gated @ a.double().t(), bound)
    again = factor_gradients(grad, gate, a, b, scale)
    assert torch.equal(again[0], grad_a)
    assert torch.equal(again[1], grad_b)
print("equal")
