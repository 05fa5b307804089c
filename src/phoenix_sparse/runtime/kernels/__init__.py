"""Kernels that multiply with packed weights."""

import torch  # noqa: F401 (torch's import brings some of this package's modules: before any of them begins, not amid it)
