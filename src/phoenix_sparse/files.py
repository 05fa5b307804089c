"""The ground floor: atomic writes, hashes, checked reads.

Everything is written under a temporary name beside its target, flushed to the disk and renamed, so that a kill
or a full disk leaves the old file or the new one, never a half. (A directory that replaces another takes two renames:
a kill just between them leaves neither, and the step is done again.)
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phoenix_sparse.errors import PhoenixError


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Give a temporary path beside `target`, which takes its name when the block ends well.

    The path may be made a file or a directory. An existing directory at `target` is replaced as a whole.

    Raises:
        PhoenixError: the disk is full, or the place can't be written.
    """
    target = Path(target)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        _replace(temporary, target)
    except OSError as error:
        raise _readable(error, target, "it can't be written; give another place") from error
    except BaseException as error:
        if disk_is_full(error):
            raise PhoenixError(f"{target}: the disk is full; free some space, then run the same again") from error
        raise
    finally:
        _remove(temporary)


def write_text(target: Path, text: str) -> None:
    if Path(target).is_dir():  # which would be replaced, with all that lies in it
        raise PhoenixError(f"{target}: a directory, and what is written is a file; give a file's name")
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any) -> None:
    """Write JSON in a fixed form (sorted keys, no NaN), so that equal values give equal bytes."""
    write_text(target, json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        PhoenixError: it is missing or isn't JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise _readable(error, path, "is its directory whole, and the right one?") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PhoenixError(f"{path}: not a JSON file ({error})") from error


def parse_yaml(text: str) -> Any:
    """Read YAML in which `2:4` is a text, as somebody wrote it.

    YAML 1.1, which the library follows, reads it as a number of base 60, 124; YAML 1.2 has no such numbers any more.

    Raises:
        yaml.YAMLError: it is not YAML.
        ValueError: a date that there isn't.
        RecursionError: it is nested too deeply.
    """
    import yaml

    return yaml.load(text, Loader=_yaml_loader())


@functools.cache
def _yaml_loader() -> Any:
    import yaml

    numbers = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")

    class Loader(yaml.SafeLoader):
        """Knows no numbers of base 60."""

        def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
            tag = super().resolve(kind, value, implicit)
            return self.DEFAULT_SCALAR_TAG if tag in numbers and ":" in value else tag

    return Loader


def read_text(path: Path, field: str) -> str:
    """Read a text file that a setting names.

    Raises:
        PhoenixError: it is missing or isn't UTF-8, with the setting's name.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PhoenixError(
            f"{field}: {path} can't be read ({error.__class__.__name__}); give a UTF-8 text file"
        ) from error


def sha256(path: Path) -> str:
    """Hash a file, or a directory as the hash of its files' relative names and hashes."""
    path = Path(path)
    if path.is_dir():
        listing = "".join(
            f"{sha256(child)}  {child.relative_to(path).as_posix()}\n"
            for child in sorted(path.rglob("*"))
            if child.is_file()
        )
        return hashlib.sha256(listing.encode()).hexdigest()
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise _readable(error, path, "give a file or directory that is there") from error


def inside(directory: Path, name: str) -> Path:
    """Resolve `name` below `directory`; a name that leaves it is refused (files name other files)."""
    path = (directory / name).resolve()
    if not path.is_relative_to(directory.resolve()):
        raise PhoenixError(f"{directory}: the file name {name!r} leads out of the directory")
    return path


def disk_is_full(error: BaseException) -> bool:
    """Say whether an error means a full disk; safetensors and torch wrap the operating system's in their own types."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    texts = ("No space left on device", "StorageFull", "Disk quota exceeded", "PytorchStreamWriter failed writing")
    return any(text in str(error) for text in texts)


def _readable(error: OSError, path: Path, instead: str) -> PhoenixError:
    if disk_is_full(error):
        return PhoenixError(f"{path}: the disk is full; free some space, then run the same again")
    return PhoenixError(f"{path}: {error.strerror or error}; {instead}")


def _sync(path: Path) -> None:
    """Flush files to the disk, with the permissions that the umask gives (safetensors makes its own private)."""
    umask = os.umask(0)
    os.umask(umask)
    for file in [child for child in path.rglob("*") if child.is_file()] if path.is_dir() else [path]:
        file.chmod(0o666 & ~umask)
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(temporary: Path, target: Path) -> None:
    if target.is_dir():
        # A directory can't be replaced by one rename: the old one steps aside first.
        aside = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
        target.rename(aside)
        temporary.rename(target)
        shutil.rmtree(aside)
    else:
        temporary.replace(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
