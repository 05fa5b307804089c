"""A search that several processes share finds what one finds alone, and every candidate is evaluated once."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from phoenix_sparse import steps
from phoenix_sparse.evaluation.settings import EvaluateSettings
from phoenix_sparse.finetuning.adapter import add_super_adapter, elastic_layers, save_adapter
from phoenix_sparse.finetuning.elastic import spaces
from phoenix_sparse.finetuning.settings import SearchSettings
from phoenix_sparse.masks import load_mask, save_mask
from phoenix_sparse.models import prunable_linears, save_model
from phoenix_sparse.pipeline import open_task
from phoenix_sparse.recipe import check
from phoenix_sparse.tasks import TaskSettings
from tiny import pruned

RANKS = (4, 2, 1)
SETTINGS = {"bounds": True, "hill_climb": 3, "neighbours": 3, "pool": 2, "nsga2": 3, "population": 3}


def search(directory: Path, task_directory: Path, out: Path) -> None:
    task = open_task(check(TaskSettings, {"name": str(task_directory)}, "task"), seed=0)
    masks = load_mask(directory / "masks.safetensors")[0]
    steps.search(
        *(directory / "sparse", masks, task, directory / "super", SearchSettings(**SETTINGS)),
        *(EvaluateSettings(batch_size=20), out, steps.Machine(seed=0)),
        work=out / "work",
    )


def test_two_processes_search_what_one_does(tmp_path, tokenizer, task_directory):
    model, masks = pruned()
    save_model(model, tokenizer, tmp_path / "sparse")
    save_mask(masks, tmp_path / "masks.safetensors")
    adapted = add_super_adapter(model, spaces(prunable_linears(model), RANKS), scale=2.0, masks=masks, seed=0)
    torch.manual_seed(0)
    for layer in elastic_layers(adapted).values():
        layer.lora_B["default"].weight.data.normal_(std=0.1)
    save_adapter(adapted, tmp_path / "super", masks, RANKS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    common |= {"PYTHONPATH": os.pathsep.join([str(here.parent), str(here), *sys.path]), "CUDA_VISIBLE_DEVICES": ""}
    code = (
        "import sys; from pathlib import Path; from test_search_together import search; "
        "search(*map(Path, sys.argv[1:])); import torch.distributed as d; d.barrier(); d.destroy_process_group()"
    )
    running = []
    for rank in ("0", "1"):
        environment = os.environ | common | {"RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, "-c", code, str(tmp_path), str(task_directory), str(tmp_path / "two")]
        with (tmp_path / f"{rank}.txt").open("w") as words:
            running.append(subprocess.Popen(command, env=environment, stdout=words, stderr=words))
    search(tmp_path, task_directory, tmp_path / "one")
    codes = [process.wait(timeout=120) for process in running]
    assert codes == [0, 0], [(tmp_path / f"{rank}.txt").read_text()[-2000:] for rank in (0, 1)]
    one, two = (json.loads((tmp_path / name / "search.json").read_text()) for name in ("one", "two"))
    seconds = [[candidate.pop("seconds") for candidate in found["candidates"]] for found in (one, two)]
    assert one == two
    assert len(seconds[0]) == 1 + 2 + 3 + 3
    journals = [(tmp_path / name / "work" / "candidates.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(journals[0]) == len(journals[1])
    chosen = [(tmp_path / name / "adapter/chosen/adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert chosen[0] == chosen[1]
