import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.bench import Pair, measure
from phoenix_sparse.runtime.cuda import layout, linear, many_rows, semi_structured
from phoenix_sparse.runtime.cuda.many_rows import SEMI_FROM, SHARE, check_prefill, choose, keep
from phoenix_sparse.runtime.kernels import portable
from phoenix_sparse.runtime.loading import load, open_model
from phoenix_sparse.runtime.packed import pack
from phoenix_sparse.runtime.packing import pack_model
from phoenix_sparse.runtime.sparse_linear import SparseLinear
from runtime.cuda.matrices import close, layer_of, weight_of
from tiny import pruned

GPU = torch.device("cuda")
CPU = torch.device("cpu")
IDS = torch.randint(200, (2, 40), generator=torch.Generator().manual_seed(0))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """CudaLinear with torch in the kernels' place, and in cuSPARSELt's; what served each product, in order."""
    weights, served = {}, []

    def build(bitmask, values, row_offsets, columns, *dtype):
        made = layout.build(bitmask, values, row_offsets, columns, layout.Plan(6), *dtype)
        weights[made.values.data_ptr()] = portable.unpack(bitmask, values, row_offsets, columns).bfloat16()
        return made

    def multiply(x, form, scales, bias):
        served.append("kernels")
        return portable.finish(nn.functional.linear(x, weights[form.values.data_ptr()]), scales, bias, x.dtype)

    def expand(form):
        served.append("expand")
        return weights[form.values.data_ptr()]

    def multiply_semi(x, compressed, out, bias):
        assert out == compressed.shape[1]
        assert bias is None or bias.dtype == x.dtype
        served.append("semi")
        return nn.functional.linear(x, compressed[0], bias)

    fakes = {
        linear: {"wanted": lambda device: "asked", "prove": lambda *_: None, "build": build, "expand": expand}
        | {"multiply": multiply},
        semi_structured: {"why_not": lambda device: None, "prove": lambda *_: None, "multiply": multiply_semi}
        | {"compress": lambda weight: weight[None].clone(), "takes": lambda *_: True}
        | {"settle": lambda weight, *_: served.append(f"settled {len(weight)}")},
        many_rows: {"free_bytes": lambda device: 2**40},
    }
    for module, functions in fakes.items():
        for name, function in functions.items():
            monkeypatch.setattr(module, name, function)
    return served


@given(
    prefill=st.sampled_from(["packed", "dense", "semi", "auto"]),
    dense=st.integers(1, 10**12),
    semi=st.integers(0, 10**12),
    free=st.integers(0, 10**13),
)
def test_what_is_kept_fits(prefill, dense, semi, free):
    semi = min(semi, dense)
    if {"dense": dense, "semi": semi}.get(prefill, 0) > free:
        with pytest.raises(PhoenixError, match=f"prefill={prefill}: the copies take"):
            choose(prefill, dense, semi, free)
        return
    kept = choose(prefill, dense, semi, free)
    taken = kept[0] * dense + kept[1] * semi
    assert taken <= free
    if prefill != "auto":
        assert kept == (prefill == "dense", prefill == "semi")
        return
    room = SHARE * free
    assert taken <= room
    assert not (kept[1] and semi == 0)
    if dense <= room:
        assert kept[0]
    if semi and dense + semi <= room:
        assert kept == (True, True)
    if semi and semi <= room:
        assert any(kept)


def test_a_choice_that_is_none():
    assert check_prefill("auto") == "auto"
    with pytest.raises(PhoenixError, match="prefill: 'fast' is none of packed, dense, semi, auto"):
        check_prefill("fast")


@pytest.mark.parametrize("values", ["bf16", "int8"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("out", [32, 96])
def test_what_serves_how_many_rows(as_on_a_gpu, values, biased, out):
    bias = nn.Parameter(torch.randn(out).bfloat16(), requires_grad=False) if biased else None
    layer = layer_of(weight_of(out, 64, two_four=True), values, bias)
    few = "semi" if out > 64 else "expand"  # what is taller than wide is multiplied by cuSPARSELt with fewer rows too
    most = 32  # rows that the kernels serve beside a dense copy
    weight = layer.dense()
    shift = 0 if bias is None else bias.double()
    as_on_a_gpu.clear()
    expected = {
        "packed": {1: "kernels", most + 1: "kernels", 65: "expand", SEMI_FROM: "expand"},
        "dense": {most: "kernels", most + 1: None, SEMI_FROM: None},
        "semi": {64: "kernels", 65: few, SEMI_FROM - 1: few, SEMI_FROM: "semi"},
        "auto": {most: "kernels", most + 1: None, SEMI_FROM - 1: None, SEMI_FROM: "semi"},
    }
    for prefill, by_rows in expected.items():
        as_on_a_gpu.clear()
        keep([layer], prefill, CPU)
        assert (layer.dense_copy is not None) == (prefill in ("dense", "auto"))
        assert (layer.semi_structured is not None) == (prefill in ("semi", "auto"))
        assert (f"settled {out}" in as_on_a_gpu) == (prefill in ("semi", "auto"))
        assert (layer.offset_copy is not None) == (biased and prefill != "packed")
        for rows, server in by_rows.items():
            x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).bfloat16()
            as_on_a_gpu.clear()
            y = layer(x.view(1, rows, 64))[0]
            assert set(as_on_a_gpu) == ({server} if server else set()), (prefill, rows)
            assert close(y, x.double() @ weight.double().t() + shift)
    assert torch.equal(layer.dense_copy, weight)
    assert layer(torch.zeros(0, 64).bfloat16()).shape == (0, out)


def test_copies_are_the_weights_and_go_where_the_layer_goes(as_on_a_gpu):
    layers = [layer_of(weight_of(32, 64, 1)), layer_of(weight_of(32, 64, 2, two_four=True))]
    model = nn.Sequential(layers[0], nn.Linear(32, 64, bias=False).bfloat16(), layers[1]).requires_grad_(False)
    size = sum(layer.nbytes for layer in layers)
    keep(layers, "auto", CPU)
    first, second = layers
    assert first.semi_structured is None
    assert second.semi_structured is not None
    assert [layer.dense_copy.is_contiguous() for layer in layers] == [True, True]
    assert sum(layer.nbytes for layer in layers) == size  # what the kernels read
    assert f"{first.nbytes} bytes, beside it a dense copy of {first.dense_copy.nbytes}" in str(first)
    assert "beside it cuSPARSELt's form of" in str(second)
    x = torch.randn(70, 64).bfloat16()
    y = model(x)
    again = copy.deepcopy(model).to("cpu")
    assert torch.equal(again(x), y)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), y)
    with pytest.raises(PhoenixError, match="can't be saved"):
        model.state_dict()
    keep(layers, "packed", CPU)
    assert all(layer.dense_copy is None and layer.semi_structured is None for layer in layers)
    assert "beside" not in str(first)


def test_what_cannot_be_kept(as_on_a_gpu, monkeypatch):
    plain, two_four = layer_of(weight_of(32, 64)), layer_of(weight_of(32, 64, two_four=True))
    with pytest.raises(PhoenixError, match="prefill=semi: no packed linear of this model is 2:4"):
        keep([plain], "semi", CPU)
    keep([plain], "auto", CPU)
    assert plain.dense_copy is not None
    monkeypatch.setattr(semi_structured, "why_not", lambda device: "torch comes without cuSPARSELt")
    with pytest.raises(PhoenixError, match="prefill=semi: torch comes without cuSPARSELt; give packed or auto"):
        keep([two_four], "semi", CPU)
    keep([two_four], "auto", CPU)
    assert two_four.semi_structured is None
    assert two_four.dense_copy is not None
    monkeypatch.setattr(semi_structured, "why_not", lambda device: None)
    monkeypatch.setattr(semi_structured, "takes", lambda *_: False)
    with pytest.raises(
        PhoenixError, match=r"no kernel for the sizes of this model's 2:4 linears \(32x64\); give packed"
    ):
        keep([two_four], "semi", CPU)
    keep([two_four], "auto", CPU)
    assert two_four.semi_structured is None
    monkeypatch.setattr(many_rows, "free_bytes", lambda device: 2 * plain.dense().nbytes - 1)
    with pytest.raises(PhoenixError, match=r"prefill=dense: the copies take 0\.0 GiB"):
        keep([plain, two_four], "dense", CPU)
    keep([plain, two_four], "auto", CPU)
    assert plain.dense_copy is None is two_four.dense_copy


def test_free_memory_counts_what_torch_holds_unused(monkeypatch):
    found = {"mem_get_info": (100, 1000), "memory_reserved": 70, "memory_allocated": 20}
    for name, value in found.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert many_rows.free_bytes(GPU) == 150


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("prefill", ["packed", "dense", "auto"])
def test_models_are_prepared_with_copies(as_on_a_gpu, kind, prefill):
    model = pruned(kind)[0].to(torch.bfloat16)
    with torch.no_grad():
        before = model(IDS).logits
        pair = Pair(model, "auto", prefill)
        layers = list(pair.forms["sparse"].values())
        assert any(name.endswith("stacked") for name in pair.forms["sparse"])
        assert all((part.dense_copy is not None) == (prefill != "packed") for part in layers)
        as_on_a_gpu.clear()
        with pair.as_("sparse") as sparse:
            assert close(sparse(IDS).logits, before, 0.03)
            assert set(as_on_a_gpu) == ({"expand"} if prefill == "packed" else set())  # 80 rows
        linear.prepare(model, CPU)  # once more: nothing changes
        assert all((part.dense_copy is not None) == (prefill != "packed") for part in layers)
        size = pair.bytes("sparse")
        keep(layers, "packed", CPU)
        offsets = sum(0 if part.offset is None else part.out_features * 2 for part in layers)
        copies = sum(part.out_features * part.in_features * 2 for part in layers) + offsets
        copies = 0 if prefill == "packed" else copies
        assert size - pair.bytes("sparse") == copies


def test_copies_are_for_packed_models_on_a_gpu(tmp_path):
    pruned()[0].to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    pack_model(tmp_path / "dense", tmp_path / "packed")
    for prefill in ("packed", "auto"):
        assert isinstance(load(tmp_path / "packed", "auto", "cpu", prefill).model.layers[0].mlp.up_proj, SparseLinear)
        assert open_model(tmp_path / "dense", "auto", "cpu", prefill)
    for prefill in ("dense", "semi"):
        with pytest.raises(PhoenixError, match=f"prefill={prefill}: copies are for GPUs, and this is cpu"):
            load(tmp_path / "packed", "auto", "cpu", prefill)
        with pytest.raises(PhoenixError, match=f"prefill={prefill}: .* isn't packed"):
            open_model(tmp_path / "dense", "auto", "cpu", prefill)
    with pytest.raises(PhoenixError, match="'fast' is none of"):
        load(tmp_path / "packed", "auto", "cpu", "fast")
    options = {"values": "auto", "batches": [1], "prompt": 4, "tokens": 1, "repeats": 2, "with_layers": False}
    options |= {"threads": None, "dtype": "auto", "device": "cpu"}
    measured = measure(tmp_path / "packed", prefill="auto", **options)
    assert (measured["prefill"], measured["copies"]) == ("auto", [])
    with pytest.raises(PhoenixError, match="prefill=dense"):
        measure(tmp_path / "packed", prefill="dense", **options)


@needs_gpu
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


@needs_gpu
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
