"""The kernels' operator where there is no GPU."""

import pytest
import torch

import phoenix_sparse.runtime.cuda.forms as forms
import phoenix_sparse.runtime.cuda.linear as linear
from phoenix_sparse.runtime.cuda import scattered, scattered_product
from phoenix_sparse.runtime.cuda.layout import Layout, Plan


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The operator with the emulator in the GPU's place."""
    emulated = pytest.importorskip("runtime.cuda.emulated")

    def multiply(x, form, *rest):
        if isinstance(form, Layout):
            return emulated.multiply(x, form, False, *rest)
        return torch.cat([emulated.multiply_scattered(some, form, *rest) for some in x.split(16)])

    def expand(form):
        dense = emulated.expand(form, False) if isinstance(form, Layout) else emulated.expand_scattered(form)
        return dense[:, : form.shape[1]].contiguous()

    monkeypatch.setattr(linear, "multiply", multiply)
    monkeypatch.setattr(linear, "expand", expand)
    monkeypatch.setattr(forms, "plan_for", lambda device: Plan(6, warps=2, slack=1, ring=40))
    monkeypatch.setattr(scattered_product, "plan_for", lambda device: scattered.Plan(3, warps=2))
