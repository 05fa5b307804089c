"""A packed layer in another dtype, and under torch's tracing and fake tensors: right results, or one clear line."""

import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.loading import load
from phoenix_sparse.runtime.packed import pack, quantize, unpack
from phoenix_sparse.runtime.packing import pack_model
from phoenix_sparse.runtime.sparse_linear import SparseLinear
from tiny import pruned

STEPS = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # halves of them, relative


def layer_of(density, values=torch.bfloat16, largest=1.0):
    """A layer (few of its values may be held in slices, where the kernels have them), and its weight in float64."""
    generator = torch.Generator().manual_seed(0)
    weight = largest * torch.randn(50, 300, generator=generator).bfloat16()
    packed = pack(weight.masked_fill(torch.rand(50, 300, generator=generator) >= density, 0.0))
    packed = quantize(packed) if values == torch.int8 else packed
    bias = nn.Parameter(torch.randn(50, generator=generator).bfloat16(), requires_grad=False)
    return SparseLinear.of(packed, torch.bfloat16, bias), unpack(packed).double()


@pytest.mark.parametrize("density", [0.05, 0.5])
@pytest.mark.parametrize("values", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_converted_layer_computes_in_the_dtype_with_the_values_that_were_packed(density, values, dtype):
    layer, weight = layer_of(density, values)
    held = type(layer.slices)
    bias, x = layer.bias.double(), torch.randn(3, 300)
    layer.to(dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert layer.packed.compressed.dtype == values
    assert layer.scales is None or layer.scales.dtype == torch.bfloat16
    if dtype == torch.float32:
        assert type(layer.slices) is held
    with torch.no_grad():
        found, x = layer(x.to(dtype)), x.to(dtype).double()
    assert found.dtype == dtype
    exact = x @ weight.T + bias
    assert ((found.double() - exact).abs() <= STEPS[dtype] * exact.abs() + 1e-6 * (x.abs() @ weight.abs().T)).all()
    # And back: nothing was lost on the way.
    assert torch.equal(layer.to(torch.bfloat16).dense().double(), weight.bfloat16().double())


def test_values_beyond_float16_survive_it():
    layer, weight = layer_of(0.5, largest=1e6)
    with torch.no_grad():
        found = layer.half()(1e-6 * torch.eye(300).half())
    assert torch.isfinite(found).all()
    assert torch.equal(layer.packed.compressed.double(), weight[weight != 0])


def test_a_dtype_without_a_product_is_refused_at_once():
    layer, _ = layer_of(0.5)
    with pytest.raises(PhoenixError, match="float32, bfloat16 or float16, not float64; load the model again"):
        layer.double()
    assert layer.weight.dtype == layer.compressed.dtype == torch.bfloat16


def test_a_converted_model_is_saved_as_its_config_says(tmp_path):
    model = pruned()[0].to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    pack_model(tmp_path / "dense", tmp_path / "packed")
    converted = load(tmp_path / "packed").to(torch.float32)
    converted.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "again"))
    assert before.keys() == after.keys()
    names = [name for name in before if name.endswith(".compressed")]
    assert names
    assert all(torch.equal(before[name], after[name]) for name in names)
    assert all(before[name].dtype == after[name].dtype for name in names)
    ids = torch.tensor([[5, 9, 200, 31]])
    with torch.no_grad():
        exact = model.float()(ids).logits
        for one in (converted, load(tmp_path / "again", dtype="float32")):
            torch.testing.assert_close(one(ids).logits, exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_a_trace_holds_the_product_and_not_its_result(density):
    layer, _ = layer_of(density)
    x, other = torch.randn(3, 300).bfloat16(), torch.randn(5, 300).bfloat16()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and in use
        traced = torch.jit.trace(layer, (x,))
        assert torch.equal(traced(other), layer(other))


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_fake_tensors_get_a_fake_product(density):
    layer, _ = layer_of(density)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = layer(mode.from_tensor(torch.randn(2, 3, 300).bfloat16()))
    assert type(found) is FakeTensor
    assert (tuple(found.shape), found.dtype) == ((2, 3, 50), torch.bfloat16)
