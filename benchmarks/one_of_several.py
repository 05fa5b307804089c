"""What every process of `several_gpus.py` runs: `steps.tune`, as `phx run` calls it, with a look at what it did.

    python one_of_several.py MODEL OUT DEVICE SECONDS SETTINGS

MODEL is a directory that `several_gpus.py` made, OUT gets adapter/super, tune.json and, from the main process,
seen.json: what each process saw. A process that isn't done after SECONDS says where it hangs, and ends.
"""

import faulthandler
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import SEED

from phoenix_sparse import processes, steps
from phoenix_sparse.determinism import be_deterministic
from phoenix_sparse.files import write_json
from phoenix_sparse.finetuning.adapter import load_adapter
from phoenix_sparse.finetuning.elastic_linear import ElasticLinear
from phoenix_sparse.finetuning.settings import FinetuneSettings
from phoenix_sparse.merging import merge, validate_sparsity_preserved
from phoenix_sparse.recipe import check
from phoenix_sparse.settings import Device
from phoenix_sparse.tasks import TaskSettings, load_task


class RanksSeen:
    """The ranks that layers compute with, one after the other, as a hash: the same on every process or not."""

    def __init__(self) -> None:
        self.hash, self.count, self.different = hashlib.sha256(), 0, set[int]()
        plain = ElasticLinear.forward

        def forward(layer: ElasticLinear, *given: Any, **more: Any) -> Any:
            self.hash.update(layer.rank.to_bytes(4, "little"))
            self.count, self.different = self.count + 1, self.different | {layer.rank}
            return plain(layer, *given, **more)

        ElasticLinear.forward = forward  # type: ignore[method-assign]

    def record(self) -> dict[str, Any]:
        return {"sha256": self.hash.hexdigest(), "layers": self.count, "different": sorted(self.different)}


def work(model: Path, out: Path, device: Device, settings: FinetuneSettings) -> None:
    """Train as a process of several, then look: every process at its GPU, the main one at the merged model."""
    be_deterministic()
    times: list[float] = []
    machine = steps.Machine("auto", device, SEED, lambda *_: times.append(time.perf_counter()))
    masks = steps.read_masks(model / "masks.safetensors")
    task = load_task(TaskSettings(name=str(model / "task"), validation=0), seed=SEED)
    ranks = RanksSeen()
    out.mkdir(parents=True, exist_ok=True)
    steps.tune(model, masks, task, settings, out, machine, work=out / ".work")
    here = {
        "ranks": ranks.record(),
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        "gpu": torch.cuda.current_device() if torch.cuda.is_available() else None,
        "fsdp": os.environ.get("ACCELERATE_USE_FSDP") == "true",
    }
    seen = processes.gather(here)
    if processes.is_main():
        torch.cuda.empty_cache()
        merged = merge(load_adapter(machine.load(model), out / "adapter" / "super", masks))
        _, verdict = validate_sparsity_preserved(merged, masks)
        write_json(out / "seen.json", {"processes": seen, "times": times, "zeros": verdict["global"]})
    processes.say()  # none ends before the main one has


if __name__ == "__main__":
    place, target, where, seconds, chosen = sys.argv[1:]
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    work(Path(place), Path(target), where, check(FinetuneSettings, json.loads(chosen), "several_gpus"))  # type: ignore[arg-type]
