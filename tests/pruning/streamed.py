"""Pruning from disk and in memory, side by side."""

import torch

from phoenix_sparse.models import load_model
from phoenix_sparse.pruning.initialise import initialise
from phoenix_sparse.pruning.streaming import FinishedBlocks, StreamedBlocks, open_streamed, write_model

CPU = torch.device("cpu")
METHODS = {
    "wanda": {"importance": "wanda"},
    "magnitude": {"importance": "magnitude", "sparsity": 0.6},
    "ria": {"importance": "ria"},
    "sparsegpt": {"update": "sparsegpt"},
    "alps": {"update": "alps"},
    "dsnot": {"update": "dsnot"},
    "taylor": {"importance": "taylor", "sparsity": 0.7},
    "gblm": {"importance": "gblm"},
    "2:4": {"importance": "wanda", "pattern": "2:4"},
    "sparsegpt 2:4": {"pattern": "2:4", "update": "sparsegpt"},
    "16x1": {"pattern": "16x1"},
    "global": {"importance": "taylor", "group": "global"},
    "owl": {"importance": "wanda", "allocation": "owl", "sparsity": 0.6},
    "alphapruning": {"importance": "wanda", "allocation": "alphapruning", "sparsity": 0.6},
    "list": {"importance": "wanda", "allocation": (0.4, 0.6)},
    "structured": {"importance": "taylor", "pattern": "structured", "sparsity": 0.3},
}


def load(directory, dtype="auto"):
    return load_model(directory, dtype, "cpu")


def prune_both(directory, settings, calibration, tmp_path, tokenizer, dtype="auto"):
    """Masks and models of both ways; the streamed one as it was written and loaded again."""
    from phoenix_sparse.pruning.blocks import Blocks

    memory = load(directory, dtype)
    expected, shares = initialise(Blocks(memory), settings, calibration, seed=2)
    blocks = open_streamed(directory, dtype, CPU)
    assert isinstance(blocks, StreamedBlocks)
    masks, streamed_shares = initialise(blocks, settings, calibration, seed=2, work=tmp_path / "work")
    assert streamed_shares == shares
    write_model(blocks, FinishedBlocks(tmp_path / "work" / "blocks"), tokenizer, tmp_path / "out")
    return expected, memory, masks, tmp_path / "out"


def assert_equal_states(one, other):
    state = other.state_dict()
    assert one.state_dict().keys() == state.keys()
    for name, value in one.state_dict().items():
        assert value.dtype == state[name].dtype, name
        assert torch.equal(value, state[name]), name


def on_device(blocks):
    """Blocks with a parameter off the meta device."""
    return [
        name for name, block in blocks.blocks.items() if any(not parameter.is_meta for parameter in block.parameters())
    ]
