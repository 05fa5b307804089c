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


def scales(tensors, mask, bias, scale):
    """The same with every term's absolute value: what rounding errors are relative to where terms cancel."""
    positive = {name: tensor.abs() for name, tensor in tensors.items()}
    return reference(positive, mask, None if bias is None else bias.abs(), scale)


def results(tensors, mask, bias, scale):
    x, a, b = (tensors[name].clone().requires_grad_() for name in "xab")
    y = masked_linear(x, tensors["weight"], bias, mask, a, b, scale)
    y.backward(tensors["grad"])
    assert y.dtype == tensors["x"].dtype
    assert [t.grad.dtype for t in (x, a, b)] == [t.dtype for t in (x, a, b)]
    return [y.detach(), x.grad, a.grad, b.grad]


PRECISIONS = [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from(PRECISIONS), st.floats(0.1, 4))
def test_value_and_gradients_against_float64_autograd(shape, precision, scale):
    dtype, bound = precision
    problem_ = problem(shape, dtype)
    y, gradients = reference(*problem_, scale)
    y_size, gradient_sizes = scales(*problem_, scale)
    got = results(*problem_, scale)
    for one, other, size in zip(got, [y, *gradients], [y_size, *gradient_sizes], strict=True):
        assert float((one.double() - other).norm()) <= bound * float(size.norm()) + 1e-30


@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
@pytest.mark.parametrize(("out", "columns", "rank"), [(96, 80, 8), (128, 257, 3), (33, 512, 32)])
def test_relative_error(dtype, bound, out, columns, rank):
    problem_ = problem((out, columns, rank, 0.5, 1, False), dtype)
    y, gradients = reference(*problem_, 2.0)
    for one, other in zip(results(*problem_, 2.0), [y, *gradients], strict=True):
        assert float((one.double() - other).norm()) <= bound * float(other.norm())


@pytest.mark.parametrize("hira", [False, True])
def test_gradcheck(hira):
    torch.manual_seed(0)
    mask = torch.rand(6, 7) < 0.5
    weight = torch.randn(6, 7, dtype=torch.float64) * mask
    gate = weight if hira else mask
    x, a, b = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((4, 7), (2, 7), (6, 2)))
    assert torch.autograd.gradcheck(lambda x, a, b: masked_linear(x, weight, None, gate, a, b, 2.0), (x, a, b))


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from(PRECISIONS), st.floats(0.1, 4))
def test_hira_against_float64_autograd(shape, precision, scale):
    """y = x (W⊙(1 + s·BA))ᵀ, written down without a gate."""
    dtype, bound = precision
    tensors, _, bias = problem(shape, dtype)

    def written(tensors, bias):
        x, a, b = (tensors[name].double().detach().requires_grad_() for name in "xab")
        y = x @ (tensors["weight"].double() * (1 + scale * (b @ a))).t() + (0 if bias is None else bias.double())
        return [y.detach(), *torch.autograd.grad(y, (x, a, b), tensors["grad"].double())]

    sizes = written({name: tensor.abs() for name, tensor in tensors.items()}, None if bias is None else bias.abs())
    got = results(tensors, tensors["weight"], bias, scale)
    for one, other, size in zip(got, written(tensors, bias), sizes, strict=True):
        assert float((one.double() - other).norm()) <= bound * float(size.norm()) + 1e-30


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
