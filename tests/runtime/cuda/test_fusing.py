import copy
import gc
import itertools
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.bench import Pair
from phoenix_sparse.runtime.cuda import linear
from phoenix_sparse.runtime.cuda.fusing import Fused, Member, fuse, members, stack
from phoenix_sparse.runtime.cuda.layout import Plan, build
from phoenix_sparse.runtime.kernels import portable
from phoenix_sparse.runtime.packed import check, pack, quantize
from phoenix_sparse.runtime.sparse_linear import SparseLinear
from tiny import make_model, pruned

IDS = torch.tensor([[5, 9, 200, 31, 7, 7, 120], [1, 2, 3, 4, 5, 6, 7]])


def sparse(out, columns, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(out, columns, generator=generator) < 0.5
    return torch.where(kept, torch.randn(out, columns, generator=generator), 0.0).to(dtype)


def layer(out, columns, seed, bias=False, values="float", dtype=torch.float32):
    weight = sparse(out, columns, seed, dtype)
    packed = quantize(pack(weight)) if values == "int8" else pack(weight)
    whole = nn.Parameter(torch.randn(out, generator=torch.Generator().manual_seed(seed))) if bias else None
    return SparseLinear.of(packed, dtype, whole)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    columns=st.integers(1, 90),
    values=st.sampled_from(["float", "int8"]),
    biased=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_a_stack_is_its_parts_one_under_another(sizes, columns, values, biased):
    parts = [layer(size, columns, seed, biased[seed], values) for seed, size in enumerate(sizes)]
    whole = stack(parts)
    check(whole.packed, "whole")
    assert torch.equal(whole.dense(), torch.cat([part.dense() for part in parts]))
    x = torch.randn(3, 2, columns, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        assert torch.allclose(whole(x), torch.cat([part(x) for part in parts], -1), atol=1e-4)


@pytest.mark.parametrize(
    "other",
    [
        layer(8, 31, 1),
        layer(8, 32, 1, values="int8"),
        layer(8, 32, 1, dtype=torch.bfloat16),
        nn.Linear(32, 8),
    ],
)
def test_what_differs_is_not_stacked(other):
    first = layer(8, 32, 0)
    with pytest.raises(PhoenixError, match="can't be stacked"):
        stack([first, other])
    model = nn.Module()
    model.gate_proj, model.up_proj = first, other
    assert fuse(model) == 0
    assert model.gate_proj is first
    del model.up_proj
    assert fuse(model) == 0


class Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def three():
    whole = Counting(6, 9)
    return whole, members(whole, [4, 2, 3], torch.float32), whole.weight.split([4, 2, 3]), whole.bias.split([4, 2, 3])


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_one_product_for_one_tensor_in_any_order(order):
    whole, parts, weights, biases = three()
    for _ in range(2):
        x, before = torch.randn(2, 5, 6), whole.calls
        for number in order:
            y = parts[number](x)
            assert torch.allclose(y, nn.functional.linear(x, weights[number], biases[number]), atol=1e-6)
            y.view(2, 5, -1, 1).transpose(1, 2)
        assert whole.calls == before + 1
        kept = weakref.ref(x)
        del x, y
        assert kept() is None  # nothing holds on to the input, nor to the product


@settings(max_examples=40, deadline=None)
@given(calls=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=12))
def test_right_whatever_is_called_with_whatever(calls):
    """Also where a linear is called twice, or has another's input, or one that was changed since it had it."""
    _, parts, weights, biases = three()
    inputs = [torch.randn(1, 6) for _ in range(2)]
    for number, which in calls:
        x = inputs[which] if which < 2 else torch.randn(1, 6)
        expected = nn.functional.linear(x, weights[number], biases[number])
        assert torch.allclose(parts[number](x), expected, atol=1e-6)


def test_an_equal_tensor_is_not_the_same():
    whole, parts, *_ = three()
    x = torch.randn(1, 6)
    parts[0](x)
    parts[1](x.clone())
    assert whole.calls == 2


def test_products_are_shared_by_number():
    fused = Fused([1, 2])
    x = torch.tensor([[2.0]])
    multiply = lambda x: x * torch.tensor([1.0, 10.0, 100.0])  # noqa: E731
    assert fused.part(1, x, multiply).tolist() == [[20.0, 200.0]]
    assert fused.part(0, x, None).tolist() == [[2.0]]


@pytest.mark.parametrize(("kind", "families"), [("llama", 4), ("mistral", 4), ("qwen2", 4), ("opt", 2)])
def test_models_answer_as_before(kind, families):
    pair = Pair(pruned(kind)[0], "auto")
    with pair.as_("sparse") as model, torch.no_grad():
        before, size = model(IDS).logits, pair.bytes("sparse")
        single = [weakref.ref(part) for part in (model.get_submodule(name) for name in pair.forms["sparse"])]
        pair.forms.clear()
        assert fuse(model) == families
        after = model(IDS).logits
    assert torch.allclose(before, after, atol=1e-5)
    gc.collect()
    left = sum(reference() is not None for reference in single)
    fused = sum(isinstance(module, Member) for module in model.modules())
    assert left == len(single) - fused  # the others are freed
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if t.numel()}
    assert abs(sum(tensors.values()) - size) < 0.05 * size  # the weights are there once
    assert fuse(model) == 0
    with torch.no_grad():
        assert torch.allclose(copy.deepcopy(model)(IDS).logits, before, atol=1e-5)


def test_a_part_says_what_it_is():
    _, (first, second, _), *_ = three()
    assert (second.in_features, second.out_features, second.weight.dtype) == (6, 2, torch.float32)
    assert "rows 4 to 6 of 9" in str(second)
    assert len(list(first.parameters())) == 2
    assert not list(second.parameters())


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """CudaLinear with products by torch in the kernels' place."""
    weights = {}

    def build_and_remember(bitmask, values, row_offsets, columns, dtype):
        layout = build(bitmask, values, row_offsets, columns, Plan(6), dtype)
        weights[layout.values.data_ptr()] = portable.unpack(bitmask, values, row_offsets, columns).to(dtype)
        return layout

    def weight(layout):
        return weights[layout.values.data_ptr()]

    def multiply(x, layout, scales, bias):
        return portable.finish(nn.functional.linear(x, weight(layout)), scales, bias, x.dtype)

    fakes = {"wanted": lambda device: "asked", "prove": lambda *what: None}
    for name, fake in (fakes | {"build": build_and_remember, "expand": weight, "multiply": multiply}).items():
        monkeypatch.setattr(linear, name, fake)


@pytest.mark.parametrize("values", ["auto", "int8"])
def test_prepared_models_are_fused_in_both_forms(as_on_a_gpu, values):
    model, _ = pruned("qwen2")
    model = model.to(torch.bfloat16)
    with torch.no_grad():
        before = model(IDS).logits.double()
        pair = Pair(model, values)
        assert {type(part) for part in pair.forms["sparse"].values()} == {linear.CudaLinear}
        stacked = [name for name in pair.forms["sparse"] if name.endswith("stacked")]
        assert sorted(stacked)[0] == "model.layers.0.mlp.gate_proj.stacked"
        assert len(stacked) == 4
        for form in ("dense", "sparse", "dense"):
            with pair.as_(form) as chosen:
                assert (chosen(IDS).logits.double() - before).norm() <= 0.03 * before.norm()
                kinds = {type(chosen.get_submodule(name)) for name in pair.forms[form]}
                assert kinds == {nn.Linear if form == "dense" else linear.CudaLinear}


def test_a_dense_model_is_left_alone():
    model = make_model()
    assert fuse(model) == 0
    assert not any(isinstance(module, Member) for module in model.modules())
