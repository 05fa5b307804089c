import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import phoenix_sparse.runtime.cuda.forms as forms
import phoenix_sparse.runtime.cuda.linear as linear
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.cuda import product, scattered
from phoenix_sparse.runtime.cuda.layout import LANES, TOGETHER, Layout, Plan, build, divide, order
from phoenix_sparse.runtime.packed import pack, quantize
from phoenix_sparse.runtime.sparse_linear import SparseLinear

PLANS = [Plan(6, warps=2, slack=1, ring=40), Plan(3, warps=8), Plan(5, warps=3, slack=8, ring=64, deepest=2)]


def sparse(out, columns, density, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(out, columns, generator=generator) < density
    return torch.where(kept, torch.randn(out, columns, generator=generator), 0.0).to(dtype)


def layout_of(weight, plan):
    packed = pack(weight)
    return build(packed.bitmask, packed.compressed, packed.row_offsets, weight.shape[1], plan)


def decode(layout: Layout, sequence: torch.Tensor) -> torch.Tensor:
    """The matrix again, one position after another, by nothing but the layout's description."""
    dense = torch.zeros(layout.tiles * 16, layout.blocks * 128)
    _, counts = order(layout.tiles, layout.blocks, layout.groups, layout.slabs, layout.warps_per_block)
    for (first, eights, *_), count, offsets in zip(
        layout.warps.tolist(), counts.tolist(), layout.offsets.long(), strict=True
    ):
        memory, window, at = layout.values[eights * 8 :].float(), 0, offsets.clone()
        for number in range(first, first + count):
            step = int(layout.headers[number]) % 256
            window, at = window + step, (at - step).clamp(min=0)
            row, column = (
                16 * int(sequence[number]) // layout.blocks // 16 * 16,
                int(sequence[number]) % layout.blocks,
            )
            for lane in range(LANES):
                for word in range(2):
                    bits = int(layout.bitmaps[number, lane, word]) & 0xFFFFFFFF
                    for pair in range(8):
                        for half in range(2):
                            for odd in range(2):
                                if bits >> (8 * (2 * half + odd) + pair) & 1:
                                    place = (
                                        row + lane // 4 + 8 * half,
                                        128 * column + 64 * word + 16 * (lane % 4) + 2 * pair + odd,
                                    )
                                    dense[place] = memory[window + at[lane, odd], lane, odd]
                                    at[lane, odd] += 1
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
    weight[seed % out] = 0
    layout = layout_of(weight, plan)
    sequence, _ = order(layout.tiles, layout.blocks, layout.groups, layout.slabs, plan.warps)
    assert torch.equal(decode(layout, sequence), weight.float())


@settings(max_examples=40, deadline=None)
@given(
    tiles=st.integers(1, 60),
    blocks=st.integers(1, 200),
    processors=st.integers(1, 140),
    warps=st.integers(1, 8),
)
def test_every_tile_is_some_warps(tiles, blocks, processors, warps):
    groups, slabs = divide(tiles, blocks, processors)
    assert groups * slabs <= max(processors, 1)
    sequence, counts = order(tiles, blocks, groups, slabs, warps)
    assert torch.equal(sequence.sort().values, torch.arange(tiles * blocks))
    assert len(counts) == groups * slabs * warps
    assert counts.sum() == tiles * blocks
    share = blocks / slabs / warps * tiles / groups
    assert counts.max() <= (share + 4 * (blocks / slabs / warps) + 2 * (tiles / groups) + 8 * TOGETHER)


def test_uneven_rows_cost_little():
    """Rows of everything beside rows of nothing: the window keeps streams together, at the price of holes."""
    weight = sparse(160, 1024, 0.5)
    weight[::2] = 0
    weight[1::2] = 1.0
    layout = layout_of(weight, PLANS[0])
    assert layout.ring <= PLANS[0].ring
    assert torch.equal(layout.values[layout.values != 0].sort().values, weight[weight != 0].sort().values)


def test_size_at_half_the_weights():
    layout = layout_of(sparse(2048, 2048, 0.5), Plan(16))
    assert layout.nbytes / (2048 * 2048) < 1.25  # 1.125 in the file; short streams are padded more


@pytest.mark.parametrize("wrong", [{"ring": 56}, {"ring": 100}, {"deepest": 0}, {"deepest": 8}, {"warps": 0}])
def test_a_plan_that_cannot_be_is_refused(wrong):
    with pytest.raises(PhoenixError, match="ring needs"):
        Plan(4, **wrong)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("late", [False, True], ids=["copies at once", "copies late"])
@pytest.mark.parametrize(
    ("out", "columns", "density", "batch", "plan", "dtype"),
    [
        (150, 300, 0.5, 17, PLANS[0], torch.bfloat16),
        (48, 9000, 0.5, 2, PLANS[0], torch.bfloat16),
        (20, 700, 0.7, 9, PLANS[1], torch.float16),
        (130, 500, 0.05, 1, PLANS[1], torch.bfloat16),
        (33, 260, 1.0, 32, PLANS[0], torch.bfloat16),
        (1, 1, 0.0, 1, PLANS[1], torch.bfloat16),
    ],
)
def test_the_kernels_source_run_on_the_cpu(out, columns, density, batch, plan, dtype, late):
    from runtime.cuda import emulated

    weight = sparse(out, columns, density, dtype=dtype)
    weight[out // 2] = 0
    weight[out // 3] = weight[out // 3] + 1.5
    layout = layout_of(weight, plan)
    assert torch.equal(emulated.expand(layout, late)[:, :columns], weight)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, columns, generator=generator).to(dtype)
    scales, bias = torch.rand(out, generator=generator) + 0.5, torch.randn(out, generator=generator)
    y = emulated.multiply(x, layout, late, scales, bias)
    exact = x.double() @ weight.double().t() * scales.double() + bias.double()
    assert (y.double() - exact).norm() <= 4e-3 * exact.norm()
    assert torch.equal(emulated.multiply(x, layout, late, scales, bias), y)


@needs_compiler
def test_the_emulator_sees_a_ring_that_is_too_small():
    from runtime.cuda import emulated

    weight = sparse(300, 1024, 0.9)
    layout = layout_of(weight, PLANS[0])
    layout.ring -= 8
    wrong = [not torch.equal(emulated.expand(layout, late), weight) for late in (False, True)]
    assert any(wrong)


@needs_compiler
def test_the_operator(on_the_cpu):
    weight = sparse(40, 300, 0.5)
    layer = linear.CudaLinear(layout_of(weight, PLANS[0]), None, torch.ones(40))
    assert torch.equal(layer.dense(), weight)
    for shape in ((300,), (2, 3, 300), (70, 300), (0, 300)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        exact = x.double() @ weight.double().t() + 1
        y = layer(x)
        assert y.shape == exact.shape
        assert (y.double() - exact).norm() <= 5e-3 * exact.norm()
    x = torch.randn(3, 300).bfloat16()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


@needs_compiler
def test_layers_are_prepared_and_proved(on_the_cpu, monkeypatch):
    here = torch.device("cpu")
    monkeypatch.setattr(linear, "wanted", lambda device: "asked")
    weight = sparse(48, 200, 0.5)
    model = nn.Sequential(SparseLinear.of(quantize(pack(weight)), torch.bfloat16, nn.Parameter(torch.ones(48))))
    model.append(nn.ReLU())
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        before = model(x)
        linear.prepare(model, here)
        assert isinstance(model[0], linear.CudaLinear)
        assert (model(x).double() - before.double()).norm() <= 6e-3 * before.double().norm()
    linear.prove.cache_clear()
    right = linear.multiply
    monkeypatch.setattr(linear, "multiply", lambda *parts: right(*parts) * 1.1)
    with pytest.raises(PhoenixError, match="wrong products"):
        linear.prove(here, torch.bfloat16, False)
    linear.prove.cache_clear()
    float32 = SparseLinear.of(pack(weight.float()), torch.float32)
    with pytest.raises(PhoenixError, match="compute in bfloat16 or float16"):
        linear.CudaLinear.of(float32)


@needs_compiler
@pytest.mark.parametrize(("density", "kind"), [(0.5, Layout), (0.2, Layout), (0.1, scattered.Scattered)])
def test_few_values_get_the_other_layout(on_the_cpu, density, kind):
    weight = sparse(40, 300, density)
    layer = linear.CudaLinear.of(SparseLinear.of(pack(weight), torch.bfloat16))
    assert type(layer.form) is kind
    assert torch.equal(layer.dense(), weight)
    linear.prove.cache_clear()
    linear.prove(torch.device("cpu"), torch.bfloat16, kind is scattered.Scattered)
    linear.prove.cache_clear()
    for rows in (1, 33, 300):
        x = torch.randn(rows, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
        exact = x.double() @ weight.double().t()
        assert (layer(x).double() - exact).norm() <= 5e-3 * exact.norm()


def test_a_model_in_float32_is_left_as_it_is_unless_kernels_were_asked_for(monkeypatch):
    model = nn.Sequential(SparseLinear.of(pack(sparse(16, 64, 0.5).float()), torch.float32))
    monkeypatch.setattr(linear, "wanted", lambda device: "usual")
    linear.prepare(model, torch.device("cpu"))
    assert isinstance(model[0], SparseLinear)
    monkeypatch.setattr(linear, "wanted", lambda device: "asked")
    with pytest.raises(PhoenixError, match="compute in bfloat16 or float16"):
        linear.prepare(model, torch.device("cpu"))


def test_a_layer_in_the_layout_is_not_saved():
    layer = linear.CudaLinear(layout_of(sparse(16, 64, 0.5), PLANS[0]), None, None)
    with pytest.raises(PhoenixError, match="can't be saved"):
        layer.state_dict()


@needs_compiler
@pytest.mark.parametrize("density", [0.5, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_converted_layer_keeps_its_layout_and_unpacks_it(on_the_cpu, density, dtype):
    """A model is converted one module after the other: one that refused would leave it half converted."""
    weight = sparse(40, 300, density)
    layer = linear.CudaLinear.of(SparseLinear.of(pack(weight), torch.bfloat16, nn.Parameter(torch.ones(40))))
    layer.dense_copy, held = weight, [part.dtype for part in layer.parts]  # a copy serves its own dtype alone
    layer.to(dtype)
    assert layer.weight.dtype == layer.dense().dtype == dtype
    assert [part.dtype for part in layer.parts] == held
    for rows in (1, 100):
        x = torch.randn(rows, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
        exact, found = x.double() @ weight.double().t() + 1, layer(x)
        assert found.dtype == dtype
        step = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
        assert (found.double() - exact).norm() <= step * exact.norm()
    x = torch.randn(3, 300).bfloat16()
    assert torch.equal(
        layer.bfloat16()(x),
        linear.CudaLinear.of(SparseLinear.of(pack(weight), torch.bfloat16, nn.Parameter(torch.ones(40))))(x),
    )


@pytest.mark.parametrize(("kibibytes", "warps"), [(227, 8), (163, 6), (99, 4), (64, None)])
def test_plans_fit_the_gpu(monkeypatch, kibibytes, warps):
    facts = SimpleNamespace(multi_processor_count=100, name="It")
    monkeypatch.setattr(forms, "most_shared", lambda device: kibibytes * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    forms.plan_for.cache_clear()
    if warps is None:
        with pytest.raises(PhoenixError, match="too little shared memory"):
            forms.plan_for(torch.device("cuda"))
    else:
        assert forms.plan_for(torch.device("cuda")).warps == warps
    forms.plan_for.cache_clear()


def test_what_the_product_refuses():
    layout = layout_of(sparse(16, 64, 0.5), PLANS[0])
    for x in (torch.zeros(1, 65).bfloat16(), torch.zeros(1, 64), torch.zeros(1, 64).bfloat16()):
        with pytest.raises(PhoenixError, match="sparse_linear: (x is|this layout)"):
            product.multiply(x, layout)


def test_the_kernels_are_usual_where_they_run(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for capability, usual in (((9, 0), "usual"), ((8, 0), "usual"), ((7, 5), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, known=capability: known)
        assert linear.wanted(gpu) == usual
        assert linear.wanted(torch.device("cpu")) is None
    monkeypatch.setenv(linear.VARIABLE, "kernels")
    assert linear.wanted(gpu) == "asked"
    assert linear.wanted(torch.device("cpu")) is None
    monkeypatch.setenv(linear.VARIABLE, "torch")
    assert linear.wanted(gpu) is None
    monkeypatch.setenv(linear.VARIABLE, "fast")
    with pytest.raises(PhoenixError, match="PHOENIX_CUDA: 'fast'"):
        linear.wanted(gpu)
