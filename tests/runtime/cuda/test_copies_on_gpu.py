"""Copies beside packed weights on a GPU, by its own kernels."""

import pytest
import torch
from torch import nn

from phoenix_sparse.runtime.bench import Pair
from phoenix_sparse.runtime.cuda import linear, many_rows, semi_structured
from phoenix_sparse.runtime.cuda.many_rows import SEMI_FROM, keep
from phoenix_sparse.runtime.packed import pack
from phoenix_sparse.runtime.sparse_linear import SparseLinear
from runtime.cuda.copies import GPU, IDS, close, weight_of
from tiny import pruned

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "columns"), [(64, 128), (4096, 1024), (240, 336)])
def test_two_four_on_the_gpu(out, columns, dtype):
    semi_structured.prove(GPU, dtype)
    weight = weight_of(out, columns, two_four=True, dtype=dtype)
    weight[3] = 0
    bias = torch.randn(out).to(dtype)
    layer = linear.CudaLinear.of(SparseLinear.of(pack(weight), dtype, nn.Parameter(bias)).cuda())
    for prefill in ("semi", "auto"):
        keep([layer], prefill, GPU)
        assert layer.semi_structured is not None
        assert layer.semi_structured.nbytes <= weight.nbytes * semi_structured.COMPRESSED + 2**16
        for rows in (1, 64, 65, 72, 300, SEMI_FROM, SEMI_FROM + 3):
            x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
            y = layer(x.cuda())
            assert y.shape == (rows, out)
            assert close(y.cpu(), x.double() @ weight.double().t() + bias.double(), 6e-3)
            assert torch.equal(layer(x.cuda()), y)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x.cuda()), y)


def test_copies_on_the_gpu():
    layer = linear.CudaLinear.of(SparseLinear.of(pack(weight_of(300, 700)), torch.bfloat16).cuda())
    x = torch.randn(65, 700).bfloat16().cuda()
    before = layer(x)
    keep([layer], "dense", GPU)
    assert torch.equal(layer.dense_copy, layer.dense())
    assert close(layer(x), before)
    keep([layer], "auto", GPU)
    assert layer.dense_copy is not None
    assert layer.semi_structured is None
    assert many_rows.free_bytes(GPU) > 0


@pytest.mark.parametrize("prefill", ["packed", "dense", "semi", "auto"])
def test_steps_are_recorded_with_copies_on_the_gpu(prefill):
    """A batch beyond the kernels' rows: the copy is in the recorded step."""
    from phoenix_sparse.runtime.decoding import Decoder

    model = pruned("llama")[0]
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            parameter.data = weight_of(*parameter.shape, two_four=True, dtype=torch.float32) * 0.05
    model = model.to(GPU, torch.bfloat16)
    pair = Pair(model, "bf16", prefill)
    tokens = {}
    for form in ("dense", "sparse"):
        with pair.as_(form) as chosen:
            decoder = Decoder(chosen, 80, 12)
            logits = decoder.prefill(IDS[:1, :8].expand(80, 8).contiguous().cuda())
            decoder.advance(3)
            tokens[form] = logits, decoder.captured, decoder.reason
    assert close(tokens["sparse"][0], tokens["dense"][0], 0.05)
    assert tokens["dense"][1]
    captured, reason = tokens["sparse"][1:]
    assert captured or (prefill == "semi" and "CUDA can't record" in reason), reason
