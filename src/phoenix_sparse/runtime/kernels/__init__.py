"""Kernels that multiply with packed weights."""
