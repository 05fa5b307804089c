"""Pruning from disk where files are not as they should be, or are kept in other ways."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from phoenix_sparse.checkpoint import Checkpoint
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.initialise import initialise
from phoenix_sparse.pruning.settings import SparsifySettings
from phoenix_sparse.pruning.streaming import open_streamed
from pruning.streamed import CPU, assert_equal_states, load, prune_both
from tiny import make_model


@pytest.fixture
def copy(directories, tmp_path):
    return lambda kind="llama", form="single": shutil.copytree(directories(kind, form), tmp_path / f"{kind}-{form}")


def change(file, action):
    with safe_open(file, "pt") as reader:
        metadata = reader.metadata()
    tensors = load_file(file)
    action(tensors)
    save_file(tensors, file, metadata)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(name, value, copy, calibration, tmp_path):
    directory = copy()
    change(directory / "model.safetensors", lambda tensors: tensors[name].view(-1)[3:5].fill_(value))
    with pytest.raises(PhoenixError, match=f"{name} has 2 weights that are NaN or infinite; a model must be finite"):
        initialise(
            open_streamed(directory, "auto", CPU), SparsifySettings(), calibration, seed=0, work=tmp_path / "work"
        )


@pytest.mark.parametrize("form", ["single", "shards"])
@pytest.mark.parametrize("left", [0, 100, -40])
def test_a_truncated_file_is_refused(form, left, copy):
    directory = copy(form=form)
    file = sorted(directory.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(PhoenixError, match=f"{file.name}: the weights can't be loaded"):
        open_streamed(directory, "auto", CPU)


def test_a_missing_shard_is_refused(copy):
    directory = copy(form="shards")
    file = sorted(directory.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(PhoenixError, match=f"{file.name}: the weights can't be loaded"):
        open_streamed(directory, "auto", CPU)


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/passwd", "..", "", "a\\b", "sub/model.safetensors", 3, None]
)
def test_an_index_that_points_elsewhere_is_refused(name, copy):
    directory = copy(form="shards")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(PhoenixError, match="is no name of a file in this directory"):
        open_streamed(directory, "auto", CPU)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_that_is_none_is_refused(content, copy):
    directory = copy(form="shards")
    (directory / "model.safetensors.index.json").write_text(content)
    with pytest.raises(PhoenixError, match="it has no weight_map from tensors to files"):
        open_streamed(directory, "auto", CPU)


def test_files_may_be_links_as_in_the_hub_s_cache(copy, tmp_path, calibration, tokenizer):
    directory, blobs = copy(form="shards"), tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    expected, _, masks, _ = prune_both(directory, SparsifySettings(), calibration, tmp_path, tokenizer)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


def test_of_a_file_and_shards_the_file_is_read_as_transformers_does(copy, directories):
    directory = copy()
    for file in directories("llama", "shards").glob("model*"):
        shutil.copy(file, directory)
    change(directory / "model.safetensors", lambda tensors: tensors["model.norm.weight"].fill_(7))
    assert set(load(directory).model.norm.weight.tolist()) == {7}
    assert set(open_streamed(directory, "auto", CPU).model.model.norm.weight.tolist()) == {7}


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_that_are_both_in_the_file(equal, copy):
    """transformers ties them where they are equal, and believes the file where they aren't."""
    directory = copy("llama", "tied")

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (1 if equal else 2)

    change(directory / "model.safetensors", add)
    blocks, memory = open_streamed(directory, "auto", CPU), load(directory)
    if not equal:
        assert blocks is None
        assert not torch.equal(memory.lm_head.weight, memory.model.embed_tokens.weight)
        return
    assert blocks.model.lm_head.weight is blocks.model.model.embed_tokens.weight
    assert torch.equal(blocks.model.lm_head.weight, memory.lm_head.weight)


@pytest.mark.parametrize("damage", ["renamed", "missing", "beyond", "turned"])
def test_other_tensors_than_the_model_s_are_left_to_loading_as_a_whole(damage, copy):
    directory, name = copy(), "model.layers.1.mlp.up_proj.weight"

    def act(tensors):
        if damage == "turned":
            tensors[name] = tensors[name].t().contiguous()
        elif damage == "beyond":
            tensors["model.layers.2.mlp.up_proj.weight"] = tensors[name].clone()
        else:
            value = tensors.pop(name)
            if damage == "renamed":
                tensors[name.replace("up_proj", "w3")] = value

    change(directory / "model.safetensors", act)
    assert open_streamed(directory, "auto", CPU) is None
    with pytest.raises(PhoenixError):
        load(directory)


def test_old_names_are_left_to_loading_as_a_whole(copy):
    """OPT's first files have no `model.` before `decoder`, and transformers adds it."""
    directory = copy("opt")

    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    change(directory / "model.safetensors", rename)
    assert open_streamed(directory, "auto", CPU) is None
    assert_equal_states(load(directory), make_model("opt"))


def test_a_damaged_generation_config_is_refused(copy):
    directory = copy()
    (directory / "generation_config.json").write_text("{")
    with pytest.raises(PhoenixError, match="no causal language model .*generation_config.json"):
        open_streamed(directory, "auto", CPU)


def test_tensors_are_read_as_they_are(directories):
    checkpoint, state = Checkpoint(directories("llama", "shards")), make_model().state_dict()
    assert checkpoint.shapes == {name: tuple(value.shape) for name, value in state.items()}
    read = checkpoint.tensors({"one": "model.norm.weight", "two": "model.layers.1.mlp.up_proj.weight"})
    assert torch.equal(read["one"], state["model.norm.weight"])
    assert torch.equal(read["two"], state["model.layers.1.mlp.up_proj.weight"])
