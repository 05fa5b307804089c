"""Finished blocks: what a stopped pruning goes on from."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.masks import save_mask
from phoenix_sparse.pruning import sequential
from phoenix_sparse.pruning.initialise import initialise
from phoenix_sparse.pruning.settings import SparsifySettings
from phoenix_sparse.pruning.streaming import FinishedBlocks, open_streamed, write_model
from pruning.streamed import CPU, METHODS, load, on_device


def stopped_after(block, what="pruning block"):
    def progress(kind, done, _of):
        if (kind, done) == (what, block):
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("wanda", "pruning block"),
        ("sparsegpt", "pruning block"),
        ("taylor", "pruning block"),
        ("owl", "pruning block"),
        ("dsnot", "pruning block"),
        ("owl", "scoring block"),
        ("global", "scoring block"),
        ("taylor", "gradients of block"),
    ],
)
def test_a_stopped_pruning_goes_on(method, what, streamed, directories, calibration, tmp_path, monkeypatch):
    from phoenix_sparse.pruning.blocks import Blocks

    settings, directory = SparsifySettings(**METHODS[method]), directories("mistral")

    def attempt(work, progress=None):
        blocks = open_streamed(directory, "auto", CPU) if streamed else Blocks(load(directory))
        masks, shares = initialise(blocks, settings, calibration, seed=0, work=work, progress=progress)
        finished = FinishedBlocks(work / "blocks")
        return masks, shares, {name: finished.state(name) for name in blocks.names}

    expected, shares, weights = attempt(tmp_path / "undisturbed")
    pruned, prune_linear = [], sequential.prune_linear
    monkeypatch.setattr(
        sequential, "prune_linear", lambda name, *given: (pruned.append(name), prune_linear(name, *given))[1]
    )
    with pytest.raises(KeyboardInterrupt):
        attempt(tmp_path / "work", stopped_after(1, what))
    assert len(pruned) == (7 if what == "pruning block" else 0)
    masks, again, found = attempt(tmp_path / "work")
    assert len(pruned) == len(set(pruned)) == (0 if method == "global" else 14)  # none twice
    assert again == shares
    assert list(masks) == list(expected)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)
    for name, state in weights.items():
        assert all(torch.equal(found[name][key], value) for key, value in state.items())


def test_what_is_finished_is_not_done_again(directories, calibration, tmp_path, monkeypatch):
    """Nor are a finished allocation's and finished gradients' measurements."""
    from phoenix_sparse.pruning import initialise as module

    settings = SparsifySettings(importance="taylor", allocation="owl")
    first = initialise(open_streamed(directories("llama"), "auto", CPU), settings, calibration, seed=0, work=tmp_path)

    def unwanted(*_args, **_kwargs):
        raise AssertionError("done again")

    monkeypatch.setattr(module, "allocate", unwanted)
    monkeypatch.setattr(sequential, "prune_linear", unwanted)
    monkeypatch.setattr("phoenix_sparse.pruning.gradients._forward", unwanted)
    second = initialise(open_streamed(directories("llama"), "auto", CPU), settings, calibration, seed=0, work=tmp_path)
    assert second[1] == first[1]
    assert all(torch.equal(second[0][name], mask) for name, mask in first[0].items())


@pytest.mark.parametrize(
    ("lost", "told"),
    [((), [2]), ((1,), [1, 2]), ((0,), [1, 2]), ((0, 1), [1, 2])],
    ids=["all are there", "the last is missing", "the first is missing", "none is there"],
)
def test_a_finished_block_counts_once(lost, told, directories, calibration, tmp_path):
    def attempt():
        calls = []
        blocks = open_streamed(directories("llama"), "auto", CPU)
        initialise(
            blocks, SparsifySettings(), calibration, seed=0, work=tmp_path, progress=lambda *call: calls.append(call)
        )
        return calls

    assert attempt() == [("pruning block", 1, 2), ("pruning block", 2, 2)]
    for index in lost:
        for file in (tmp_path / "blocks").glob(f"model.layers.{index}.*"):
            file.unlink()
    assert attempt() == [("pruning block", done, 2) for done in told]


@pytest.mark.parametrize("damage", ["bit", "truncated", "bit of the mask", "no mask", "another's mask", "foreign"])
def test_damaged_finished_files_are_refused(damage, directories, calibration, tmp_path, tokenizer):
    blocks = open_streamed(directories("llama"), "auto", CPU)
    masks, _ = initialise(blocks, SparsifySettings(), calibration, seed=0, work=tmp_path)
    weights = tmp_path / "blocks" / "model.layers.0.safetensors"
    mask = tmp_path / "blocks" / "model.layers.0.masks.safetensors"
    changed = mask if "mask" in damage else weights
    content = bytearray(changed.read_bytes())
    content[-11] ^= 1
    if damage.startswith("bit"):
        changed.write_bytes(content)
    elif damage == "truncated":
        changed.write_bytes(content[:-40])
    elif damage == "no mask":
        changed.unlink()
    elif damage == "another's mask":
        save_mask({name: ~one for name, one in masks.items() if name.startswith("model.layers.0.")}, mask)
    else:
        save_file({key: value.clone() for key, value in load_file(weights).items()}, weights)
    with pytest.raises(PhoenixError, match="model.layers.0"):
        initialise(
            open_streamed(directories("llama"), "auto", CPU), SparsifySettings(), calibration, seed=0, work=tmp_path
        )
    if changed is weights:
        with pytest.raises(PhoenixError, match="model.layers.0.safetensors"):
            write_model(blocks, FinishedBlocks(tmp_path / "blocks"), tokenizer, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_blocks_that_are_not_finished_are_not_written(directories, calibration, tmp_path, tokenizer):
    blocks = open_streamed(directories("llama"), "auto", CPU)
    with pytest.raises(KeyboardInterrupt):
        initialise(blocks, SparsifySettings(), calibration, seed=0, work=tmp_path, progress=stopped_after(1))
    assert on_device(blocks) == []
    with pytest.raises(PhoenixError, match="model.layers.1.safetensors: the weights can't be loaded"):
        write_model(blocks, FinishedBlocks(tmp_path / "blocks"), tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
