"""Mask sets: one boolean tensor per pruned linear, True where a weight is kept.

In memory a mask set is a plain `dict` from the linear's full name (`model.layers.0.self_attn.q_proj`) to a boolean
tensor of its weight's shape (out, in). On disk it is one safetensors file with 8 weights a byte, the shapes and a
checksum of the content in its header.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from phoenix_sparse.errors import CheckFailed, PhoenixError, first_line
from phoenix_sparse.files import atomic_path

Masks = Mapping[str, Tensor]

FORMAT = "phoenix-masks"
VERSION = "1"


def save_mask(masks: Masks, path: Path | str, metadata: Mapping[str, Any] | None = None) -> str:
    """Write a mask set and give its checksum.

    Args:
        masks: boolean tensors by layer name.
        path: where the safetensors file goes.
        metadata: JSON-serialisable facts to keep with it (method, sparsity, seed, ...).
    """
    from safetensors.torch import save_file

    _check_boolean(masks)
    packed = {name: torch.from_numpy(_pack(mask)) for name, mask in sorted(masks.items())}
    digest = masks_sha256(masks)
    header = {
        "version": VERSION,
        "shapes": {name: list(masks[name].shape) for name in packed},
        "sha256": digest,
        "metadata": dict(metadata or {}),
    }
    with atomic_path(Path(path)) as temporary:
        # One entry: safetensors writes several in random order, and equal masks must give equal files.
        save_file(packed, temporary, metadata={FORMAT: json.dumps(header, sort_keys=True)})
    return digest


def load_mask(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a mask set and its metadata; sizes, padding and checksum are checked before anything is used.

    Raises:
        PhoenixError: the file is missing, truncated, of another format, or its content isn't what was written.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise PhoenixError(f"masks: {path} is not a file; give the masks.safetensors that pruning wrote")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(FORMAT, "{}"))
            if not isinstance(header, dict) or header.get("version") != VERSION:
                raise PhoenixError(f"masks: {path} is not a mask file of version {VERSION} (its header says otherwise)")
            shapes, metadata = dict(header["shapes"]), dict(header["metadata"])
            if set(shapes) != set(file.keys()):
                raise PhoenixError(f"masks: {path} is damaged: its header and its tensors name different layers")
            masks = {name: _unpack(file.get_tensor(name), shapes[name], f"{path}: {name}") for name in sorted(shapes)}
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise PhoenixError(f"masks: {path} is damaged or truncated ({first_line(error)})") from error
    if masks_sha256(masks) != header.get("sha256"):
        raise PhoenixError(f"masks: {path} is damaged: its content does not match its checksum")
    return masks, metadata


def masks_sha256(masks: Masks) -> str:
    """Hash the content of a mask set (names, shapes, bits), whatever file it lies in."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(f"{name} {tuple(masks[name].shape)}\n".encode())
        digest.update(_pack(masks[name]).tobytes())
    return digest.hexdigest()


def compute_sparsity_stats(masks: Masks) -> dict[str, Any]:
    """Count kept weights: in all and per layer (`sparsity`, `nnz`, `shape`)."""
    layers = {
        name: {
            "shape": list(mask.shape),
            "nnz": int(mask.sum()),
            "sparsity": 1 - int(mask.sum()) / max(mask.numel(), 1),
        }
        for name, mask in masks.items()
    }
    total, kept = sum(mask.numel() for mask in masks.values()), sum(int(mask.sum()) for mask in masks.values())
    return {"sparsity": 1 - kept / max(total, 1), "nnz": kept, "weights": total, "layers": layers}


def validate_mask(masks: Masks, expected_sparsity: float, tolerance: float = 0.01) -> tuple[bool, dict[str, Any]]:
    """Say whether the overall sparsity is as expected and no layer is dead, with the statistics."""
    stats = compute_sparsity_stats(masks)
    stats["dead_layers"] = [name for name, layer in stats["layers"].items() if layer["nnz"] == 0]
    close = abs(stats["sparsity"] - expected_sparsity) <= tolerance
    return close and not stats["dead_layers"], stats


def plot_sparsity_histogram(masks: Masks, path: Path | str) -> None:
    """Draw the sparsity of every layer (bars, in model order) and how layers spread over it (histogram)."""
    from matplotlib.figure import Figure

    layers = compute_sparsity_stats(masks)["layers"]
    values = [layer["sparsity"] for layer in layers.values()]
    figure = Figure(figsize=(max(7.0, 0.11 * len(values)), 6.0), layout="constrained")
    bars, spread = figure.subplots(2, 1)
    bars.bar(range(len(values)), values, color="0.35")
    bars.set(xlabel="layer, in model order", ylabel="sparsity (share of zeros)", ylim=(0, 1))
    spread.hist(values, bins=20, range=(0, 1), color="0.35")
    spread.set(xlabel="sparsity (share of zeros)", ylabel="layers")
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png", dpi=120)


def check_fit(masks: Masks, layers: Mapping[str, nn.Linear]) -> None:
    """Refuse masks of another model: every mask needs its layer by exact name and shape, every layer its mask.

    Raises:
        PhoenixError: naming the first layer that doesn't fit.
    """
    for name, mask in masks.items():
        if name not in layers:
            raise PhoenixError(f"masks: {name} is no prunable linear of this model; are these another model's masks?")
        shape = tuple(layers[name].weight.shape)
        if tuple(mask.shape) != shape:
            raise PhoenixError(f"masks: {name} has shape {tuple(mask.shape)} and the model's weight {shape}")
    missing = [name for name in layers if name not in masks]
    if missing:
        raise PhoenixError(f"masks: no mask for {missing[0]} ({len(missing)} of {len(layers)} layers have none)")


@torch.no_grad()
def apply_masks(masks: Masks, layers: Mapping[str, nn.Linear]) -> None:
    """Set every weight off its mask to zero, in place."""
    check_fit(masks, layers)
    for name, mask in masks.items():
        weight = layers[name].weight
        weight.masked_fill_(~mask.to(weight.device), 0)


@torch.no_grad()
def inspect(masks: Masks, layers: Mapping[str, nn.Linear]) -> dict[str, dict[str, Any]]:
    """Compare weights with masks, layer by layer: `nnz`, `sparsity`, `mask_sparsity` and `off_mask_nonzeros`.

    A kept weight may be zero (bfloat16 rounds some there), so non-zeros must be a subset of the mask.
    """
    check_fit(masks, layers)
    report = {}
    for name, mask in masks.items():
        nonzero = layers[name].weight != 0
        count = int(nonzero.sum())
        report[name] = {
            "nnz": count,
            "sparsity": 1 - count / mask.numel(),
            "mask_sparsity": 1 - int(mask.sum()) / mask.numel(),
            "off_mask_nonzeros": int((nonzero & ~mask.to(nonzero.device)).sum()),
        }
    return report


def require_preserved(masks: Masks, layers: Mapping[str, nn.Linear], where: str) -> dict[str, dict[str, Any]]:
    """Inspect, and raise on the first layer with a non-zero off its mask.

    Raises:
        CheckFailed: naming the layer, the count and the whole.
    """
    report = inspect(masks, layers)
    broken = {name: layer["off_mask_nonzeros"] for name, layer in report.items() if layer["off_mask_nonzeros"]}
    if broken:
        name, count = next(iter(broken.items()))
        raise CheckFailed(
            f"{where}: {sum(broken.values())} non-zeros off the mask in {len(broken)} of {len(masks)} layers, "
            f"{name} first ({count}); the zeros were not kept"
        )
    return report


def _check_boolean(masks: Masks) -> None:
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise PhoenixError(f"masks: {name} is {mask.dtype}, not boolean")


def _pack(mask: Tensor) -> np.ndarray:
    return np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little")


def _unpack(packed: Tensor, shape: Any, where: str) -> Tensor:
    if not (isinstance(shape, list) and shape and all(type(n) is int and n > 0 for n in shape)):
        raise PhoenixError(f"masks: {where} has no valid shape")
    count = int(np.prod(shape, dtype=object))
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != (count + 7) // 8:
        raise PhoenixError(f"masks: {where} has not the {(count + 7) // 8} bytes that its shape {tuple(shape)} needs")
    bits = np.unpackbits(packed.numpy(), bitorder="little")
    if bits[count:].any():
        raise PhoenixError(f"masks: {where} has bits set beyond its last weight")
    return torch.from_numpy(bits[:count].astype(bool)).reshape(shape)
