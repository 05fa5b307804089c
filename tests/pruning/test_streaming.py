"""Pruning from disk, block by block, gives to the last bit what pruning in memory gives."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.initialise import initialise
from phoenix_sparse.pruning.settings import SparsifySettings
from phoenix_sparse.pruning.streaming import StreamedBlocks, open_streamed
from pruning.streamed import CPU, METHODS, assert_equal_states, load, on_device, prune_both
from tiny import CONFIGS


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("method", METHODS)
def test_masks_and_weights_are_those_of_the_model_in_memory(
    kind, method, directories, calibration, tmp_path, tokenizer
):
    settings = SparsifySettings(**METHODS[method])
    expected, memory, masks, out = prune_both(directories(kind), settings, calibration, tmp_path, tokenizer)
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[name], expected[name]) for name in expected)
    assert not all(mask.all() for mask in masks.values())
    assert_equal_states(load(out), memory)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("form", ["shards", "tied", "untied", "bfloat16"])
def test_every_form_of_a_checkpoint_is_read(kind, form, directories, calibration, tmp_path, tokenizer):
    settings = SparsifySettings(importance="gblm")
    expected, memory, masks, out = prune_both(directories(kind, form), settings, calibration, tmp_path, tokenizer)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)
    written = load(out)
    assert_equal_states(written, memory)
    tied = written.get_input_embeddings().weight is written.get_output_embeddings().weight
    assert tied == (form == "tied" or (kind == "opt" and form != "untied"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_dtype_may_be_asked_for(dtype, directories, calibration, tmp_path, tokenizer):
    form = "bfloat16" if dtype == "float32" else "single"
    settings = SparsifySettings()
    directory = directories("llama", form)
    expected, memory, masks, out = prune_both(directory, settings, calibration, tmp_path, tokenizer, dtype)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)
    assert AutoConfig.from_pretrained(out).dtype == getattr(torch, dtype)
    assert_equal_states(load(out), memory)


def test_what_is_no_weight_is_kept(directories, calibration, tmp_path, tokenizer):
    directory = directories("qwen2", "shards")
    _, memory, _, out = prune_both(directory, SparsifySettings(), calibration, tmp_path, tokenizer)
    memory.save_pretrained(tmp_path / "memory")
    tokenizer.save_pretrained(tmp_path / "memory")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_text() == (tmp_path / "memory" / name).read_text()
    generation = GenerationConfig.from_pretrained(out)
    assert (generation.max_length, generation.top_k) == (99, 7)
    assert AutoTokenizer.from_pretrained(out).encode("abc") == tokenizer.encode("abc")


def test_a_model_without_generation_config_gets_its_own_default(directories, calibration, tmp_path, tokenizer):
    directory = shutil.copytree(directories("llama"), tmp_path / "model")
    (directory / "generation_config.json").unlink()
    config = json.loads((directory / "config.json").read_text()) | {"num_beams": 3}  # as old ones have it
    (directory / "config.json").write_text(json.dumps(config))
    _, memory, _, out = prune_both(directory, SparsifySettings(), calibration, tmp_path, tokenizer)
    memory.save_pretrained(tmp_path / "memory")
    written, expected = (json.loads((d / "generation_config.json").read_text()) for d in (out, tmp_path / "memory"))
    assert written == expected
    assert written["num_beams"] == 3


@pytest.mark.parametrize("method", ["wanda", "taylor", "owl", "global", "structured", "alphapruning"])
def test_one_block_at_a_time_is_in_memory(method, directories, calibration, tmp_path, monkeypatch):
    blocks = open_streamed(directories("llama"), "auto", CPU)
    assert on_device(blocks) == []
    rest = [name for name, parameter in blocks.model.named_parameters() if not parameter.is_meta]
    assert rest == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    open_now, run = [], StreamedBlocks.run

    def watched(self, index, block, hidden):
        open_now.append(on_device(self))
        assert open_now[-1] == [self.names[index]]
        return run(self, index, block, hidden)

    monkeypatch.setattr(StreamedBlocks, "run", watched)
    settings = SparsifySettings(**METHODS[method])
    initialise(
        blocks, settings, calibration, seed=0, work=tmp_path, progress=lambda *_: open_now.append(on_device(blocks))
    )
    assert open_now
    assert max(map(len, open_now)) <= 1
    assert on_device(blocks) == []


def test_blocks_are_closed_after_an_error(directories):
    blocks = open_streamed(directories("llama"), "auto", CPU)
    with pytest.raises(ZeroDivisionError), blocks.opened("model.layers.1"):
        assert on_device(blocks) == ["model.layers.1"]
        _ = 1 / 0
    assert on_device(blocks) == []


def test_a_block_may_be_opened_within_itself(directories):
    """As happens where the arguments for a new length are made while the first block is open."""
    blocks = open_streamed(directories("llama"), "auto", CPU)
    with torch.no_grad(), blocks.opened("model.layers.0") as block:
        hidden = torch.randn(1, 9, 32)
        output = blocks.run(0, block, hidden)
        assert on_device(blocks) == ["model.layers.0"]
        assert torch.equal(blocks.run(0, block, hidden), output)
    assert on_device(blocks) == []


def test_a_model_on_disk_needs_a_place_for_its_blocks(directories, calibration):
    blocks = open_streamed(directories("llama"), "auto", CPU)
    with pytest.raises(PhoenixError, match="work: the pruned blocks of a model on disk need a directory"):
        initialise(blocks, SparsifySettings(), calibration, seed=0)


def test_evolution_needs_the_model_in_memory(directories, calibration, tmp_path):
    blocks = open_streamed(directories("llama"), "auto", CPU)
    with pytest.raises(PhoenixError, match="evolutionary runs the whole model; give one in memory"):
        initialise(blocks, SparsifySettings(allocation="evolutionary"), calibration, seed=0, work=tmp_path)
