import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.cuda import scattered_product
from phoenix_sparse.runtime.cuda.scattered import AHEAD, FAR, LANES, WAYS, Plan, Scattered, build
from phoenix_sparse.runtime.packed import pack

PLANS = [Plan(3, warps=2), Plan(5, warps=4, most=264), Plan(2, warps=16, most=1024), Plan(1, warps=1)]


def sparse(out, columns, density, seed=0, dtype=torch.bfloat16):
    """Random, with a full row, an empty one, one of a single value, and one with values far apart."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(out, columns, generator=generator) < density
    if out > 8:
        kept[out // 2] = False
        kept[out // 3] = True
        kept[out // 4] = torch.arange(columns) == columns - 1
        kept[out // 5] = torch.arange(columns) % 600 == 5
    return torch.where(kept, torch.randn(out, columns, generator=generator), 0.0).to(dtype)


def layout_of(weight, plan):
    packed = pack(weight)
    return build(packed.bitmask, packed.compressed, packed.row_offsets, weight.shape[1], plan)


def tasks_of(layout: Scattered):
    """(slab, task, its chunks) of every task, by nothing but the layout's description."""
    lengths = layout.lengths.tolist()
    for warp, (chunk, first, count, slab) in enumerate(layout.warps.tolist()):
        chunks = [*range(warp * AHEAD, warp * AHEAD + AHEAD), *range(chunk, len(layout.values) - AHEAD)]
        for task in [warp, *range(first, first + count - 1)] if count else []:
            yield slab, task, torch.tensor(chunks[: lengths[task]], dtype=torch.int64)
            chunks = chunks[lengths[task] :]


def decode(layout: Scattered) -> torch.Tensor:
    """The matrix again, one value after another."""
    dense = torch.zeros(layout.shape)
    values, deltas = layout.values.float(), layout.deltas.long()
    tasks, read = [], []
    for slab, task, chunks in tasks_of(layout):
        tasks.append(task)
        read += chunks.tolist()
        at = layout.starts[task].long()
        for number in chunks:
            at += deltas[number]
            for lane, way in values[number].nonzero().tolist():
                row, column = int(layout.rows[task, lane]), slab * layout.width + int(at[lane, way])
                assert row >= 0
                assert dense[row, column] == 0
                dense[row, column] = values[number, lane, way]
    assert len(set(read)) == len(read)
    idle = torch.tensor(sorted(set(range(len(layout.lengths))) - set(tasks)), dtype=torch.int64)
    assert len(set(tasks)) == len(tasks)
    assert bool((layout.rows[idle] == -1).all())
    assert not layout.lengths[idle].any()
    assert int((values != 0).sum()) == int((dense != 0).sum())
    return dense


@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(1, 90),
    columns=st.integers(1, 1500),
    density=st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.3]),
    seed=st.integers(0, 99),
    plan=st.sampled_from(PLANS),
)
def test_a_layout_holds_the_matrix(out, columns, density, seed, plan):
    weight = sparse(out, columns, density, seed)
    layout = layout_of(weight, plan)
    assert layout.grid == max(plan.processors, layout.slabs)
    assert torch.equal(decode(layout), weight.float())
    rows = layout.rows[:, :: layout.pieces]
    assert torch.equal(rows.repeat_interleave(layout.pieces, 1), layout.rows)
    for row in range(out):
        assert int((rows == row).sum()) == layout.slabs


def test_neighbouring_lanes_read_different_banks():
    layout = layout_of(sparse(1024, 4096, 0.1), Plan(9))
    at = layout.starts.long()
    agree = kept = 0
    for _, task, chunks in tasks_of(layout):
        way = at[task] + layout.deltas[chunks].long().cumsum(0)
        wanted = (torch.arange(LANES)[:, None] + torch.arange(WAYS)) % WAYS
        here = layout.values[chunks] != 0
        agree += int((here & (way % WAYS == wanted)).sum())
        kept += int(here.sum())
    assert agree > 0.93 * kept


def test_size_and_balance():
    generator = torch.Generator().manual_seed(0)
    weight = (torch.rand(2048, 4096, generator=generator) < 0.1).bfloat16()
    layout = layout_of(weight, Plan(19, shared=227 * 1024))
    assert layout.nbytes < 1.3 * 3 * int(weight.sum())  # fillers, ends of tasks, starts
    loads = dict.fromkeys(range(len(layout.warps)), 0)
    for _, task, chunks in tasks_of(layout):
        loads[task if task < len(loads) else int((layout.warps[:, 1] <= task).sum()) - 1] += len(chunks)
    per_block = torch.tensor(list(loads.values())).view(layout.grid, -1).sum(1)
    assert per_block.max() < 1.1 * per_block.double().mean()


def test_far_columns_take_fillers():
    weight = torch.zeros(1, 4000)
    for column in (0, FAR // 8 * 8, FAR // 8 * 8 + 256, 3992):
        weight[0, column] = column + 1
    layout = layout_of(weight.bfloat16(), Plan(1, warps=1))
    assert torch.equal(decode(layout), weight.bfloat16().float())


@pytest.mark.parametrize("wrong", [{"warps": 0}, {"warps": 17}, {"shared": 100}, {"processors": 0}, {"most": 7}])
def test_a_plan_that_cannot_be_is_refused(wrong):
    with pytest.raises(PhoenixError, match="give 1 to 16 warps"):
        Plan(**{"processors": 4, **wrong})


@pytest.mark.parametrize("shared", [99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("columns", [1, 64, 4096, 11008, 14336, 28672, 100003])
def test_slabs_cover_the_columns_and_fit(columns, shared):
    plan = Plan(100, shared=shared)
    slabs, width = plan.slabs(columns)
    assert (slabs - 1) * width < columns <= slabs * width
    assert width * 2 * scattered_product.TOGETHER[-1] <= shared
    assert width % WAYS == 0


def test_source_and_launcher_agree_on_sizes():
    source = scattered_product.SOURCE.read_text(encoding="utf-8")
    found = {name: int(size) for name, size in re.findall(r"^#define (\w+) +(\d+)\b", source, re.MULTILINE)}
    assert found == {"AHEAD": AHEAD, "WAYS": WAYS}


def test_what_the_product_refuses():
    layout = layout_of(sparse(16, 64, 0.1), PLANS[0])
    for x in (torch.zeros(1, 65).bfloat16(), torch.zeros(1, 64), torch.zeros(1, 64).bfloat16()):
        with pytest.raises(PhoenixError, match="sparse_linear: (x is|this layout)"):
            scattered_product.multiply(x, layout)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize(
    ("out", "columns", "density", "batch", "plan", "dtype"),
    [
        (150, 1300, 0.1, 1, PLANS[0], torch.bfloat16),
        (100, 701, 0.3, 2, PLANS[1], torch.bfloat16),
        (70, 700, 0.05, 3, PLANS[0], torch.float16),
        (33, 1601, 0.2, 8, PLANS[3], torch.bfloat16),
        (130, 3000, 0.1, 13, PLANS[2], torch.bfloat16),
        (40, 1000, 0.1, 16, PLANS[1], torch.float16),
        (300, 64, 0.02, 1, PLANS[2], torch.float16),
        (1, 1, 0.0, 1, PLANS[0], torch.bfloat16),
        (1000, 90, 0.1, 5, PLANS[0], torch.bfloat16),
    ],
)
def test_the_kernels_source_run_on_the_cpu(out, columns, density, batch, plan, dtype):
    from runtime.cuda import emulated

    weight = sparse(out, columns, density, dtype=dtype)
    layout = layout_of(weight, plan)
    assert torch.equal(emulated.expand_scattered(layout), weight)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, columns, generator=generator).to(dtype)
    scales, bias = torch.rand(out, generator=generator) + 0.5, torch.randn(out, generator=generator)
    y = emulated.multiply_scattered(x, layout, scales, bias)
    exact = x.double() @ weight.double().t() * scales.double() + bias.double()
    assert (y.double() - exact).norm() <= 4e-3 * exact.norm()
    assert torch.equal(emulated.multiply_scattered(x, layout, scales, bias), y)
    plain = x.double() @ weight.double().t()
    assert (emulated.multiply_scattered(x, layout).double() - plain).norm() <= 4e-3 * plain.norm()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("out", "columns", "density"), [(3000, 4096, 0.1), (300, 15001, 0.05), (33, 130, 0.3), (16, 64, 1.0), (40, 90, 0.0)]
)
def test_on_the_gpu(out, columns, density, dtype):
    plan = scattered_product.plan_for(torch.device("cuda"))
    weight = sparse(out, columns, density, dtype=dtype)
    packed = pack(weight)
    parts = [part.cuda() for part in (packed.bitmask, packed.compressed, packed.row_offsets)]
    layout = build(*parts, columns, plan)
    assert torch.equal(scattered_product.expand(layout).cpu(), weight)
    generator = torch.Generator().manual_seed(1)
    scales, bias = torch.rand(out, generator=generator) + 0.5, torch.randn(out, generator=generator)
    for batch in (1, 2, 3, 8, 9, 16, 17, 32):
        x = torch.randn(batch, columns, generator=generator).to(dtype)
        y = scattered_product.multiply(x.cuda(), layout, scales.cuda(), bias.cuda())
        exact = x.double() @ weight.double().t() * scales.double() + bias.double()
        assert (y.cpu().double() - exact).norm() <= 5e-3 * exact.norm()
        assert torch.equal(scattered_product.multiply(x.cuda(), layout, scales.cuda(), bias.cuda()), y)
