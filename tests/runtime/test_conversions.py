"""A packed layer in another dtype, and under torch's tracing and fake tensors: right results, or one clear line."""

import subprocess
import sys
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

STEPS = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 2**-51}
"""Halves of them, relative; and of float64 two, which the sums are taken in as well."""


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
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
    sums = 1e-14 if dtype == torch.float64 else 1e-6
    assert ((found.double() - exact).abs() <= STEPS[dtype] * exact.abs() + sums * (x.abs() @ weight.abs().T)).all()
    # And back: nothing was lost on the way.
    assert torch.equal(layer.to(torch.bfloat16).dense().double(), weight.bfloat16().double())


def test_values_beyond_float16_survive_it():
    layer, weight = layer_of(0.5, largest=1e6)
    with torch.no_grad():
        found = layer.half()(1e-6 * torch.eye(300).half())
    assert torch.isfinite(found).all()
    assert torch.equal(layer.packed.compressed.double(), weight[weight != 0])


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_gradients_in_float64_are_those_of_the_weight(density):
    layer, weight = layer_of(density)
    x = torch.randn(3, 300, dtype=torch.float64, requires_grad=True)
    layer.double()(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1), atol=1e-12, rtol=1e-12)


@pytest.fixture(scope="module")
def packed_model(tmp_path_factory):
    """A packed directory, and the model that it was packed from."""
    place = tmp_path_factory.mktemp("packed")
    model = pruned()[0].to(torch.bfloat16)
    model.save_pretrained(place / "dense")
    pack_model(place / "dense", place / "packed")
    return place / "packed", model


CONVERSIONS = {
    "double": lambda model: model.double(),
    "half": lambda model: model.half(),
    "float": lambda model: model.float(),
    "bfloat16": lambda model: model.bfloat16(),
    "to float64": lambda model: model.to(torch.float64),
    "to float16": lambda model: model.to(torch.float16),
    "to a place and float32": lambda model: model.to("cpu", torch.float32),
    "type": lambda model: model.type(torch.float64),  # which means integers, too
    "to float8": lambda model: model.to(torch.float8_e4m3fn),
    "to complex64": lambda model: model.to(torch.complex64),
    "to int8": lambda model: model.to(torch.int8),
    "to meta": lambda model: model.to("meta"),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_a_model_is_converted_as_a_whole_or_not_at_all(packed_model, convert):
    directory, source = packed_model
    model = load(directory)

    def kinds():
        layers = [part for part in model.modules() if isinstance(part, SparseLinear)]
        assert layers
        own = [part for layer in layers for name, part in layer.named_buffers() if name != "weight"]
        assert {part.dtype for part in own} == {torch.uint8, torch.bfloat16, torch.int64}
        computed = [*model.parameters(), *(layer.weight for layer in layers)]
        return {
            (part.dtype, part.device) for part in [*computed, *own] if part.is_floating_point() or part.is_complex()
        }

    before = kinds()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # complex models are new to torch
            convert(model)
    except (TypeError, ValueError):  # torch's words for integers, transformers' for half() and float()
        assert kinds() == before
    computed_in = {parameter.dtype for parameter in model.parameters()}
    assert len(computed_in) == 1
    assert {layer.weight.dtype for layer in model.modules() if isinstance(layer, SparseLinear)} == computed_in
    (dtype,) = computed_in
    ids = torch.tensor([[5, 9, 200, 31]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if model.device.type == "meta":
            assert {place.type for _, place in kinds()} == {"meta"}
        elif dtype in STEPS:
            torch.testing.assert_close(model(ids).logits.double(), source(ids).logits.double(), atol=0.1, rtol=0.1)
        else:
            with pytest.raises(PhoenixError, match="; give it float32, bfloat16, float16 or float64"):
                model(ids)


def test_emptied_arrays_are_not_sliced():
    """What lies in them is anybody's; a state that is loaded then is what the layer holds."""
    layer, _ = layer_of(0.05)
    state, x = {name: part.clone() for name, part in layer.state_dict().items()}, torch.randn(3, 300).bfloat16()
    with torch.no_grad():
        before = layer(x)
        layer._apply(torch.zeros_like)  # a tamer `to_empty`
        assert layer.slices is None
        with pytest.raises(PhoenixError, match="row_offsets end at another number"):
            layer(x)
        layer.load_state_dict(state)
        torch.testing.assert_close(layer(x), before, atol=2e-2, rtol=2**-7)


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


def test_importing_phoenix_is_enough_for_saved_traces_and_exports(tmp_path):
    x, expected = torch.randn(3, 300).bfloat16(), []
    for density in (0.05, 0.5):
        layer, _ = layer_of(density)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(layer, (x,)).save(tmp_path / f"{density}.pt")
            torch.export.save(torch.export.export(layer, (x,)), tmp_path / f"{density}.pt2")
            expected.append(layer(x))
    torch.save((x, expected), tmp_path / "expected")
    code = (
        "import importlib.util, phoenix_sparse\n"
        "assert importlib.util.find_spec('torch')\n"  # many ask, and don't import
        "import torch\n"
        "assert 'phoenix' not in repr((torch.__loader__, torch.__spec__.loader))\n"
        "x, expected = torch.load('expected')\n"
        "for density, y in zip((0.05, 0.5), expected):\n"
        "    for f in (torch.jit.load(f'{density}.pt'), torch.export.load(f'{density}.pt2').module()):\n"
        "        assert torch.equal(f(x), y)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_fake_tensors_get_a_fake_product(density):
    layer, _ = layer_of(density)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = layer(mode.from_tensor(torch.randn(2, 3, 300).bfloat16()))
    assert type(found) is FakeTensor
    assert (tuple(found.shape), found.dtype) == ((2, 3, 50), torch.bfloat16)
