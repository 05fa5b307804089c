"""A roofline: how many tokens a second a machine could reach, from FLOPs, bytes and its public specification.

A step takes the longer of two times: its operations at the peak rate, and the bytes it must read at the peak bandwidth
(Williams, Waterman and Patterson 2009). That is an upper bound that no program reaches, without launches, communication
or attention's softmax; it is a projection, never a measurement, and says so wherever it is shown.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phoenix_sparse.errors import PhoenixError

NOTE = (
    "Projected, not measured: the larger of operations / peak rate and bytes read / peak bandwidth. Packed weights "
    "take a value for every kept weight and a bit for every weight; a GPU still computes with the zeros, a Cerebras "
    "system skips them, and is slowed by the ways between its cores, which this leaves out. Peaks are the vendors', "
    "in 16 bits."
)


CONFIGURATIONS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class System:
    """A machine by its public specification.

    Attributes:
        flops: dense 16-bit operations a second; a multiply-add is two.
        bandwidth: bytes a second from the memory that holds the weights.
        memory: bytes of it.
        skips_zeros: whether an operation with a zero weight takes no time.
        source: where the figures stand.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    skips_zeros: bool
    source: str


SYSTEMS = (
    System("A100 80GB", 312e12, 2.039e12, 80e9, False, "NVIDIA A100 datasheet, SXM"),
    System("H100", 989e12, 3.35e12, 80e9, False, "NVIDIA H100 datasheet, SXM; dense"),
    System("H200", 989e12, 4.8e12, 141e9, False, "NVIDIA H200 datasheet, SXM; dense"),
    System("CS-2", 75e15, 20e15, 40e9, True, "Cerebras on WSE-2: AI compute as the vendor counts"),
    System("CS-3", 125e15, 21e15, 44e9, True, "Cerebras on WSE-3: AI compute as the vendor counts"),
)


def shipped_configuration(name: str) -> Path | None:
    """The directory of a well-known model's config.json that comes with Phoenix, without weights; None for others."""
    return next((path for path in CONFIGURATIONS.iterdir() if path.name == name), None)


def project(counts: Mapping[str, Any], system: System, *, batch: int = 1) -> dict[str, Any]:
    """Project the tokens a second of a counted model on a machine.

    Args:
        counts: what `flops.count_flops` gives.
        system: one of `SYSTEMS`, or one of measured rates.
        batch: sequences at once.

    Returns:
        `system`, `batch`, `projected` (True), and for `dense` and `packed` weights each of `prefill` and `decode`:
        `tokens_per_second` and `bound` (compute or memory). None in place of weights that don't fit the memory with the
        cache of keys and values.
    """
    if batch < 1:
        raise PhoenixError(f"hardware: a batch of {batch}; use 1 or more")
    result: dict[str, Any] = {"system": system.name, "batch": batch, "projected": True}
    return result | {kind: _project(counts, system, batch, kind) for kind in ("dense", "packed")}


def project_all(counts: Mapping[str, Any]) -> dict[str, Any]:
    """What flops.json keeps under `projected`: all systems by their specifications, batch 1 and 32."""
    return {
        "note": NOTE,
        "systems": [asdict(system) for system in SYSTEMS],
        "rows": [project(counts, system, batch=batch) for system in SYSTEMS for batch in (1, 32)],
    }


def _project(counts: Mapping[str, Any], system: System, batch: int, kind: str) -> dict[str, Any] | None:
    sizes = counts["bytes"]
    stored = sizes["dense"] if kind == "dense" else sizes["nonzero_values_and_bitmask"]
    if stored + batch * sizes["kv_cache"] > system.memory:
        return None
    # Machines that skip zeros skip them in whatever form the weights are stored: as `dense`, none are zero.
    operations = "sparse" if system.skips_zeros and kind == "packed" else "dense"
    prompt = counts["prompt_length"]
    reading = _read_bytes(counts, kind, batch * prompt)
    writing = _read_bytes(counts, kind, batch) + batch * sizes["kv_cache"]
    return {
        "prefill": _roof(system, batch * counts["prefill"]["total"][operations], reading, batch * prompt),
        "decode": _roof(system, batch * counts["decode"]["total"][operations], writing, batch),
    }


def _roof(system: System, operations: float, size: float, tokens: int) -> dict[str, Any]:
    compute, memory = operations / system.flops, size / system.bandwidth
    return {"tokens_per_second": tokens / max(compute, memory), "bound": "compute" if compute > memory else "memory"}


def _read_bytes(counts: Mapping[str, Any], kind: str, tokens: int) -> float:
    """Bytes of weights that a step of so many tokens reads: of a mixture's experts, those that any token visits."""
    return sum(share * size for share, size in _matrices(counts, kind, tokens))


def _matrices(counts: Mapping[str, Any], kind: str, tokens: int) -> Iterator[tuple[float, float]]:
    value = counts["bytes"]["per_value"]
    for entry in counts["linears"].values():
        weights = 1
        for length in entry["shape"]:
            weights *= length
        packed = kind == "packed" and entry["nnz"] < weights
        size = value * entry["nnz"] + weights / 8 if packed else value * weights
        # Tokens choose experts as if by chance; a linear is the case of all being chosen.
        yield 1 - (1 - entry["chosen"] / entry["experts"]) ** tokens, size
