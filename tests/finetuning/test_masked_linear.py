import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from phoenix_sparse.finetuning.masked_linear import effective_weight, masked_linear

shapes = st.tuples(
    st.integers(1, 40),  # out
    st.integers(1, 40),  # in
    st.integers(1, 9),  # rank
    st.floats(0, 1),  # density
    st.integers(0, 2**31),  # seed
    st.booleans(),  # bias
)


def problem(shape, dtype):
    out, columns, rank, density, seed, with_bias = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    mask = torch.rand(out, columns, generator=generator) < density
    tensors = {
        "x": normal(3, 5, columns),
        "weight": normal(out, columns) * mask,
        "a": normal(rank, columns),
        "b": normal(out, rank),
        "grad": normal(3, 5, out),
    }
    bias = normal(out).to(dtype) if with_bias else None
    rounded = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    rounded["a"], rounded["b"] = tensors["a"].float(), tensors["b"].float()
    return rounded, mask, bias


def reference(tensors, mask, bias, scale):
    """Plain float64 autograd of the definition."""
    x, a, b = (tensors[name].double().detach().requires_grad_() for name in "xab")
    weight = tensors["weight"].double() + mask * (scale * (b @ a))
    y = x @ weight.t() + (0 if bias is None else bias.double())
    return y.detach(), torch.autograd.grad(y, (x, a, b), tensors["grad"].double())


def close(got, expected, bound):
    return float((got.double() - expected).norm()) <= bound * float(expected.norm()) + 1e-12


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from([(torch.float32, 1e-5), (torch.bfloat16, 1.5e-2)]), st.floats(0.1, 4))
def test_value_and_gradients_against_float64_autograd(shape, precision, scale):
    dtype, bound = precision
    tensors, mask, bias = problem(shape, dtype)
    x, a, b = (tensors[name].clone().requires_grad_() for name in "xab")
    y = masked_linear(x, tensors["weight"], bias, mask, a, b, scale)
    y.backward(tensors["grad"])
    expected, gradients = reference(tensors, mask, bias, scale)
    assert y.dtype == dtype
    assert close(y.detach(), expected, bound)
    for tensor, gradient in zip((x, a, b), gradients, strict=True):
        assert tensor.grad.dtype == tensor.dtype
        assert close(tensor.grad, gradient, bound)


def test_gradcheck():
    torch.manual_seed(0)
    mask = torch.rand(6, 7) < 0.5
    weight = torch.randn(6, 7, dtype=torch.float64) * mask
    x, a, b = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((4, 7), (2, 7), (6, 2)))
    assert torch.autograd.gradcheck(lambda x, a, b: masked_linear(x, weight, None, mask, a, b, 2.0), (x, a, b))


@pytest.mark.parametrize("inputs_need_gradients", [True, False])
def test_nothing_of_the_size_of_w_is_saved(inputs_need_gradients):
    mask = torch.ones(64, 48, dtype=torch.bool)
    a, b = torch.randn(4, 48, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    x = torch.randn(5, 48, requires_grad=inputs_need_gradients)
    saved = []

    def note(tensor):
        saved.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        masked_linear(x, torch.randn(64, 48), None, mask, a, b, 1.0)
    assert max(saved) < 64 * 48
    assert sum(saved) == x.numel() + a.numel() + b.numel()


def test_the_update_stays_on_the_mask():
    mask = torch.rand(20, 30) < 0.4
    weight = torch.randn(20, 30) * mask
    merged = effective_weight(weight, mask, torch.randn(3, 30), torch.randn(20, 3), 2.0)
    assert not merged[~mask].any()
    assert (merged[mask] != weight[mask]).all()


def test_autocast_changes_nothing():
    tensors, mask, bias = problem((16, 12, 3, 0.5, 0, True), torch.float32)
    arguments = (tensors["x"], tensors["weight"], bias, mask, tensors["a"], tensors["b"], 2.0)
    plain = masked_linear(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(masked_linear(*arguments), plain)
