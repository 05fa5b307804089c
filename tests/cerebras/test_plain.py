"""With cerebras_pytorch alone: a pruned Llama trained 20 steps, traced for the wafer, its checkpoint read back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from phoenix_sparse.cerebras.cirh import annotations, compared
from phoenix_sparse.cerebras.names import ROTATED, cerebras_name, interleave
from phoenix_sparse.cerebras.tokens import token_array
from phoenix_sparse.cerebras.training import sparsity_groups
from phoenix_sparse.cerebras.validating import validate
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_json
from phoenix_sparse.masks import apply_masks
from phoenix_sparse.models import prunable_linears
from tiny import make_model

from .conftest import masks_of

pytestmark = pytest.mark.cerebras
SCRIPT = Path(__file__).with_name("plain_llama.py")
OTHERS = {
    "model.embed_tokens.weight": "embedding_layer.word_embeddings.weight",
    "model.norm.weight": "transformer_decoder.norm.weight",
    "lm_head.weight": "lm_head.weight",
}


def laid_out(name, value):
    """A tensor by ModelZoo's name, q and k in its layout."""
    if name in OTHERS:
        return OTHERS[name], value
    start, _, last = name.removesuffix(".weight").rpartition(".")
    if last == "input_layernorm":
        return start.replace("model.layers", "transformer_decoder.layers") + ".norm1.weight", value
    if last == "post_attention_layernorm":
        return start.replace("model.layers", "transformer_decoder.layers") + ".norm3.weight", value
    linear = name.removesuffix(".weight")
    return cerebras_name(linear), interleave(value, 4 if last == "q_proj" else 2) if linear.endswith(ROTATED) else value


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A pruned Llama whose blocks differ in sparsity, its masks, and its weights and groups for the script."""
    place = tmp_path_factory.mktemp("plain")
    model = make_model()
    layers = prunable_linears(model)
    masks = masks_of(layers, (0.5, 0.75))
    apply_masks(masks, layers)
    weights = dict(laid_out(name, value) for name, value in model.state_dict().items())
    np.savez(place / "weights.npz", **{name: value.numpy() for name, value in weights.items()})
    shares = {
        cerebras_name(name): {"sparsity": float((layer.weight == 0).double().mean())} for name, layer in layers.items()
    }
    (place / "groups.json").write_text(json.dumps(sparsity_groups(shares)))
    model.config.save_pretrained(place)
    return model, masks, shares, place


@pytest.fixture(scope="module")
def trained(pruned, environment):
    *_, place = pruned
    arguments = [str(SCRIPT), "CPU", str(place / "weights.npz"), str(place / "groups.json"), str(place / "cpu")]
    done = environment.run(arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return place / "cpu"


def test_names_and_layout_give_the_same_logits(pruned, trained):
    """The script's model rotates pairs and has its own names: it is the same model or it isn't."""
    model, *_ = pruned
    with np.load(trained / "logits.npz") as found, torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(found["ids"])).logits
        assert float((wanted - torch.from_numpy(found["logits"])).abs().max()) < 1e-5


def test_twenty_steps_on_the_cpu_keep_every_zero(pruned, trained, environment):
    _, masks, shares, place = pruned
    assert len(json.loads((trained / "losses.json").read_text())) == 20
    found = validate(trained / "checkpoint_20.mdl", masks, place / "config.json", environment)
    assert found["valid"]
    assert found["off_mask_nonzeros"] == 0
    assert {name: weight["sparsity"] for name, weight in found["weights"].items()} == {
        name: share["sparsity"] for name, share in shares.items()
    }


def test_masks_in_the_other_layout_do_not_pass(pruned, trained, environment):
    """What the rotary permutation is for: with one head, q's and k's masks are other ones."""
    _, masks, _, place = pruned
    config = read_json(place / "config.json") | {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}
    (place / "other.json").write_text(json.dumps(config))
    found = validate(trained / "checkpoint_20.mdl", masks, place / "other.json", environment)
    wrong = {name for name, weight in found["weights"].items() if weight["off_mask_nonzeros"]}
    assert not found["valid"]
    assert {name.split(".")[-2] for name in wrong} == {"proj_q_dense_layer", "proj_k_dense_layer"}


def test_the_compiler_sees_every_weight_at_its_true_sparsity(pruned, environment):
    _, _, shares, place = pruned
    arguments = [str(SCRIPT), "CSX", str(place / "weights.npz"), str(place / "groups.json"), str(place / "csx")]
    done = environment.run(arguments)
    assert "mgmt_address has no default value" in done.stderr, done.stderr[-2000:]
    (written,) = {path.resolve() for path in (place / "csx").glob("cerebras_logs/executors/*/cirh.mlir")}
    wanted = {name: share["sparsity"] for name, share in shares.items()}
    seen = annotations(written.read_text())
    found = compared(seen, wanted)
    assert found["valid"], found
    assert found["right"] == len(wanted) == 14
    assert {name for name, share in seen.items() if share is not None} == set(wanted)


def test_a_checkpoint_comes_back_bit_for_bit(pruned, environment, tmp_path):
    """Through cstorch.save and cstorch.load, in float32 and in bfloat16 (which HDF5 keeps as int16)."""
    *_, place = pruned
    code = (
        "import sys, numpy as np, torch, cerebras.pytorch as cstorch\n"
        "tensors = {n: torch.from_numpy(v) for n, v in np.load(sys.argv[1]).items()}\n"
        "tensors |= {n + '.half': v.bfloat16() for n, v in tensors.items()}\n"
        "cstorch.save({'model': tensors}, sys.argv[2])\n"
        "back = cstorch.load(sys.argv[2])['model']\n"
        "assert set(back) == set(tensors)\n"
        "assert all(back[n].dtype == v.dtype and torch.equal(back[n].to('cpu'), v) for n, v in tensors.items())\n"
    )
    done = environment.run(["-c", code, str(place / "weights.npz"), str(tmp_path / "a.mdl")], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    with pytest.raises(Exception, match=r"Weights only load failed|invalid load key|legacy|Unsupported"):
        torch.load(tmp_path / "a.mdl")  # HDF5, which torch.load can't read: `cstorch.load` is the only reader here


def test_a_file_that_is_no_checkpoint_is_told_in_one_line(pruned, environment, tmp_path):
    _, masks, _, place = pruned
    (tmp_path / "a.mdl").write_bytes(b"no HDF5")
    with pytest.raises(PhoenixError, match="can't be read as a Cerebras checkpoint") as told:
        validate(tmp_path / "a.mdl", masks, place / "config.json", environment)
    assert "\n" not in str(told.value)


def test_workers_import_nothing_of_transformers(environment):
    code = (
        "import sys, importlib, pathlib, torch\n"
        "assert torch.__version__.startswith('2.4')\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "for name in ('worker', 'names', 'shapes', 'modelzoo', 'inspect_work', 'data_work', 'convert_work',\n"
        "             'merge_work', 'logits_work', 'cirh', 'runner'):\n"
        "    try:\n"
        "        importlib.import_module('phoenix_sparse.cerebras.' + name)\n"
        "    except ModuleNotFoundError as error:\n"
        "        assert error.name == 'pydantic', error\n"
        "assert 'transformers' not in sys.modules\n"
    )
    package = Path(__file__).parents[2] / "src"
    done = environment.run(["-c", code, str(package)])
    assert done.returncode == 0, done.stderr[-2000:]


def test_data_is_written_in_modelzoos_layout(environment, tmp_path):
    rows = [{"input_ids": [5, 6, 7, 1], "labels": [-100, -100, 7, 1]}, {"input_ids": [8, 1], "labels": [-100, 1]}]
    array = token_array(rows, 4, pad=0)
    np.save(tmp_path / "a.npy", array)
    assert environment.work("data_work", arrays={str(tmp_path / "a.h5"): str(tmp_path / "a.npy")})["examples"]
    code = (
        "import sys, h5py, numpy as np; d = h5py.File(sys.argv[1])['data']; print(d.dtype); np.save(sys.argv[2], d[:])"
    )
    done = environment.run(["-c", code, str(tmp_path / "a.h5"), str(tmp_path / "b.npy")])
    assert done.stdout.strip() == "int32"
    assert np.array_equal(np.load(tmp_path / "b.npy"), array)
