import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.models import load_model
from phoenix_sparse.runtime import quantizer  # noqa: F401 (registers)
from phoenix_sparse.runtime.packing import pack_model, read_config, unpack_model
from tiny import make_model, pruned


def save(tmp_path, kind="llama", **options):
    model, masks = pruned(kind)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "dense", **options)
    return tmp_path / "dense", masks


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "opt"])
def test_a_round_trip_gives_every_file_again(tmp_path, kind):
    dense, masks = save(tmp_path, kind)
    record = pack_model(dense, tmp_path / "packed")
    unpack_model(tmp_path / "packed", tmp_path / "back")
    assert record["layers"] == len(masks)
    assert record["nnz"] == sum(int(mask.sum()) for mask in masks.values())
    files = sorted(file.name for file in dense.iterdir())
    assert sorted(file.name for file in (tmp_path / "back").iterdir()) == files
    for name in files:
        assert (tmp_path / "back" / name).read_bytes() == (dense / name).read_bytes(), name


def test_shards_keep_their_names(tmp_path):
    dense, _ = save(tmp_path, max_shard_size="20KB")
    assert len(list(dense.glob("*.safetensors"))) > 2
    pack_model(dense, tmp_path / "packed")
    unpack_model(tmp_path / "packed", tmp_path / "back")
    for file in dense.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_a_dense_model_is_refused(tmp_path):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    with pytest.raises(
        PhoenixError, match="no linear of it has zeros enough to be smaller packed; give a pruned model"
    ):
        pack_model(tmp_path / "dense", tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_int8_values(tmp_path):
    dense, _ = save(tmp_path)
    small = pack_model(dense, tmp_path / "int8", values="int8")
    large = pack_model(dense, tmp_path / "bf16")
    assert small["packed_bytes"] < large["packed_bytes"]
    unpack_model(tmp_path / "int8", tmp_path / "back")
    before, after = load_model(dense), load_model(tmp_path / "back")
    for (name, one), other in zip(before.named_parameters(), after.parameters(), strict=True):
        assert (one - other).abs().max() <= 0.011 * one.abs().max(), name


def break_file(packed, change):
    tensors = load_file(packed / "model.safetensors")
    change(tensors)
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})


LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.pop(f"{LAYER}.bitmask"), f"its files have no {LAYER}.bitmask"),
        (lambda t: t.pop(f"{LAYER}.weight"), f"its files have no {LAYER}.weight"),
        (lambda t: t.update({f"{LAYER}.compressed": t[f"{LAYER}.compressed"][:-3]}), "compressed is BF16"),
        (lambda t: t.update({f"{LAYER}.compressed": t[f"{LAYER}.compressed"].double()}), "compressed is F64"),
        (lambda t: t.update({f"{LAYER}.compressed": t[f"{LAYER}.compressed"].half()}), "compressed is F16"),
        (lambda t: t.update({f"{LAYER}.bitmask": t[f"{LAYER}.bitmask"].view(torch.int8)}), "bitmask is I8"),
        (lambda t: t.update({f"{LAYER}.weight": torch.zeros(3)}), r"weight is F32 \(3,\)"),
        (lambda t: t.update({f"{LAYER}.weight": torch.zeros(0, dtype=torch.int8)}), "weight is I8"),
        (lambda t: t.update({f"{LAYER}.scales": torch.ones(48)}), "scales are for int8 values"),
        (lambda t: t.update({"model.layers.7.up.bitmask": torch.zeros(3)}), "doesn't say that model.layers.7.up is"),
        (lambda t: t[f"{LAYER}.row_offsets"].fill_(-1), "begin with -1"),
        (lambda t: t.update({f"{LAYER}.shape": torch.tensor([1, 2])}), "stored shape"),
        (lambda t: t.update({f"{LAYER}.shape": torch.tensor(7)}), "shape is I64"),
    ],
)
def test_damage_is_named_and_nothing_is_written(tmp_path, change, what):
    dense, _ = save(tmp_path)
    pack_model(dense, tmp_path / "packed")
    break_file(tmp_path / "packed", change)
    with pytest.raises(PhoenixError, match=what):
        unpack_model(tmp_path / "packed", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    with pytest.raises(PhoenixError, match=what):  # nor is it loaded with values converted or made up
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda e: e["layers"].pop(LAYER), f"doesn't say that {LAYER} is packed"),
        (lambda e: e["layers"].clear(), "doesn't say that"),
        (lambda e: e["layers"].update(lm_head=e["layers"][LAYER]), "no lm_head.weight|lm_head.weight is"),
        (lambda e: e["layers"][LAYER].update(nnz=7), r"compressed is BF16 \(\d+,\) in its file and BF16 \(7,\)"),
        (lambda e: e["layers"][LAYER].update(values="float16"), "compressed is BF16"),
        (lambda e: e["layers"][LAYER].update(values="int8"), "compressed is BF16"),
        (lambda e: e.pop("layers"), "damaged"),
        (lambda e: e.pop("version"), "version None"),
        (lambda e: e.update(version=True), "version True"),
    ],
)
def test_a_config_that_contradicts_its_files_is_refused(tmp_path, change, what):
    """As much by transformers' own loader as by ours: nothing is converted to what config.json says, or left packed."""
    dense, _ = save(tmp_path)
    pack_model(dense, tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PhoenixError, match=what):
        unpack_model(tmp_path / "packed", tmp_path / "back")
    with pytest.raises(PhoenixError, match=what):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        (None, "not a packed model"),
        ({"quant_method": "gptq"}, "not a packed model"),
        ({"quant_method": "phoenix_sparse", "version": 99, "layers": {}}, "version 99"),
        ({"quant_method": "phoenix_sparse", "version": 1, "layers": []}, "damaged"),
        ({"quant_method": "phoenix_sparse", "version": 1, "layers": {"a": {"shape": [1, -1], "nnz": 0}}}, "damaged"),
    ],
)
def test_other_directories_are_refused(tmp_path, entry, what):
    (tmp_path / "config.json").write_text(json.dumps({} if entry is None else {"quantization_config": entry}))
    with pytest.raises(PhoenixError, match=what):
        read_config(tmp_path)


def test_steps_refuse_a_packed_model(tmp_path):
    dense, _ = save(tmp_path)
    pack_model(dense, tmp_path / "packed")
    with pytest.raises(PhoenixError, match="phx unpack"):
        load_model(tmp_path / "packed")


def test_negative_zeros_of_a_multiplied_mask_are_zeros(tmp_path):
    dense, _ = save(tmp_path)
    tensors = load_file(dense / "model.safetensors")
    for name, value in tensors.items():
        if "proj" in name:
            tensors[name] = torch.where(value == 0, -torch.zeros_like(value), value)
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    record = pack_model(dense, tmp_path / "packed")
    assert record["negative_zeros"] == record["weights"] - record["nnz"] > 0
    unpack_model(tmp_path / "packed", tmp_path / "back")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in tensors.items())
