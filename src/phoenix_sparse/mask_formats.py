"""The three files that packed masks lie in: safetensors, npz and pt, each a JSON header and one byte array a layer.

Files come from anywhere. None is unpickled into anything but plain tensors and strings, and nothing is unpacked that
claims to be larger than the file it lies in.
"""

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError

Kind = Literal["safetensors", "npz", "pt"]
Packed = Mapping[str, np.ndarray]  # by layer name: uint8 (bytes,)

KEY = "phoenix-masks"  # the header's name in each of them
NPZ_HEADER = f"{KEY}.json"  # beside NAME.npy, so that no layer's name can be the header's


def kind_of(path: Path, given: str | None = None) -> Kind:
    """The format that a path's suffix says, or `given` where the path has none.

    Raises:
        PhoenixError: it is none of the three, or the suffix and `given` are two of them.
    """
    suffix = path.suffix.lstrip(".")
    kind = given or suffix
    for known in get_args(Kind):
        if kind == known and suffix in ("", known):
            return known
    said = f"{path} as format {given!r}" if given else str(path)
    raise PhoenixError(f"masks: {said} is no mask file; its name ends in .safetensors, .npz or .pt")


def write(kind: Kind, path: Path, packed: Packed, header: str) -> None:
    """Write a file: the same content gives the same bytes (pt: under the same version of torch)."""
    packed = dict(sorted(packed.items()))
    if kind == "safetensors":
        from safetensors.torch import save_file

        # One entry of metadata: safetensors writes several in random order.
        save_file({name: torch.from_numpy(part) for name, part in packed.items()}, path, metadata={KEY: header})
    elif kind == "npz":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            _add(archive, NPZ_HEADER, header.encode())
            for name, part in packed.items():
                stream = io.BytesIO()
                np.lib.format.write_array(stream, part, version=(1, 0), allow_pickle=False)
                _add(archive, f"{name}.npy", stream.getbuffer())
    else:
        # Into a stream: into a path, torch writes the path's name as well, and that of a temporary file is random.
        with path.open("wb") as file:
            torch.save({KEY: header, "masks": {name: torch.from_numpy(part) for name, part in packed.items()}}, file)


def read(kind: Kind, path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """Read a file's header ("{}" where it has none) and its arrays, each uint8 (bytes,).

    Raises:
        PhoenixError: what lies there can't be masks. Damage raises whatever the format's library raises.
    """
    header, packed = {"safetensors": _read_safetensors, "npz": _read_npz, "pt": _read_pt}[kind](path)
    if sum(part.nbytes for part in packed.values()) > path.stat().st_size:
        raise PhoenixError(f"masks: {path} is no mask file: several of its layers lie in the same bytes")
    return header, packed


def _read_safetensors(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = (file.metadata() or {}).get(KEY, "{}")
        names = file.keys()
        return header, {name: _bytes(file.get_tensor(name), f"{path}: {name}") for name in names}


def _read_npz(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    with zipfile.ZipFile(path) as archive:
        names = _check_stored(archive, path)
        header = archive.read(NPZ_HEADER).decode() if NPZ_HEADER in names else "{}"
        arrays = [name for name in names if name.endswith(".npy")]
        return header, {
            name.removesuffix(".npy"): _array(archive.read(name), f"{path}: {name.removesuffix('.npy')}")
            for name in arrays
        }


def _read_pt(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    with zipfile.ZipFile(path) as archive:
        _check_stored(archive, path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message says how to load it all the same, which is the last thing to do.
        raise PhoenixError(
            f"masks: {path} is damaged, or holds pickled objects, which could run code and are never loaded"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get(KEY), str):
        return "{}", {}
    return content[KEY], {name: _bytes(part, f"{path}: {name}") for name, part in dict(content["masks"]).items()}


def _add(archive: zipfile.ZipFile, name: str, content: Any) -> None:
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))  # no time, no machine: equal masks, equal bytes
    entry.create_system, entry.external_attr = 3, 0o644 << 16
    with archive.open(entry, "w", force_zip64=True) as member:
        member.write(content)


def _check_stored(archive: zipfile.ZipFile, path: Path) -> list[str]:
    """Refuse an archive that could grow when it is read; give its members' names."""
    entries = archive.infolist()
    if archive.comment or any(entry.flag_bits & 1 for entry in entries):
        raise PhoenixError(f"masks: {path} is no mask file: its archive is encrypted or has a comment")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in entries):
        raise PhoenixError(
            f"masks: {path} is compressed, and mask files are not (a small one could unpack into any size); "
            "write it with save_mask"
        )
    # Members that overlap are the other way to make much of little.
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise PhoenixError(f"masks: {path} is damaged: its members are larger than the file")
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names):
        raise PhoenixError(f"masks: {path} is no mask file: its archive has two members of one name")
    return names


def _array(content: bytes, where: str) -> np.ndarray:
    """The bytes of an npy file, without a copy and without a pickle."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise PhoenixError(f"masks: {where} is npy of version {version}, and masks are 1.0")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype != np.dtype(np.uint8) or shape != (len(content) - stream.tell(),):
        raise PhoenixError(f"masks: {where} is {dtype} {shape}, not the bytes of a mask")
    return np.frombuffer(content, np.uint8, offset=stream.tell())


def _bytes(part: Any, where: str) -> np.ndarray:
    # A tensor that isn't contiguous may be larger than its storage (strides of 0).
    plain = type(part) is Tensor and part.dtype == torch.uint8 and part.layout == torch.strided
    if not plain or part.device.type != "cpu" or part.dim() != 1 or not part.is_contiguous():
        raise PhoenixError(f"masks: {where} is not the bytes of a mask")
    return part.numpy()
