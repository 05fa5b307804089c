"""Masks to save, and what they are saved as."""

import torch

FORMATS = ["safetensors", "npz", "pt"]
KEY = "phoenix-masks"


def random_masks(layers, density=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(layer.weight.shape, generator=generator) < density for name, layer in layers.items()}


def few_masks():
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.rand(shape, generator=generator) < 0.5 for name, shape in {"b.0.q": (3, 7), "a": (8, 5)}.items()
    }


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
