"""Packed weights on a GPU: their layout there, kernels compiled at first use, and the product."""
