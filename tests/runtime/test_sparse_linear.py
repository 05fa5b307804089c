"""SparseLinear with the layout of its weights: held once, and given back as it was read."""

import copy
import io

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.models import load_model, prunable_linears
from phoenix_sparse.runtime.kernels import choice
from phoenix_sparse.runtime.loading import load
from phoenix_sparse.runtime.packed import pack, quantize, unpack
from phoenix_sparse.runtime.packing import pack_model
from phoenix_sparse.runtime.sparse_linear import PACKED, SLICED, SparseLinear
from runtime.kernels.matrices import libraries
from tiny import make_model

LIBRARIES = libraries()
pytestmark = pytest.mark.skipif(
    not LIBRARIES or not LIBRARIES[-1].has_sliced, reason="needs AVX-512 with bfloat16, where weights are sliced"
)


@pytest.fixture(autouse=True)
def nothing_timed(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "off")


def layer_of(values, density=0.1, seed=0, dtype=torch.bfloat16):
    """A layer, and what it is packed from."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(50, 300, generator=generator).bfloat16()
    packed = pack(weight.masked_fill(torch.rand(50, 300, generator=generator) >= density, 0.0))
    packed = quantize(packed) if values == torch.int8 else packed
    bias = nn.Parameter(torch.randn(50, generator=generator).to(dtype), requires_grad=False)
    return SparseLinear.of(packed, dtype, bias), packed


def same(packed, other):
    return all(torch.equal(getattr(packed, name), getattr(other, name)) for name in PACKED)


@pytest.mark.parametrize("values", [torch.bfloat16, torch.int8])
def test_few_values_are_sliced_and_held_once(values):
    layer, packed = layer_of(values)
    assert layer.slices is not None
    # Nothing else: that the packed arrays are among the buffers is no second copy.
    held = sum(buffer.nbytes for name, buffer in layer.named_buffers() if name in (*PACKED, *SLICED, "scales"))
    assert held == layer.nbytes <= layer.slices.places * (1 + values.itemsize) * 1.1 + 1000
    assert same(layer.packed, packed)
    assert "sliced" in repr(layer)
    dense, _ = layer_of(values, density=0.5)
    assert dense.slices is None
    assert f"density={dense.compressed.numel() / 15000:.3f}" in repr(dense)


@pytest.mark.parametrize("values", [torch.bfloat16, torch.int8])
def test_it_computes_what_the_packed_arrays_do(values):
    layer, packed = layer_of(values)
    x = torch.randn(3, 7, 300).bfloat16()
    with torch.no_grad():
        found, other = layer(x), copy.deepcopy(layer)
        other.unplace()
        assert other.slices is None
        torch.testing.assert_close(found, other(x), atol=2e-2, rtol=2**-7)
        exact = x.double() @ unpack(packed).double().T + layer.bias.double()
        assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * x.double().norm()).all()


@pytest.mark.parametrize("values", [torch.bfloat16, torch.int8])
def test_its_state_is_what_was_read(values):
    layer, packed = layer_of(values)
    state = layer.state_dict()
    assert set(state) == {"weight", "bias", "shape", *PACKED, *(["scales"] if values == torch.int8 else [])}
    assert all(torch.equal(state[name], part) for name, part in packed.tensors().items())
    assert set(nn.Sequential(layer).state_dict()) == {f"0.{name}" for name in state}


def test_a_state_can_be_loaded():
    layer, _ = layer_of(torch.bfloat16)
    state = layer.state_dict()
    state["compressed"] = state["compressed"] * 2
    before = layer.dense()
    layer.load_state_dict(state)
    assert layer.slices is not None
    assert torch.equal(layer.dense(), before * 2)


def test_a_state_that_does_not_fit_leaves_the_layer_as_it_was():
    layer, packed = layer_of(torch.bfloat16)
    state = layer.state_dict()
    state["bitmask"] = state["bitmask"].clone().fill_(255)
    with pytest.raises(PhoenixError, match="^0: .*pack the model again"):
        nn.Sequential(layer).load_state_dict({f"0.{name}": part for name, part in state.items()})
    with pytest.raises(RuntimeError, match="size mismatch for compressed"):
        layer.load_state_dict(layer_of(torch.bfloat16, seed=1)[0].state_dict())
    assert layer.slices is not None
    assert same(layer.packed, packed)


def test_moves_and_conversions():
    layer, packed = layer_of(torch.int8)
    steps = layer.steps.data_ptr()
    assert layer.to("cpu").to(torch.bfloat16).steps.data_ptr() == steps  # nothing to do
    layer.float()
    assert layer.slices is not None  # int8 values stay as they are
    assert layer.weight.dtype == layer.bias.dtype == torch.float32
    assert same(layer.packed, packed)
    assert layer.half().slices is None  # for which there is no kernel
    assert same(layer.packed, packed)
    layer, packed = layer_of(torch.bfloat16)
    assert layer.float().slices is not None  # as do all others
    assert same(layer.packed, packed)
    layer = layer_of(torch.bfloat16)[0].to("meta")
    assert layer.bitmask.shape == packed.bitmask.shape
    assert layer.slices is None


def test_copies_and_pickles_hold_packed_arrays():
    layer, packed = layer_of(torch.bfloat16)
    x = torch.randn(2, 300).bfloat16()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert other.slices is not None
        assert other.steps.data_ptr() != layer.steps.data_ptr()
        assert same(other.packed, packed)
        with torch.no_grad():
            assert torch.equal(other(x), layer(x))
    buffers = layer.__getstate__()["_buffers"]
    assert all(buffers[name] is None for name in SLICED)
    assert layer.slices is not None


def test_torch_compile_and_gradients():
    layer, _ = layer_of(torch.bfloat16)
    x = torch.randn(3, 300, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dense().float().sum(0).expand(3, -1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_a_model_of_few_values(tmp_path, values):
    model, generator = make_model().to(torch.bfloat16), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for linear in prunable_linears(model).values():
            linear.weight.masked_fill_(torch.rand(linear.weight.shape, generator=generator) >= 0.05, 0.0)
    model.save_pretrained(tmp_path / "dense")
    pack_model(tmp_path / "dense", tmp_path / "packed", values=values)
    loaded = load(tmp_path / "packed")
    layers = [layer for layer in loaded.modules() if isinstance(layer, SparseLinear)]
    # Of so few columns, some have a row that takes another step for itself.
    assert sum(layer.slices is not None for layer in layers) > len(layers) / 2
    loaded.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ids = torch.tensor([[5, 9, 200, 31, 7, 7, 120]])
    options = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        exact = load_model(tmp_path / "dense", "float32")(ids).logits
        slack = 0.05 if values == "bf16" else 0.1
        assert torch.allclose(loaded(ids).logits.float(), exact, atol=slack, rtol=slack)
        assert torch.equal(loaded.generate(ids, **options), load(tmp_path / "again").generate(ids, **options))
