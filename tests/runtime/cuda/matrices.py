"""Random weights for layers on the GPU, and the layers."""

import torch

from phoenix_sparse.runtime.cuda import linear
from phoenix_sparse.runtime.packed import pack, quantize
from phoenix_sparse.runtime.sparse_linear import SparseLinear


def weight_of(out, columns, seed=0, two_four=False, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    weight, scores = (torch.randn(out, columns, generator=generator) for _ in range(2))
    kept = (scores.view(out, -1, 4).argsort(-1).argsort(-1) < 2).view(out, columns) if two_four else scores < 0
    return torch.where(kept, weight, 0.0).to(dtype)


def layer_of(weight, values="bf16", bias=None):
    packed = quantize(pack(weight)) if values == "int8" else pack(weight)
    return linear.CudaLinear.of(SparseLinear.of(packed, weight.dtype, bias))


def error(one, other):
    """The relative error of a product."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def close(one, other, tolerance=1e-2):
    return error(one, other) <= tolerance
