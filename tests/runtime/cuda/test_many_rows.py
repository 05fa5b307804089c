"""Copies beside packed weights, for many rows: what is kept, and what serves, with torch in the kernels' place."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.bench import Pair, measure
from phoenix_sparse.runtime.cuda import layout, linear, many_rows, semi_structured
from phoenix_sparse.runtime.cuda.many_rows import BESIDE_DENSE, SEMI_FROM, SHARE, check_prefill, choose, keep
from phoenix_sparse.runtime.kernels import portable
from phoenix_sparse.runtime.loading import load, open_model
from phoenix_sparse.runtime.packed import pack, quantize
from phoenix_sparse.runtime.packing import pack_model
from phoenix_sparse.runtime.sparse_linear import SparseLinear
from runtime.cuda.copies import GPU, IDS, close, weight_of
from tiny import pruned

CPU = torch.device("cpu")


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
        served.append("semi")
        return nn.functional.linear(x, compressed[0], bias)

    fakes = {
        linear: {"wanted": lambda device: "asked", "prove": lambda *_: None, "build": build, "expand": expand}
        | {"multiply": multiply},
        semi_structured: {"why_not": lambda device: None, "prove": lambda *_: None, "multiply": multiply_semi}
        | {"compress": lambda weight: weight[None].clone()},
        many_rows: {"free_bytes": lambda device: 2**40},
    }
    for module, functions in fakes.items():
        for name, function in functions.items():
            monkeypatch.setattr(module, name, function)
    return served


def layer_of(weight, values="bf16", bias=None):
    packed = quantize(pack(weight)) if values == "int8" else pack(weight)
    return linear.CudaLinear.of(SparseLinear.of(packed, weight.dtype, bias))


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
        ((48, 16), torch.float16, True),
        ((16, 40), torch.bfloat16, False),
        ((24, 32), torch.bfloat16, False),
        ((16, 32), torch.float32, False),
    ],
)
def test_what_cusparselt_takes(shape, dtype, fit):
    assert semi_structured.fits(shape, dtype) == fit


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), offset=st.integers(0, 3), turned=st.booleans())
def test_padding(rows, columns, offset, turned):
    x = torch.randn(rows * columns + offset).bfloat16()[offset:]
    x = x.view(columns, rows).t() if turned else x.view(rows, columns)
    padded = semi_structured.padded(x)
    assert len(padded) % 8 == 0
    assert len(padded) - rows < 8
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
    assert semi_structured.why_not(GPU) is None


def test_cusparselt_gets_what_it_takes(monkeypatch):
    """The call that torch documents: eights of rows, turned without a copy, and a result that is turned already."""
    weight, calls = weight_of(32, 48, two_four=True), []

    def sparse_mm(compressed, x, *, bias, transpose_result, alg_id, split_k=1, split_k_mode=-1):
        calls.append((x.shape[1], alg_id, split_k, split_k_mode))
        assert x.t().is_contiguous()
        assert transpose_result
        return nn.functional.linear(x.t(), compressed, bias)

    def mm_search(compressed, x, bias, alpha, dtype, transpose_result):
        assert x.shape[1] % 8 == 0
        assert transpose_result
        return torch.tensor(7), 2, 1, 37

    monkeypatch.setattr(torch, "_cslt_sparse_mm", sparse_mm)
    monkeypatch.setattr(torch._C, "_cusparselt", SimpleNamespace(mm_search=mm_search), raising=False)
    x, bias = torch.randn(13, 96).bfloat16()[:, ::2], torch.randn(32).bfloat16()
    exact = x.double() @ weight.double().t() + bias.double()
    assert close(semi_structured.multiply(x, weight, 32, bias), exact)
    found = semi_structured.search(x, weight)
    y = semi_structured.multiply(x, weight, 32, bias, found)
    assert y.shape == (13, 32)
    assert close(y, exact)
    assert calls == [(16, *semi_structured.FIRST), (16, 7, 2, 1)]
    compiled = torch.compile(semi_structured.multiply, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weight, 32, bias), y)


def test_cusparselt_is_proved(monkeypatch):
    monkeypatch.setattr(semi_structured, "compress", lambda weight: weight)

    def right(x, weight, out, bias):
        assert out == len(weight)
        return nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(semi_structured, "multiply", right)
    semi_structured.prove.__wrapped__(CPU, torch.bfloat16)
    monkeypatch.setattr(semi_structured, "multiply", lambda *parts: right(*parts) * 1.1)
    with pytest.raises(PhoenixError, match="wrong products on this GPU; give prefill=dense"):
        semi_structured.prove.__wrapped__(CPU, torch.bfloat16)

    def fail(*parts):
        raise RuntimeError("operation not supported\nand more")

    monkeypatch.setattr(semi_structured, "multiply", fail)
    with pytest.raises(PhoenixError, match=r"fails on this GPU \(operation not supported\)"):
        semi_structured.prove.__wrapped__(CPU, torch.bfloat16)


@pytest.mark.parametrize("values", ["bf16", "int8"])
@pytest.mark.parametrize("biased", [False, True])
def test_what_serves_how_many_rows(as_on_a_gpu, values, biased):
    bias = nn.Parameter(torch.randn(32).bfloat16(), requires_grad=False) if biased else None
    layer = layer_of(weight_of(32, 64, two_four=True), values, bias)
    weight = layer.dense()
    shift = 0 if bias is None else bias.double()
    as_on_a_gpu.clear()
    expected = {
        "packed": {1: "kernels", BESIDE_DENSE + 1: "kernels", 65: "expand", SEMI_FROM: "expand"},
        "dense": {BESIDE_DENSE: "kernels", BESIDE_DENSE + 1: None, SEMI_FROM: None},
        "semi": {64: "kernels", 65: "semi", SEMI_FROM: "semi"},
        "auto": {BESIDE_DENSE: "kernels", BESIDE_DENSE + 1: None, SEMI_FROM - 1: None, SEMI_FROM: "semi"},
    }
    for prefill, by_rows in expected.items():
        keep([layer], prefill, CPU)
        assert (layer.dense_copy is not None) == (prefill in ("dense", "auto"))
        assert (layer.semi_structured is not None) == (prefill in ("semi", "auto"))
        for rows, server in by_rows.items():
            x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).bfloat16()
            as_on_a_gpu.clear()
            y = layer(x.view(1, rows, 64))[0]
            assert set(as_on_a_gpu) == ({server} if server else set()), (prefill, rows)
            assert close(y, x.double() @ weight.double().t() + shift)
    assert torch.equal(layer.dense_copy, weight)
    assert layer(torch.zeros(0, 64).bfloat16()).shape == (0, 32)


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
        copies = 0 if prefill == "packed" else sum(part.out_features * part.in_features * 2 for part in layers)
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
