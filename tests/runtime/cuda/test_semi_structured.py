"""2:4 matrices: recognising them, and cuSPARSELt on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.cuda import cusparselt, linear, semi_structured
from phoenix_sparse.runtime.cuda.many_rows import SEMI_FROM, keep
from phoenix_sparse.runtime.packed import pack
from phoenix_sparse.runtime.sparse_linear import SparseLinear
from runtime.cuda.fake_cusparselt import Fake
from runtime.cuda.matrices import error, weight_of

GPU = torch.device("cuda")
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@settings(max_examples=30, deadline=None)
@given(out=st.integers(1, 9), fours=st.integers(1, 9), data=st.data())
def test_two_four_is_seen(out, fours, data):
    weight = weight_of(out, 4 * fours, two_four=True)
    assert semi_structured.is_two_four(weight)
    assert semi_structured.is_two_four(weight.t().contiguous().t())
    row, group = data.draw(st.integers(0, out - 1)), data.draw(st.integers(0, fours - 1))
    weight[row, 4 * group : 4 * group + 4] = 0
    assert semi_structured.is_two_four(weight)
    places = data.draw(st.permutations(range(4)))[:3]
    weight[row, [4 * group + place for place in places]] = 1.0
    assert not semi_structured.is_two_four(weight)


def test_other_patterns_are_not_two_four():
    weight = torch.zeros(2, 8)
    weight[:, 2:6] = 1  # two of each aligned four
    assert semi_structured.is_two_four(weight)
    assert not semi_structured.is_two_four(weight.roll(2, 1))
    assert not semi_structured.is_two_four(torch.zeros(2, 6))
    assert not semi_structured.is_two_four(torch.zeros(8))


@pytest.mark.parametrize(
    ("shape", "dtype", "fit"),
    [
        ((16, 32), torch.bfloat16, True),
        ((48, 16), torch.bfloat16, True),
        ((48, 16), torch.float16, False),
        ((16, 40), torch.bfloat16, False),
        ((24, 32), torch.bfloat16, False),
        ((16, 32), torch.float32, False),
    ],
)
def test_what_cusparselt_takes(shape, dtype, fit):
    assert semi_structured.fits(shape, dtype) == fit


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 40000))
def test_rows_are_padded_to_few_numbers(rows):
    padded = semi_structured.padded_rows(rows)
    assert padded % 8 == 0
    assert 0 <= padded - rows < max(8, rows / 32)
    assert semi_structured.padded_rows(padded) == padded
    assert semi_structured.padded_rows(rows + 1) >= padded


def test_there_are_few_numbers_of_rows():
    assert len({semi_structured.padded_rows(rows) for rows in range(1, 8193)}) <= 200
    assert all(semi_structured.padded_rows(1 << power) == 1 << power for power in range(3, 15))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), offset=st.integers(0, 3), turned=st.booleans())
def test_padding(rows, columns, offset, turned):
    x = torch.randn(rows * columns + offset).bfloat16()[offset:]
    x = x.view(columns, rows).t() if turned else x.view(rows, columns)
    padded = semi_structured.padded(x)
    assert len(padded) == semi_structured.padded_rows(rows)
    assert padded.is_contiguous()
    assert padded.data_ptr() % 16 == 0
    assert torch.equal(padded[:rows], x)
    assert not padded[rows:].any()


def test_why_there_is_no_cusparselt(monkeypatch):
    assert "for GPUs, and this is cpu" in semi_structured.why_not(CPU)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert "comes without cuSPARSELt" in semi_structured.why_not(GPU)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "capability 7.5, and 2:4 products need 8.0" in semi_structured.why_not(GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cusparselt, "library", lambda: None)
    assert semi_structured.why_not(GPU) is None

    def old():
        return cusparselt.declared(Fake(version=(0, 6)).library)

    monkeypatch.setattr(cusparselt, "library", old)
    assert semi_structured.why_not(GPU) == "cuSPARSELt 0.6 is too old; update torch for 0.7 or newer"


@needs_gpu
@pytest.mark.parametrize(("out", "columns"), [(64, 128), (4096, 1024), (1024, 4096), (240, 336)])
def test_two_four_on_the_gpu(out, columns):
    dtype = torch.bfloat16
    semi_structured.prove(GPU, dtype)
    weight = weight_of(out, columns, two_four=True, dtype=dtype)
    weight[3] = 0
    bias = torch.randn(out).to(dtype)
    layer = linear.CudaLinear.of(SparseLinear.of(pack(weight), dtype, nn.Parameter(bias)).cuda())
    weight, bias = weight.cuda().double(), bias.cuda().double()
    if not semi_structured.takes((out, columns), dtype, layer.weight.device):
        with pytest.raises(
            PhoenixError, match=rf"no kernel for the sizes of this model's 2:4 linears \({out}x{columns}\)"
        ):
            keep([layer], "semi", GPU)
        keep([layer], "auto", GPU)
        assert layer.semi_structured is None
        return
    for prefill in ("semi", "auto"):
        keep([layer], prefill, GPU)
        assert layer.semi_structured is not None
        assert layer.semi_structured.nbytes <= 2 * out * columns * semi_structured.COMPRESSED + 2**16
        kept, errors, differing = layer.semi_structured.clone(), {}, []
        for rows in (1, 64, 65, 72, 300, SEMI_FROM, SEMI_FROM + 3, 2048):
            x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(GPU, dtype)
            y = layer(x)
            assert y.shape == (rows, out)
            errors[rows] = error(y, x.double() @ weight.t() + bias)
            if not torch.equal(layer(x), y):
                differing.append(rows)
        assert max(errors.values()) <= 6e-3, f"{prefill}: relative errors by rows {errors}"
        assert not differing, f"{prefill}: two runs differ with {differing} rows"
        assert torch.equal(layer.semi_structured, kept), f"{prefill}: products have changed the weight"
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), y), f"{prefill}: compiled it differs"


@needs_gpu
def test_two_four_in_a_recorded_graph():
    """Also with a number of rows that has no plan yet."""
    weight = weight_of(1024, 512, two_four=True).cuda()
    compressed = semi_structured.compress(weight)
    semi_structured.settle(weight, compressed, None)
    for rows, before in ((640, True), (768, False)):
        x = torch.randn(rows, 512).bfloat16().cuda()
        if before:
            semi_structured.multiply(x, compressed, 1024)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = semi_structured.multiply(x, compressed, 1024)
        x.normal_()
        graph.replay()
        assert error(y, x @ weight.t()) <= 6e-3
