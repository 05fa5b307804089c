"""What each of two processes runs: steps of a model whose parameters are shared out over both, and whole trainings."""

import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from test_sampling import trained
from test_sharded import SHARDED
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


def share_out() -> None:
    """Let accelerate do on CPUs what `accelerate launch --use_fsdp --fsdp_version 2` makes it do on GPUs."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    plain = AcceleratorState.__init__

    def init(self, *given, fsdp_plugin=None, **more):
        plain(self, *given, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init


def trainings(directory):
    """Each training, and once more as if a kill had come before its end."""
    found = {}
    for name, changes in SHARDED.items():
        work = directory / name
        factors, record, seen = trained(work, **changes)
        files = sorted({path.name for path in work.glob("checkpoint-*/*")})
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            shutil.rmtree(work / f"checkpoint-{record['steps']}")
        PartialState().wait_for_everyone()
        again, resumed, _ = trained(work, **changes)
        found[name] = {"factors": factors, "again": again, "seen": seen, "files": files}
        found[name] |= {"resumed_from": resumed["resumed_from"], "losses": [entry["loss"] for entry in record["log"]]}
    return found


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
    share_out()
    torch.save(trainings(directory), directory / f"{rank}.pt")
    (directory / f"{rank}.done").write_text(str(distributed.get_world_size()))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    if os.environ["WORLD_SIZE"] == "1":
        torch.save(trainings(Path(sys.argv[1]) / "alone"), Path(sys.argv[1]) / "alone.pt")
    else:
        main(Path(sys.argv[1]))
