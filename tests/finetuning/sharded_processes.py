"""What each of two processes runs: a step of a model whose parameters are shared out over both, as FSDP2 does."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch import distributed
from torch.distributed.fsdp import fully_shard

from phoenix_sparse.finetuning.adapter import add_adapter
from phoenix_sparse.finetuning.full import train_weights
from phoenix_sparse.finetuning.trained import make_whole, read_tensors, trained_tensors, write_tensors
from tiny import pruned


def made(method):
    model, masks = pruned()
    if method == "full":
        return train_weights(model, masks)
    model = add_adapter(model, rank=4, scale=2.0, masks=masks, seed=0).get_base_model()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def step(model, rows):
    """Two steps of AdamW on some rows, the loss being a mean over those of all processes."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return trained_tensors(model)


def main(directory: Path) -> None:
    rank = PartialState(cpu=True).process_index
    rows = torch.arange(4 * 12).reshape(4, 12)
    for method in ("lora", "full"):
        expected = step(made(method), rows)
        model = made(method)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        got = step(model, rows[2 * rank : 2 * rank + 2])
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=5e-5)
        # Written whole, and shared out again.
        file = directory / f"{method}-{rank}.safetensors"
        write_tensors(expected, file)
        read_tensors(model, file)
        assert all(torch.equal(value, expected[name]) for name, value in trained_tensors(model).items())
        make_whole(model)
        whole = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        assert all(torch.equal(value, expected[name]) for name, value in whole.items())
    (directory / f"{rank}.done").write_text(str(distributed.get_world_size()))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
