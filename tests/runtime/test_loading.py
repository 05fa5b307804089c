import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.models import load_model
from phoenix_sparse.runtime import quantizer  # noqa: F401 (registers)
from phoenix_sparse.runtime.loading import load
from phoenix_sparse.runtime.packing import pack_model
from phoenix_sparse.runtime.sparse_linear import SparseLinear
from tiny import pruned

IDS = torch.tensor([[5, 9, 200, 31, 7, 7, 120]])


@pytest.fixture
def directories(tmp_path, request):
    model, _ = pruned(getattr(request, "param", "llama"))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    pack_model(tmp_path / "dense", tmp_path / "packed")
    return tmp_path / "dense", tmp_path / "packed"


def close(one, other):
    return torch.allclose(one.float(), other.float(), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("directories", ["llama", "mistral", "qwen2", "opt"], indirect=True)
def test_a_packed_model_answers_as_the_dense_one(directories):
    dense, packed = (load_model(directories[0], "float32"), load(directories[1], "float32"))
    assert sum(isinstance(module, SparseLinear) for module in packed.modules()) > 10
    with torch.no_grad():
        assert torch.allclose(packed(IDS).logits, dense(IDS).logits, atol=1e-4, rtol=1e-4)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(packed.generate(IDS, **options), dense.generate(IDS, **options))


def test_it_loads_as_people_load(directories):
    model = AutoModelForCausalLM.from_pretrained(directories[1])
    assert isinstance(model.model.layers[0].mlp.up_proj, SparseLinear)
    assert close(model(IDS).logits, load_model(directories[0])(IDS).logits)


def test_save_pretrained_writes_what_was_read(directories, tmp_path):
    load(directories[1]).save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (directories[1], tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")(IDS).logits, load(directories[1])(IDS).logits)


def test_state_dicts_and_moves(directories):
    model, other = load(directories[1]), load(directories[1])
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(model.state_dict())
    moved = other.to(torch.float32).to("cpu")
    assert close(moved(IDS).logits, model(IDS).logits)


def test_int8_values_keep_their_scales_in_any_dtype(directories, tmp_path):
    pack_model(directories[0], tmp_path / "int8", values="int8")
    exact = load(tmp_path / "int8", "float32")
    layer = exact.model.layers[0].mlp.up_proj
    stored = load_file(tmp_path / "int8" / "model.safetensors")["model.layers.0.mlp.up_proj.scales"]
    assert torch.equal(layer.scales.float(), stored.float())
    with torch.no_grad():
        assert close(load(tmp_path / "int8")(IDS).logits, exact(IDS).logits)


def test_torch_compile(directories):
    model = load(directories[1], "float32")
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(x), layer(x))


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)


def test_without_phoenix_it_fails_loudly(directories):
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(directories[1])!r})"
    done = run(code)
    assert done.returncode != 0
    assert "mismatch" in done.stderr.lower()


@pytest.mark.parametrize("order", ["phoenix_sparse, transformers", "transformers, phoenix_sparse"])
def test_importing_phoenix_is_enough_in_any_order(directories, order):
    done = run(
        f"import {order}\n"
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(directories[1])!r})\n"
        "print(type(m.model.layers[1].mlp.down_proj).__name__)"
    )
    assert "SparseLinear" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t, k: t.update({k + ".compressed": t[k + ".compressed"][:-3]}), "compressed|mismatch"),
        (lambda t, k: t[k + ".row_offsets"].fill_(2**40), "row_offsets"),
        (lambda t, k: t[k + ".bitmask"].fill_(255), "number of bits|beyond"),
        (lambda t, k: t.update({k + ".shape": torch.tensor([9, 9])}), "stored shape"),
        (lambda t, k: t.pop(k + ".bitmask"), "no model.layers.1.self_attn.o_proj.bitmask"),
        (lambda t, k: t.pop(k + ".compressed"), "no model.layers.1.self_attn.o_proj.compressed"),
        (lambda t, k: t.pop("model.norm.weight"), "lack 1 tensors, model.norm.weight first"),
    ],
)
def test_damaged_files_are_errors(directories, change, what):
    tensors = load_file(directories[1] / "model.safetensors")
    change(tensors, "model.layers.1.self_attn.o_proj")
    save_file(tensors, directories[1] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PhoenixError, match=what):
        load(directories[1])


def test_parts_that_are_not_there_are_not_made_up(directories):
    tensors = load_file(directories[1] / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.compressed"]
    save_file(tensors, directories[1] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PhoenixError, match="no model.layers.0.mlp.up_proj.compressed; pack the model again"):
        AutoModelForCausalLM.from_pretrained(directories[1])


@pytest.mark.parametrize("absolute", [True, False])
def test_an_index_that_leads_out_of_its_directory_is_refused(directories, tmp_path, absolute):
    """Though what it leads to is a whole file of the very model."""
    packed, name = directories[1], "model.safetensors"
    (packed / name).rename(tmp_path / "elsewhere.safetensors")
    place = str(tmp_path / "elsewhere.safetensors") if absolute else "../elsewhere.safetensors"
    names = dict.fromkeys(load_file(tmp_path / "elsewhere.safetensors"), place)
    (packed / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(PhoenixError, match="is no name of a file in this directory"):
        load(packed)
    with pytest.raises(PhoenixError, match="outside of this directory"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_a_config_that_names_no_linear_is_an_error(directories):
    path = directories[1] / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["layers"]["model.norm"] = {"shape": [4, 4], "nnz": 1, "values": "bfloat16"}
    path.write_text(json.dumps(config))
    with pytest.raises(PhoenixError, match="model.norm"):
        load(directories[1])


def test_a_dense_directory_is_not_loaded_as_packed(directories):
    with pytest.raises(PhoenixError, match="phx pack"):
        load(directories[0])
