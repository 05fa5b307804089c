import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import phoenix_sparse.runtime.cuda.linear as linear
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.bench import Pair
from phoenix_sparse.runtime.cuda.forms import expand, form_of, multiply, numbers_of
from phoenix_sparse.runtime.cuda.fusing import stack
from phoenix_sparse.runtime.cuda.layout import LANES, Layout, Plan, build, order
from phoenix_sparse.runtime.cuda.product import macros
from phoenix_sparse.runtime.packed import Packed, check, pack, quantize
from phoenix_sparse.runtime.sparse_linear import SparseLinear
from tiny import pruned

PLANS = [Plan(6, warps=2, slack=1, ring=40), Plan(3, warps=8), Plan(5, warps=3, slack=8, ring=64, deepest=2)]
DTYPES = [torch.bfloat16, torch.float16]


def sparse(out, columns, density, seed=0):
    """int64, of every int8 value; with a row of the extremes and an empty one where there is room."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (out, columns), generator=generator)
    weight[torch.rand(out, columns, generator=generator) >= density] = 0
    if out > 2:
        weight[out // 2] = 0
        weight[out // 3] = torch.where(torch.arange(columns) % 3 == 0, -128, 127)
    return weight


def packed_of(weight, seed=0):
    """With scales as a file has them."""
    packed = pack(weight.float())
    scales = (torch.rand(len(weight), generator=torch.Generator().manual_seed(seed)) + 0.5).bfloat16()
    return Packed(packed.shape, packed.bitmask, packed.compressed.to(torch.int8), packed.row_offsets, scales)


def layout_of(weight, plan, dtype=torch.bfloat16):
    packed = packed_of(weight)
    return build(packed.bitmask, packed.compressed, packed.row_offsets, weight.shape[1], plan, dtype)


def decode(layout: Layout) -> torch.Tensor:
    """The matrix again, one position after another, by nothing but the layout's description."""
    sequence, counts = order(layout.tiles, layout.blocks, layout.groups, layout.slabs, layout.warps_per_block)
    dense = torch.zeros(layout.tiles * 16, layout.blocks * 128, dtype=torch.int64)
    for (first, eights, *_), count, offsets in zip(
        layout.warps.tolist(), counts.tolist(), layout.offsets.tolist(), strict=True
    ):
        streams = layout.values[eights * 8 :].view(torch.uint8).transpose(0, 1).reshape(LANES, -1).tolist()
        window, at = 0, [offset for (offset,) in offsets]
        for number in range(first, first + count):
            step = 4 * (int(layout.headers[number]) % 256)
            window, at = window + step, [max(place - step, 0) for place in at]
            row, column = 16 * (int(sequence[number]) // layout.blocks), 128 * (int(sequence[number]) % layout.blocks)
            for lane in range(LANES):
                for word in range(2):
                    bits = int(layout.bitmaps[number, lane, word])
                    for pair in range(8):
                        for half, odd in ((0, 0), (0, 1), (1, 0), (1, 1)):
                            if bits >> (8 * (2 * half + odd) + pair) & 1:
                                place = (
                                    row + lane // 4 + 8 * half,
                                    column + 64 * word + 16 * (lane % 4) + 2 * pair + odd,
                                )
                                dense[place] = 127 - streams[lane][window + at[lane]]
                                at[lane] += 1
    return dense[: layout.shape[0], : layout.shape[1]]


@settings(max_examples=12, deadline=None)
@given(
    out=st.integers(1, 70),
    columns=st.integers(1, 400),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 99),
    plan=st.sampled_from(PLANS),
)
def test_a_layout_holds_the_matrix(out, columns, density, seed, plan):
    weight = sparse(out, columns, density, seed)
    assert torch.equal(decode(layout_of(weight, plan)), weight)


def test_a_little_more_than_half_the_bytes_of_floats():
    weight = sparse(1024, 2048, 0.5)
    packed = packed_of(weight)
    parts = [packed.bitmask, packed.compressed, packed.row_offsets, 2048, Plan(8)]
    whole, floats = build(*parts, torch.bfloat16), build(parts[0], packed.compressed.bfloat16(), *parts[2:])
    assert whole.nbytes / weight.numel() < 0.7  # 0.625 in the file
    assert whole.nbytes < 0.57 * floats.nbytes
    assert torch.equal(whole.bitmaps[: len(whole.bitmaps) - whole.depth], floats.bitmaps[: -floats.depth])


def test_the_numbers_of_a_layout_tell_what_to_compile():
    for dtype in DTYPES:
        layout = layout_of(sparse(20, 300, 0.5), PLANS[0], dtype)
        again = form_of(numbers_of(layout), layout.tensors())
        assert again == layout
        assert all(isinstance(number, int) for number in numbers_of(layout))
        assert again.dtype == dtype
        assert macros(again, 1)["INT8"] == 1
        assert macros(again, 1)["HALF"] == DTYPES.index(dtype)


def test_products_in_another_dtype_are_refused():
    packed = packed_of(sparse(16, 64, 0.5))
    parts = [packed.bitmask, packed.compressed, packed.row_offsets, 64, PLANS[0]]
    for dtype in (None, torch.float32):
        with pytest.raises(PhoenixError, match=r"no products of torch\.int8 in"):
            build(*parts, dtype)
    with pytest.raises(PhoenixError, match=r"no products of torch\.float16 in torch\.bfloat16"):
        build(parts[0], packed.compressed.half(), *parts[2:], torch.bfloat16)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("late", [False, True], ids=["copies at once", "copies late"])
@pytest.mark.parametrize(
    ("out", "columns", "density", "batch", "plan", "dtype"),
    [
        (150, 300, 0.5, 17, PLANS[0], torch.bfloat16),
        (48, 9000, 0.5, 2, PLANS[0], torch.float16),
        (20, 700, 0.7, 9, PLANS[1], torch.float16),
        (130, 500, 0.05, 1, PLANS[1], torch.bfloat16),
        (33, 260, 1.0, 32, PLANS[2], torch.bfloat16),
        (300, 1024, 0.9, 4, PLANS[0], torch.bfloat16),
        (1, 1, 0.0, 1, PLANS[1], torch.bfloat16),
    ],
)
def test_the_kernels_source_run_on_the_cpu(out, columns, density, batch, plan, dtype, late):
    from runtime.cuda import emulated

    weight = sparse(out, columns, density)
    layout = layout_of(weight, plan, dtype)
    assert torch.equal(emulated.expand(layout, late)[:, :columns], weight.to(dtype))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, columns, generator=generator).to(dtype)
    scales, bias = torch.rand(out, generator=generator) / 32, torch.randn(out, generator=generator)
    y = emulated.multiply(x, layout, late, scales, bias)
    exact = x.double() @ weight.double().t() * scales.double() + bias.double()
    assert (y.double() - exact).norm() <= 4e-3 * exact.norm()
    assert torch.equal(emulated.multiply(x, layout, late, scales, bias), y)
    if out > 2:
        assert torch.equal(y[:, out // 2], bias[out // 2].to(dtype).expand(batch))  # an empty row is nothing at all


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_at_every_place_of_a_word(dtype):
    """The integers to the last bit, and products with one column after another of nothing but ones."""
    from runtime.cuda import emulated

    weight = (torch.arange(32 * 512).view(32, 512) * 5 + torch.arange(32)[:, None]) % 256 - 128
    weight[:, ::7] = 0
    layout = layout_of(weight, PLANS[1], dtype)
    assert {int(value) for value in weight.unique()} == set(range(-128, 128))
    dense = emulated.expand(layout, True)
    assert torch.equal(dense, weight.to(dtype))
    assert not (dense.signbit() & (dense == 0)).any()
    for first in range(0, 64, 32):
        x = torch.eye(512, dtype=dtype)[first : first + 32]
        y = emulated.multiply(x, layout, False)
        assert torch.equal(y, weight[:, first : first + 32].t().to(dtype))


@needs_compiler
def test_the_emulator_sees_a_ring_that_is_too_small():
    from runtime.cuda import emulated

    weight = sparse(300, 2048, 0.9)
    layout = layout_of(weight, Plan(6, warps=2, slack=1, ring=40, deepest=1))
    assert torch.equal(emulated.expand(layout, True), weight.to(torch.bfloat16))
    layout.ring -= 16
    wrong = [not torch.equal(emulated.expand(layout, late), weight.to(torch.bfloat16)) for late in (False, True)]
    assert any(wrong)


@needs_compiler
def test_the_layer(on_the_cpu):
    weight, bias = sparse(40, 300, 0.5), torch.randn(40, generator=torch.Generator().manual_seed(3))
    packed = packed_of(weight)
    check(packed, "it")
    layer = linear.CudaLinear.of(SparseLinear.of(packed, torch.bfloat16, nn.Parameter(bias)))
    assert layer.values.dtype == torch.int8
    assert layer.weight.dtype == torch.bfloat16
    assert layer.nbytes == layer.form.nbytes + 40 * 4
    dense = (weight.double() * packed.scales.double()[:, None]).bfloat16()
    assert torch.equal(layer.dense(), dense)
    for shape in ((300,), (2, 3, 300), (70, 300), (0, 300)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        exact = x.double() @ (weight.double() * packed.scales.double()[:, None]).t() + bias.double()
        y = layer(x)
        assert y.shape == exact.shape
        assert (y.double() - exact).norm() <= 5e-3 * exact.norm()
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), before)
    # Casting a model to the dtype that it has leaves scales and bias in the float32 that the kernels read.
    layer.to(torch.bfloat16)
    assert layer.scales.dtype == layer.offset.dtype == torch.float32
    assert torch.equal(layer(x), before)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stack_keeps_each_ones_scales(on_the_cpu, dtype):
    weights = [sparse(out, 200, 0.4, seed=out) for out in (32, 7, 50)]
    parts = [SparseLinear.of(packed_of(weight, seed), dtype) for seed, weight in enumerate(weights)]
    layer = linear.CudaLinear.of(stack(parts))
    assert layer.form.int8
    assert torch.equal(layer.dense(), torch.cat([part.dense() for part in parts]))
    x = torch.randn(5, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = torch.cat(
        [
            x.double() @ (weight.double() * part.scales.double()[:, None]).t()
            for weight, part in zip(weights, parts, strict=True)
        ],
        1,
    )
    assert (layer(x).double() - exact).norm() <= 4e-3 * exact.norm()


@needs_compiler
def test_few_values_become_floats(on_the_cpu):
    weight = sparse(60, 300, 0.05)
    packed = packed_of(weight)
    layer = linear.CudaLinear.of(SparseLinear.of(packed, torch.bfloat16))
    assert layer.form.dtype == layer.values.dtype == torch.bfloat16
    assert torch.equal(layer.dense(), (weight.double() * packed.scales.double()[:, None]).bfloat16())


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_are_proved(on_the_cpu, monkeypatch, dtype):
    here = torch.device("cpu")
    linear.prove.cache_clear()
    linear.prove(here, dtype, False, True)
    linear.prove.cache_clear()
    right = linear.expand
    monkeypatch.setattr(linear, "expand", lambda form: right(form) + (right(form) == -128))
    with pytest.raises(PhoenixError, match="they unpack wrongly"):
        linear.prove(here, dtype, False, True)
    linear.prove.cache_clear()


@needs_compiler
def test_a_model_is_prepared_with_what_proves_it(on_the_cpu, monkeypatch):
    proved = []
    monkeypatch.setattr(linear, "wanted", lambda device: "asked")
    monkeypatch.setattr(linear, "prove", lambda device, *what: proved.append(what))
    model, _ = pruned("qwen2")
    model = model.to(torch.bfloat16)
    ids = torch.tensor([[5, 9, 200, 31, 7]])
    with torch.no_grad():
        before = model(ids).logits.double()
        sizes = {}
        for values in ("int8", "auto"):
            pair = Pair(pruned("qwen2")[0].to(torch.bfloat16), values)
            sizes[values] = sum(part.values.nbytes for part in pair.forms["sparse"].values())
            with pair.as_("sparse") as chosen:
                assert (chosen(ids).logits.double() - before).norm() <= 0.03 * before.norm()
    assert set(proved) == {(torch.bfloat16, False, True), (torch.bfloat16, False, False)}
    assert sizes["int8"] < sizes["auto"]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("out", "columns", "density"),
    [(300, 5000, 0.5), (33, 130, 0.3), (16, 64, 1.0), (40, 90, 0.0), (2000, 9000, 0.6), (1, 8, 0.5), (3000, 4096, 0.2)],
)
def test_on_the_gpu(out, columns, density, dtype):
    gpu = torch.device("cuda")
    linear.prove(gpu, dtype, False, True)
    packed = packed_of(sparse(out, columns, density))
    layer = linear.CudaLinear.of(SparseLinear.of(packed, dtype).cuda())
    weight = sparse(out, columns, density).double() * packed.scales.double()[:, None]
    if density > 0:
        assert layer.form.int8
        assert torch.equal(expand(layer.form).cpu(), sparse(out, columns, density).to(dtype))
    assert torch.equal(layer.dense().cpu(), weight.to(dtype))
    generator = torch.Generator().manual_seed(1)
    for batch in (1, 3, 8, 9, 16, 17, 32, 64, 65):
        x = torch.randn(batch, columns, generator=generator).to(dtype) / 64
        y, exact = layer(x.cuda()), x.double() @ weight.t()
        assert (y.cpu().double() - exact).norm() <= 6e-3 * exact.norm()
        assert torch.equal(layer(x.cuda()), y)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_gpu_every_value_is_exact(dtype):
    weight = (torch.arange(64 * 512).view(64, 512) * 5 + torch.arange(64)[:, None]) % 256 - 128
    weight[:, ::7] = 0
    packed = packed_of(weight)
    layer = linear.CudaLinear.of(SparseLinear.of(packed, dtype).cuda())
    assert torch.equal(expand(layer.form).cpu(), weight.to(dtype))
    for first in range(0, 512, 32):
        x = torch.eye(512, dtype=dtype, device="cuda")[first : first + 32]
        assert torch.equal(multiply(x, layer.form).cpu(), weight[:, first : first + 32].t().to(dtype))
        assert torch.equal(multiply(x, layer.form), multiply(x, layer.form))


def test_what_quantize_gives_is_held_as_it_is():
    """From floats to the layout: the same integers, and no -128 among them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.where(torch.rand(48, 256, generator=generator) < 0.5, torch.randn(48, 256, generator=generator), 0.0)
    packed = quantize(pack(weight.bfloat16()))
    found = decode(build(packed.bitmask, packed.compressed, packed.row_offsets, 256, PLANS[0], torch.bfloat16))
    scaled = found.double() * packed.scales.double()[:, None]
    assert found.min() >= -127
    assert (scaled - weight.double()).abs().max() <= packed.scales.double().max()
