"""Mask sets: one boolean tensor per pruned linear, True where a weight is kept.

In memory a mask set is a plain `dict` from the linear's full name (`model.layers.0.self_attn.q_proj`) to a boolean
tensor of its weight's shape (out, in). On disk it is one file (`.safetensors`, `.npz` or `.pt`) with 8 weights a
byte, the shapes and a checksum of the content in its header.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from phoenix_sparse.errors import CheckFailed, PhoenixError, first_line
from phoenix_sparse.files import atomic_path
from phoenix_sparse.mask_formats import Packed, kind_of, read, write

Masks = Mapping[str, Tensor]
Shapes = Mapping[str, list[int]]

VERSION = "1"


def save_mask(
    masks: Masks, path: Path | str, metadata: Mapping[str, Any] | None = None, format: str | None = None
) -> str:
    """Write a mask set and give its checksum, which is the same in every format.

    Equal masks and metadata give equal bytes; of a .pt file, under the same version of torch.

    Args:
        masks: boolean tensors by layer name, on any device.
        path: where the file goes; its suffix (.safetensors, .npz or .pt) chooses the format.
        metadata: JSON-serialisable facts to keep with it (method, sparsity, seed, ...).
        format: `safetensors`, `npz` or `pt`, for a path without a suffix.

    Raises:
        PhoenixError: another suffix, a tensor that is no mask, or metadata that JSON can't hold.
    """
    path = Path(path)
    kind = kind_of(path, format)
    _check_masks(masks)
    packed = {name: _pack(mask) for name, mask in masks.items()}
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    digest = _digest(packed, shapes)
    header = {"version": VERSION, "shapes": shapes, "sha256": digest, "metadata": dict(metadata or {})}
    try:
        text = json.dumps(header, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise PhoenixError(
            f"masks: the metadata can't be written as JSON ({first_line(error)}); give plain values"
        ) from error
    with atomic_path(path) as temporary:
        write(kind, temporary, packed, text)
    return digest


def load_mask(path: Path | str, format: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a mask set and its metadata; sizes, padding and checksum are checked before anything is used.

    Args:
        path: a file that `save_mask` wrote; its suffix tells the format.
        format: `safetensors`, `npz` or `pt`, for a path without a suffix.

    Returns:
        Boolean tensors (out, in) on the CPU by layer name, and the metadata.

    Raises:
        PhoenixError: it is a directory or missing, truncated, of another format, or its content isn't what was written.
    """
    path = Path(path)
    if path.is_dir():
        raise PhoenixError(_tell_directory(path))
    kind = kind_of(path, format)
    if not path.is_file():
        raise PhoenixError(f"masks: {path} is not a file; give a mask file that pruning wrote")
    try:
        text, packed = read(kind, path)
        header = json.loads(text)
        if not isinstance(header, dict) or header.get("version") != VERSION:
            raise PhoenixError(f"masks: {path} is not a mask file of version {VERSION} (its header says otherwise)")
        shapes, metadata = dict(header["shapes"]), dict(header["metadata"])
        if set(shapes) != set(packed):
            raise PhoenixError(f"masks: {path} is damaged: its header and its tensors name different layers")
        for name, part in packed.items():
            _check_size(part, shapes[name], f"{path}: {name}")
        if _digest(packed, shapes) != header.get("sha256"):
            raise PhoenixError(f"masks: {path} is damaged: its content does not match its checksum")
        return {name: _unpack(packed[name], shapes[name], f"{path}: {name}") for name in sorted(shapes)}, metadata
    except PhoenixError:
        raise
    except Exception as error:  # what three libraries raise over damaged bytes has no common name
        raise PhoenixError(f"masks: {path} is damaged or truncated ({first_line(error)})") from error


def _tell_directory(path: Path) -> str:
    """What a directory in the place of a mask file is, and which file may have been meant."""
    kind = "a model's directory" if (path / "config.json").is_file() else "a directory"
    near = [place / "masks.safetensors" for place in (path, path.parent)]
    meant = next((file for file in near if file.is_file()), "masks.safetensors")
    return f"masks: {path} is {kind}, and masks are one file; give the one that pruning wrote, such as {meant}"


def masks_sha256(masks: Masks) -> str:
    """Hash the content of a mask set (names, shapes, bits), whatever file it lies in."""
    packed = {name: _pack(mask) for name, mask in masks.items()}
    return _digest(packed, {name: list(mask.shape) for name, mask in masks.items()})


def compute_sparsity_stats(masks: Masks | Tensor) -> dict[str, Any]:
    """Count kept weights.

    Args:
        masks: a mask set, or one mask, which is then called `mask`.

    Returns:
        `sparsity`, `nnz` and `weights` of all layers together; `layers` (also `per_layer`): shape, nnz and sparsity by
        layer name; `global`: the sparsity, and how the layers' sparsities spread (mean, standard deviation, extremes).

    Raises:
        PhoenixError: it is neither.
    """
    masks = {"mask": masks} if isinstance(masks, Tensor) else masks
    _require_set(masks)
    layers: dict[str, dict[str, Any]] = {}
    for name, mask in masks.items():
        nnz = int(mask.count_nonzero())
        layers[name] = {"shape": list(mask.shape), "nnz": nnz, "sparsity": 1 - nnz / max(mask.numel(), 1)}
    total, kept = sum(mask.numel() for mask in masks.values()), sum(layer["nnz"] for layer in layers.values())
    sparsity = 1 - kept / total if total else 0.0
    each = [layer["sparsity"] for layer in layers.values()] or [0.0]
    spread = {
        "sparsity": sparsity,
        "num_layers": len(layers),
        "mean_layer_sparsity": float(np.mean(each)),
        "std_layer_sparsity": float(np.std(each)),
        "min_layer_sparsity": min(each),
        "max_layer_sparsity": max(each),
    }
    return {
        "sparsity": sparsity,
        "nnz": kept,
        "weights": total,
        "layers": layers,
        "per_layer": layers,
        "global": spread,
    }


def validate_mask(
    masks: Masks | Tensor, expected_sparsity: float | None = None, tolerance: float = 0.01
) -> tuple[bool, dict[str, Any]]:
    """Say whether masks are boolean, of the expected overall sparsity (unless None), and leave no layer dead.

    Args:
        masks: a mask set, or one mask.
        expected_sparsity: share of zeros.
        tolerance: the largest difference from it that is still right.

    Returns:
        The verdict and the statistics, with `dead_layers`, and with the reason as `error` where the verdict is no.

    Raises:
        PhoenixError: these are no masks, or the sparsity or the tolerance is no number.
    """
    for name, value in (("expected_sparsity", expected_sparsity), ("tolerance", tolerance)):
        if value is not None and not isinstance(value, Real):
            raise PhoenixError(f"{name}: {value!r} is no number; 0.7 is a sparsity of 70%")
    masks = {"mask": masks} if isinstance(masks, Tensor) else masks
    stats = compute_sparsity_stats(masks)
    stats["dead_layers"] = [name for name, layer in stats["layers"].items() if layer["nnz"] == 0]
    wrong = [f"{name} is {mask.dtype}, not boolean" for name, mask in masks.items() if mask.dtype != torch.bool]
    if not masks:
        wrong.append("there are no masks")
    if expected_sparsity is not None and not abs(stats["sparsity"] - expected_sparsity) <= tolerance:
        wrong.append(f"the sparsity is {stats['sparsity']:.4f}, not {expected_sparsity:.4f} ± {tolerance:g}")
    wrong += [f"{name} keeps nothing" for name in stats["dead_layers"]]
    if wrong:
        stats["error"] = "; ".join(wrong)
    return not wrong, stats


def plot_sparsity_histogram(masks: Masks, save_path: Path | str) -> None:
    """Draw the sparsity of every layer (bars, in model order) and how layers spread over it (histogram).

    The suffix of the path says the format, PNG where it has none.

    Raises:
        PhoenixError: these are no masks, or nothing is drawn in that format.
    """
    from matplotlib.figure import Figure

    layers = compute_sparsity_stats(masks)["layers"]
    values = [layer["sparsity"] for layer in layers.values()]
    figure = Figure(figsize=(max(7.0, 0.11 * len(values)), 6.0), layout="constrained")
    kind, known = Path(save_path).suffix.lstrip(".") or "png", figure.canvas.get_supported_filetypes()
    if kind.lower() not in known:
        raise PhoenixError(f"{save_path}: no plot is drawn as {kind}; give a path that ends in .png, .svg or .pdf")
    bars, spread = figure.subplots(2, 1)
    bars.bar(range(len(values)), values, color="0.35")
    bars.set(xlabel="layer, in model order", ylabel="sparsity (share of zeros)", ylim=(0, 1))
    # Bars around multiples of 5%: masks hit 70% to a weight, and a bin that ended there would say 65 to 70.
    spread.hist(values, bins=21, range=(-0.025, 1.025), color="0.35", rwidth=0.9)
    spread.set(xlabel="sparsity (share of zeros)", ylabel="layers")
    with atomic_path(Path(save_path)) as temporary:
        figure.savefig(temporary, format=kind, dpi=120)


def check_fit(masks: Masks, layers: Mapping[str, nn.Linear]) -> None:
    """Refuse masks of another model: every mask needs its layer by exact name and shape, every layer its mask.

    Raises:
        PhoenixError: naming the first layer that doesn't fit, or whose mask isn't boolean.
    """
    _require_set(masks)
    for name, mask in masks.items():
        if name not in layers:
            raise PhoenixError(f"masks: {name} is no prunable linear of this model; are these another model's masks?")
        if mask.dtype != torch.bool:
            raise PhoenixError(
                f"masks: {name} is {mask.dtype}, not boolean; give mask.bool(), True where a weight is kept"
            )
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


def require_pruned(masks: Masks, layers: Mapping[str, nn.Linear], where: str) -> None:
    """Refuse a model that isn't zero where the masks are: what is trained through them would be merged with the rest.

    Raises:
        PhoenixError: with what to give instead.
    """
    off = sum(layer["off_mask_nonzeros"] for layer in inspect(masks, layers).values())
    if off:
        raise PhoenixError(
            f"{where}: {off:,} of its weights are not zero where these masks are; give the model that was pruned to "
            "them, the sparse/ beside masks.safetensors"
        )


def _require_set(masks: Any) -> None:
    """Refuse what is no mapping of tensors, in the place of masks."""
    if isinstance(masks, tuple):
        raise PhoenixError(
            "masks: a tuple was given; of what load_mask gives take the first: masks, facts = load_mask(…)"
        )
    if not isinstance(masks, Mapping):
        raise PhoenixError(
            f"masks: {type(masks).__name__} given; give boolean tensors by layer name, as load_mask reads them"
        )
    wrong = next((name for name, mask in masks.items() if not isinstance(mask, Tensor)), None)
    if wrong is not None:
        raise PhoenixError(f"masks: {wrong} is {type(masks[wrong]).__name__}; give a boolean tensor")


def _check_masks(masks: Masks) -> None:
    _require_set(masks)
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise PhoenixError(f"masks: {name} is {mask.dtype}, not boolean")
        if not mask.numel() or not mask.dim():
            raise PhoenixError(f"masks: {name} has shape {tuple(mask.shape)}; a mask is of at least one weight")
        if not name.isprintable() or not name:
            raise PhoenixError(f"masks: {name!r} is no layer's name")


def _digest(packed: Packed, shapes: Shapes) -> str:
    digest = hashlib.sha256()
    for name in sorted(packed):
        digest.update(f"{name} {tuple(shapes[name])}\n".encode())
        digest.update(packed[name].data)
    return digest.hexdigest()


def _pack(mask: Tensor) -> np.ndarray:
    return np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little")


def _check_size(packed: np.ndarray, shape: Any, where: str) -> None:
    if not (isinstance(shape, list) and shape and all(type(n) is int and n > 0 for n in shape)):
        raise PhoenixError(f"masks: {where} has no valid shape")
    needed = (math.prod(shape) + 7) // 8
    if packed.size != needed:
        raise PhoenixError(f"masks: {where} has not the {needed} bytes that its shape {tuple(shape)} needs")


def _unpack(packed: np.ndarray, shape: list[int], where: str) -> Tensor:
    count = math.prod(shape)
    bits = np.unpackbits(packed, bitorder="little")
    if bits[count:].any():
        raise PhoenixError(f"masks: {where} has bits set beyond its last weight")
    return torch.from_numpy(bits[:count].view(bool)).reshape(shape)
