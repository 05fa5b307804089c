"""FSDP2 in two gloo processes: the same steps as on one, with the parameters that train gathered and put back whole.

accelerate itself shards on GPUs only; what it would call is called here directly.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path


def test_shared_out_parameters_train_and_are_saved_whole(tmp_path):
    here = Path(__file__).parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    common |= {"PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path]), "CUDA_VISIBLE_DEVICES": ""}
    processes = []
    for rank in ("0", "1"):
        environment = os.environ | common | {"RANK": rank, "LOCAL_RANK": rank}
        with (tmp_path / f"{rank}.txt").open("w") as words:
            command = [sys.executable, str(here / "sharded_processes.py"), str(tmp_path)]
            processes.append(subprocess.Popen(command, env=environment, stdout=words, stderr=words))
    codes = [process.wait(timeout=120) for process in processes]
    assert codes == [0, 0], [(tmp_path / f"{rank}.txt").read_text()[-2000:] for rank in (0, 1)]
    assert [(tmp_path / f"{rank}.done").read_text() for rank in (0, 1)] == ["2", "2"]
