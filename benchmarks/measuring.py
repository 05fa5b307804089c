"""What the benchmarks share: constants, steps timed in turn, memory, the facts of the machine, tables."""

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phoenix_sparse.runs import host

Step = Callable[[], object]
Context = Callable[[], AbstractContextManager[Any]]

RANK, SCALE, SPARSITY, SEED = 32, 2.0, 0.5, 0
LORA, FLOOR = "lora", "full"  # the variants that the others are compared with

# Huge pages for what is allocated on the CPU, as torch asks for them and as glibc does for all others.
PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "THP_MEM_ALLOC_ENABLE": "1"}


def insist_on_huge_pages() -> None:
    """Start this script again if it was started without them: glibc reads its setting only when a process starts."""
    if any(os.environ.get(name) != value for name, value in PAGES.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | PAGES)


def mixed(device: torch.device) -> Context:
    """Autocast to bfloat16 on a GPU, as Trainer(bf16=True) does; nothing on a CPU."""
    if device.type == "cpu":
        return nullcontext
    return lambda: torch.autocast("cuda", dtype=torch.bfloat16)


def time_in_turn(steps: Mapping[str, Step], device: torch.device, repeats: int, warmup: int) -> dict[str, list[float]]:
    """Time every step once a repeat, in an order that turns round from one repeat to the next.

    On a GPU the times lie between CUDA events. An untimed step goes before each repeat and the host waits only after
    it, so that launches run ahead of the GPU as they do in training.

    Returns:
        seconds by step, [repeats] each; the same index is the same repeat.
    """
    for step in steps.values():
        for _ in range(warmup):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    for repeat in range(repeats):
        order = list(steps) if repeat % 2 == 0 else list(steps)[::-1]
        clock = _cuda_times if device.type == "cuda" else _cpu_times
        for name, value in clock(order, steps):
            seconds[name].append(value)
    return seconds


def _cpu_times(order: list[str], steps: Mapping[str, Step]) -> Iterator[tuple[str, float]]:
    for name in order:
        start = time.perf_counter()
        steps[name]()
        yield name, time.perf_counter() - start


def _cuda_times(order: list[str], steps: Mapping[str, Step]) -> Iterator[tuple[str, float]]:
    events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in order}
    steps[order[0]]()
    for name in order:
        start, end = events[name]
        start.record()
        steps[name]()
        end.record()
    torch.cuda.synchronize()
    for name, (start, end) in events.items():
        yield name, start.elapsed_time(end) / 1e3


def summary(seconds: list[float], references: Mapping[str, list[float]]) -> dict[str, Any]:
    """Median and quartiles, and the ratio to each reference: the median of the ratios within a repeat."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    ratios = {
        f"ratio_{name}": statistics.median(one / other for one, other in zip(seconds, reference, strict=True))
        for name, reference in references.items()
    }
    return {"seconds": middle, "seconds_q1": low, "seconds_q3": high, "repeats": len(seconds), **ratios}


def peak_bytes(step: Step) -> int:
    """The most GPU memory that a step holds above what lay there before it."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before


def saved_bytes(forward: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """What a forward pass keeps for the backward pass, without the tensors in `known` (and views of them)."""
    resident = {tensor.untyped_storage().data_ptr() for tensor in known}
    # The storages are held until all are counted, so that no address comes twice.
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in resident:
            kept[storage.data_ptr()] = storage
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def facts(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What a figure needs beside it: machine, versions, dtype, threads, date and commit."""
    import peft
    import transformers

    machine = host()
    return {
        "hardware": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{machine['cpu']}, {machine['cores']} cores",
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the checkout that this file belongs to, and whether its code was changed since."""
    root = Path(__file__).resolve().parents[1]
    commands = (["git", "rev-parse", "--show-toplevel", "HEAD"], ["git", "status", "--porcelain", "src", "benchmarks"])
    try:
        head, changes = (
            subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10, check=False)
            for command in commands
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = head.stdout.splitlines()
    if head.returncode != 0 or len(lines) != 2 or Path(lines[0]).resolve() != root:
        return None
    return lines[1] + (" with changes" if changes.stdout.strip() else "")


def llama_config(layers: int, width: int) -> Any:
    """Llama-3-8B's configuration, with 32 layers and width 4096, or one of its proportions."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=max(1, width // 512),
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )


def print_table(rows: list[dict[str, str]]) -> None:
    """Columns as wide as their widest cell: the first to the left, figures to the right."""
    columns = list(rows[0])
    widths = [max(len(column), *(len(row[column]) for row in rows)) for column in columns]
    for cells in [columns, ["-" * width for width in widths], *([row[column] for column in columns] for row in rows)]:
        first, *rest = (
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        print("  ".join([first, *rest]))
