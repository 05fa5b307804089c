"""Weights whose copies serve many rows, and when two results are one."""

import torch

GPU = torch.device("cuda")
IDS = torch.randint(200, (2, 40), generator=torch.Generator().manual_seed(0))


def weight_of(out, columns, seed=0, two_four=False, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    weight, scores = (torch.randn(out, columns, generator=generator) for _ in range(2))
    kept = (scores.view(out, -1, 4).argsort(-1).argsort(-1) < 2).view(out, columns) if two_four else scores < 0
    return torch.where(kept, weight, 0.0).to(dtype)


def close(one, other, tolerance=1e-2):
    return bool((one.double() - other.double()).norm() <= tolerance * other.double().norm())
