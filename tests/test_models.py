import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.models import (
    decoder_blocks,
    find_device,
    find_model,
    fit_tokenizer,
    load_model,
    load_tokenizer,
    prunable_linears,
    save_model,
)
from tiny import CONFIGS, make_model


@pytest.mark.parametrize("kind", CONFIGS)
def test_prunable_linears_are_those_of_the_blocks(kind):
    model = make_model(kind)
    names = set(prunable_linears(model))
    assert len(decoder_blocks(model)) == 2
    assert len(names) == 2 * (6 if kind == "opt" else 7)
    assert not any("embed" in name or "lm_head" in name for name in names)


def test_a_round_trip_keeps_every_weight(tmp_path, model_directory):
    model, tokenizer = load_model(model_directory), load_tokenizer(model_directory)
    save_model(model, tokenizer, tmp_path / "copy")
    again = load_model(tmp_path / "copy")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert load_tokenizer(tmp_path / "copy")("ab").input_ids == tokenizer("ab").input_ids


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/model", "is not a directory"),
        ("./missing", "is not a directory"),
        ("some-model", "is not a directory"),
    ],
)
def test_a_missing_model_is_one_line(name, message):
    with pytest.raises(PhoenixError, match=message):
        find_model(name)


def test_a_directory_that_is_no_model_is_named(tmp_path):
    with pytest.raises(PhoenixError, match="no config.json"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PhoenixError, match=r"no model\.safetensors"):
        find_model(str(tmp_path))


def test_a_truncated_file_is_one_line(tmp_path, model_directory):
    copy = shutil.copytree(model_directory, tmp_path / "m")
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PhoenixError, match="can't be loaded"):
        load_model(copy)


def test_an_index_leads_nowhere_else(tmp_path, model_directory):
    copy = shutil.copytree(model_directory, tmp_path / "m")
    names = load_file((copy / "model.safetensors").rename(tmp_path / "elsewhere.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PhoenixError, match=r"'\.\./elsewhere\.safetensors' is no name of a file in this directory"):
        load_model(copy)


def test_missing_weights_are_not_made_up(tmp_path, model_directory):
    copy = shutil.copytree(model_directory, tmp_path / "m")
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PhoenixError, match=r"missing keys, model\.layers\.0\.mlp\.up_proj"):
        load_model(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, model_directory, value):
    copy = shutil.copytree(model_directory, tmp_path / "m")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 5] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        PhoenixError, match=r"layers\.1\.self_attn\.q_proj\.weight has 1 weights that are NaN or infinite"
    ):
        load_model(copy)


@pytest.mark.parametrize(("stored", "loaded"), [("bfloat16", torch.bfloat16), ("float16", torch.float32)])
def test_auto_keeps_the_stored_dtype(tmp_path, model_directory, stored, loaded):
    model = load_model(model_directory).to(getattr(torch, stored))
    model.save_pretrained(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == stored
    assert next(load_model(tmp_path / "m", device="cpu").parameters()).dtype == loaded
    assert next(load_model(tmp_path / "m", dtype="float32", device="cpu").parameters()).dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line():
    with pytest.raises(PhoenixError, match="torch sees no GPU"):
        find_device("cuda")


def edited(tmp_path, model_directory, **changes):
    copy = shutil.copytree(model_directory, tmp_path / "m")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


def test_a_configuration_of_fewer_blocks_is_refused(tmp_path, model_directory):
    with pytest.raises(PhoenixError, match=r"no place for 9 weights of the file, model\.layers\.1"):
        load_model(edited(tmp_path, model_directory, num_hidden_layers=1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantized"),
        ({"auto_map": {"AutoConfig": "code.Config"}, "model_type": "own"}, "not a model configuration"),
        ({"num_attention_heads": 0}, "config.json|can't be loaded"),
        ({"hidden_size": "x"}, "not a model configuration"),
        ({"pad_token_id": 10**6}, "config.json|can't be loaded"),
    ],
)
def test_configurations_that_are_none_are_one_line(tmp_path, model_directory, changes, words):
    with pytest.raises(PhoenixError, match=words):
        load_model(edited(tmp_path, model_directory, **changes))


def test_a_tokenizer_pads_with_a_token_that_the_model_knows(llama, model_directory):
    tokenizer = load_tokenizer(model_directory)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == 257
    fit_tokenizer(llama, tokenizer, "here")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 256
    llama.resize_token_embeddings(200)
    with pytest.raises(PhoenixError, match="end token is number 256 and the model has embeddings for 200"):
        fit_tokenizer(llama, tokenizer, "here")
