"""FSDP2 in two gloo processes: the same steps as on one, with the parameters that train gathered and put back whole.

accelerate itself shards on GPUs only. What it would call is called here directly; then it is made to believe that CPUs
will do, and whole trainings go through it.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.finetuning.sharding import require_shareable

# name -> changes of the settings; each is trained alone, and by two processes that share the model
SHARDED = {
    "lora": {"max_steps": 4, "checkpoint_every": 2, "micro_batch_size": 1},
    "hira": {"max_steps": 3, "checkpoint_every": 2, "sampling": "sandwich", "method": "hira"}
    | {"gradient_checkpointing": True, "micro_batch_size": 2},
}


def test_shared_out_parameters_train_and_are_saved_whole(tmp_path):
    here = Path(__file__).parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    common |= {"PYTHONPATH": os.pathsep.join([str(here.parent), str(here), *sys.path]), "CUDA_VISIBLE_DEVICES": ""}
    processes = []
    for rank in ("0", "1"):
        environment = os.environ | common | {"RANK": rank, "LOCAL_RANK": rank}
        with (tmp_path / f"{rank}.txt").open("w") as words:
            command = [sys.executable, str(here / "sharded_processes.py"), str(tmp_path)]
            processes.append(subprocess.Popen(command, env=environment, stdout=words, stderr=words))
    alone = [sys.executable, str(here / "sharded_processes.py"), str(tmp_path)]
    subprocess.run(alone, env=os.environ | common | {"WORLD_SIZE": "1", "RANK": "0"}, check=True, timeout=120)
    codes = [process.wait(timeout=120) for process in processes]
    assert codes == [0, 0], [(tmp_path / f"{rank}.txt").read_text()[-2000:] for rank in (0, 1)]
    assert [(tmp_path / f"{rank}.done").read_text() for rank in (0, 1)] == ["2", "2"]
    one, two, alone = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("0", "1", "alone"))
    for name in SHARDED:
        assert one[name]["losses"] == pytest.approx(alone[name]["losses"], rel=1e-4)
        assert one[name]["seen"] == two[name]["seen"]
        for key, value in alone[name]["factors"].items():
            torch.testing.assert_close(one[name]["factors"][key], value, rtol=1e-3, atol=2e-5)
            # Both have it whole, and a training that was killed arrives at the same.
            for other in (two[name]["factors"], one[name]["again"], two[name]["again"]):
                assert torch.equal(other[key], one[name]["factors"][key])
        assert one[name]["resumed_from"] == 2
        # What trains and its states, nothing of the frozen weights.
        known = ("trained.", "complete.", "trainer_state.", "scheduler.", "optimizer", "rng_state_")
        assert all(file.startswith(known) for file in one[name]["files"]), one[name]["files"]


@pytest.mark.parametrize(
    ("given", "evolves", "words"),
    [
        ({"fsdp_version": 1}, False, "launch: FSDP 1 .* add --fsdp_version 2"),
        ({"activation_checkpointing": True}, False, "launch: .* set finetune.gradient_checkpointing=true"),
        ({}, True, "finetune.evolve: .* use DDP"),
    ],
)
def test_what_can_t_be_shared_out_is_refused(given, evolves, words):
    plugin = {"fsdp_version": 2, "activation_checkpointing": False}
    require_shareable(SimpleNamespace(**plugin), evolves=False)
    with pytest.raises(PhoenixError, match=words):
        require_shareable(SimpleNamespace(**plugin | given), evolves)
