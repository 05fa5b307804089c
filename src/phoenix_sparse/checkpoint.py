"""The tensors of a Hugging Face directory's safetensors files, read by name and with care."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError, first_line
from phoenix_sparse.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@contextmanager
def reading(file: Path) -> Iterator[Any]:
    """Open a safetensors file.

    Raises:
        PhoenixError: it is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as reader:
            yield reader
    except (SafetensorError, OSError) as error:
        raise PhoenixError(f"{file}: the weights can't be loaded ({first_line(error)})") from error


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory: the single one where there is one, or those that its index names.

    Raises:
        PhoenixError: the index is damaged, or names a file outside the directory.
    """
    if (directory / SINGLE).is_file():  # where there are both, as transformers reads them
        return [directory / SINGLE]
    index = directory / INDEX
    listed = read_json(index)
    files = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(files, dict) or not files:
        raise PhoenixError(f"{index}: it has no weight_map from tensors to files; is the download whole?")
    for file in files.values():
        # By the name alone: in the hub's cache the files themselves are links to elsewhere.
        if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\\" in file:
            raise PhoenixError(f"{index}: {file!r} is no name of a file in this directory")
    return [directory / file for file in sorted(set(files.values()))]


class Checkpoint:
    """The tensors of a Hugging Face directory by name, read when asked for.

    Attributes:
        shapes: of every tensor, by name.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file: dict[str, Path] = {}
        for file in weight_files(directory):
            with reading(file) as reader:
                for name in reader.keys():  # noqa: SIM118 (a reader is no mapping)
                    self.shapes[name] = tuple(reader.get_slice(name).get_shape())
                    self._file[name] = file

    def tensors(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Read tensors: `names` says which (values), and what to call them (keys).

        Files are closed again at once, so that no mapping of a file grows with what was read of it.

        Raises:
            PhoenixError: a file is damaged, or a tensor holds NaN or infinite values.
        """
        found = {}
        for file in sorted({self._file[name] for name in names.values()}):
            with reading(file) as reader:
                for key, name in names.items():
                    if self._file[name] == file:
                        found[key] = reader.get_tensor(name)
                        check_finite_tensor(found[key], name, self.directory)
        return found


def check_finite_tensor(value: Tensor, name: str, where: Path | str) -> None:
    """Refuse a tensor with NaN or infinite values, by its name."""
    if not is_finite(value):
        count = int((~torch.isfinite(value)).sum())
        raise PhoenixError(f"{where}: {name} has {count} weights that are NaN or infinite; a model must be finite")


def is_finite(value: Tensor) -> bool:
    """Whether all values are finite. The extremes tell, NaN among them, and are far faster to find on a CPU."""
    if not value.is_floating_point() or value.numel() == 0:
        return True
    return all(math.isfinite(float(extreme)) for extreme in value.detach().aminmax())
