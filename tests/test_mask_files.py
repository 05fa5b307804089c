"""Mask files that are not as they should be: damaged, made up, or meant to do harm."""

import io
import json
import pickle
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.masks import load_mask, save_mask
from some_masks import FORMATS, KEY, few_masks, same


@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_is_refused(tmp_path, kind):
    path = tmp_path / f"m.{kind}"
    save_mask(few_masks(), path, {"seed": 0})
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(PhoenixError, match="masks: "):
            load_mask(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_flipped_byte_is_refused_or_harmless(tmp_path, kind):
    path = tmp_path / f"m.{kind}"
    save_mask(few_masks(), path)
    whole, messages = path.read_bytes(), []
    for place in range(0, len(whole), 1 if kind == "safetensors" else 3):
        for bits in (0x01, 0xFF):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ bits]) + whole[place + 1 :])
            try:
                assert same(load_mask(path)[0], few_masks())
            except PhoenixError as error:
                messages.append(str(error))
    assert messages
    assert not [text for text in messages if "\n" in text or "weights_only" in text]


@settings(deadline=None)
@given(
    st.sampled_from(FORMATS), st.binary(max_size=300), st.sampled_from([b"", b"PK\x03\x04", b"PK\x05\x06", b"\x80\x02"])
)
def test_noise_is_refused(tmp_path_factory, kind, noise, start):
    path = tmp_path_factory.getbasetemp() / f"noise.{kind}"
    path.write_bytes(start + noise)
    with pytest.raises(PhoenixError, match="masks: "):
        load_mask(path)


def test_what_is_no_mask_file_is_told_so(tmp_path):
    with pytest.raises(PhoenixError, match="not a file"):
        load_mask(tmp_path / "none.npz")
    save_file({"a": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "m.safetensors")
    np.savez(tmp_path / "m.npz", a=np.zeros(3, np.uint8))
    torch.save({"masks": {"a": torch.ones(3, 8, dtype=torch.bool)}, "metadata": {}}, tmp_path / "m.pt")
    for kind in FORMATS:
        with pytest.raises(PhoenixError, match="not a mask file"):
            load_mask(tmp_path / f"m.{kind}")
        save_mask(few_masks(), tmp_path / f"m.{kind}")
    (tmp_path / "m.npz").rename(tmp_path / "n.pt")
    with pytest.raises(PhoenixError, match="damaged"):
        load_mask(tmp_path / "n.pt")


def header_of(path: Path) -> dict:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()[KEY])
    if path.suffix == ".npz":
        with np.load(path) as file:
            return json.loads(file["phoenix-masks.json"])
    return json.loads(torch.load(path, weights_only=True)[KEY])


def npy(array) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array)
    return stream.getvalue()


def archive(path: Path, members, compression=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two of one name
        for name, content in members:
            file.writestr(name, content)


def rewrite(path: Path, header: dict, packed: dict | None = None) -> None:
    """A mask file with another header, and maybe other tensors, written without the code under test."""
    text = json.dumps(header)
    if path.suffix == ".safetensors":
        save_file(packed or load_file(path), path, metadata={KEY: text})
    elif path.suffix == ".npz":
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files if name != "phoenix-masks.json"}
        arrays = {name: part.numpy() for name, part in packed.items()} if packed else arrays
        archive(path, [("phoenix-masks.json", text), *((f"{name}.npy", npy(part)) for name, part in arrays.items())])
    else:
        torch.save({KEY: text, "masks": packed or torch.load(path, weights_only=True)["masks"]}, path)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "shape", [[3, 9], [-3, -8], [3, 8.0], [True, 24], [], "x", None, 24, [10**12, 10**12], [2**64 + 24], [[3, 8]]]
)
def test_shapes_that_do_not_fit_are_refused(tmp_path, kind, shape):
    path = tmp_path / f"m.{kind}"
    save_mask({"a": torch.ones(3, 8, dtype=torch.bool)}, path)
    header = header_of(path)
    rewrite(path, header)
    assert load_mask(path)[0]["a"].all()
    rewrite(path, header | {"shapes": {"a": shape}})
    with pytest.raises(PhoenixError, match="masks:"):
        load_mask(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_headers_and_tensors_that_do_not_fit_are_refused(tmp_path, kind):
    path = tmp_path / f"m.{kind}"
    save_mask({"a": torch.ones(3, 7, dtype=torch.bool)}, path)
    header, digest = header_of(path), header_of(path)["sha256"]
    changes: list = [{"version": "2"}, {"shapes": {}}, {"shapes": {"b": [3, 7]}}, {"metadata": 3}, {"sha256": None}]
    changes += [{"sha256": digest[::-1]}, {"shapes": {"a": [7, 3]}}]
    for change in changes:
        rewrite(path, header | change)
        with pytest.raises(PhoenixError, match="masks:"):
            load_mask(path)
    for text in ([], None, 3, "x"):
        rewrite(path, text)
        with pytest.raises(PhoenixError, match="masks:"):
            load_mask(path)
    for part in (
        torch.full((3,), 255, dtype=torch.uint8),  # bits beyond the last weight
        torch.ones(3),
        torch.ones(3, dtype=torch.int8),
        torch.ones(3, 1, dtype=torch.uint8),
        torch.ones(4, dtype=torch.uint8),
        torch.tensor(1, dtype=torch.uint8),
    ):
        rewrite(path, header, {"a": part})
        with pytest.raises(PhoenixError, match="masks:"):
            load_mask(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_padding_is_checked_beside_the_checksum(tmp_path, kind):
    """A file with its padding set and the checksum to fit: two files of one mask would have two checksums."""
    import hashlib

    path = tmp_path / f"m.{kind}"
    save_mask({"a": torch.ones(3, 7, dtype=torch.bool)}, path)
    digest = hashlib.sha256(b"a (3, 7)\n" + b"\xff" * 3).hexdigest()
    rewrite(path, header_of(path) | {"sha256": digest}, {"a": torch.full((3,), 255, dtype=torch.uint8)})
    with pytest.raises(PhoenixError, match="beyond its last weight"):
        load_mask(path)


class Malice:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_never_run(tmp_path):
    trace = tmp_path / "trace"
    header = json.dumps({"version": "1", "shapes": {"a": [1]}, "sha256": "", "metadata": {}})
    for content in ({KEY: header, "masks": {"a": Malice(trace)}}, Malice(trace)):
        torch.save(content, tmp_path / "m.pt")
        with pytest.raises(PhoenixError, match="never loaded"):
            load_mask(tmp_path / "m.pt")
        torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
        with pytest.raises(PhoenixError, match="damaged"):
            load_mask(tmp_path / "m.pt")
    array = np.array([Malice(trace)], dtype=object)
    for member in (npy(array), pickle.dumps(Malice(trace))):
        archive(tmp_path / "m.npz", [("phoenix-masks.json", header), ("a.npy", member)])
        with pytest.raises(PhoenixError, match="masks:"):
            load_mask(tmp_path / "m.npz")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Malice(trace)))
    assert trace.exists(), "the trap itself works"


@pytest.mark.parametrize("kind", ["npz", "pt"])
def test_compressed_archives_are_refused_unread(tmp_path, kind):
    path = tmp_path / f"m.{kind}"
    save_mask({"a": torch.zeros(4096, 4096, dtype=torch.bool)}, path)
    with zipfile.ZipFile(path) as file:
        members = [(entry.filename, file.read(entry)) for entry in file.infolist()]
    archive(path, members, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 20_000
    with pytest.raises(PhoenixError, match="is compressed"):
        load_mask(path)


def test_members_larger_than_the_file_are_refused(tmp_path):
    """Entries of the central directory that share their bytes: much out of little, without compression."""
    path, name = tmp_path / "m.npz", "a.npy"
    content = npy(np.zeros(100_000, np.uint8))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, content)
        file.filelist += [file.filelist[0]] * 50
        file._didModify = True
    assert path.stat().st_size < 110_000
    with pytest.raises(PhoenixError, match="larger than the file"):
        load_mask(path)
    archive(path, [(name, content)] * 2)
    with pytest.raises(PhoenixError, match="two members"):
        load_mask(path)


def test_an_array_larger_than_its_member_is_refused(tmp_path):
    header = json.dumps({"version": "1", "shapes": {"a": [8 * 10**15]}, "sha256": "", "metadata": {}})
    start = npy(np.zeros(1, np.uint8))[:-1]
    for shape in ("(1000000000000000,)", "(10000000,)"):
        length = struct.unpack("<H", start[8:10])[0]
        text = "{'descr': '|u1', 'fortran_order': False, 'shape': " + shape + ", }"
        forged = start[:10] + text.ljust(length - 1).encode() + b"\n"
        archive(tmp_path / "m.npz", [("phoenix-masks.json", header), ("a.npy", forged)])
        with pytest.raises(PhoenixError, match="not the bytes of a mask"):
            load_mask(tmp_path / "m.npz")


def test_tensors_larger_than_their_storage_are_refused(tmp_path):
    """Strides of 0 make any size of one byte; so do many layers over one storage."""
    path = tmp_path / "m.pt"
    save_mask({"a": torch.ones(8, dtype=torch.bool)}, path)
    header = header_of(path)
    one = torch.ones(1, dtype=torch.uint8).expand(10**14)
    rewrite(path, header | {"shapes": {"a": [8 * 10**14]}}, {"a": one})
    with pytest.raises(PhoenixError, match="not the bytes of a mask"):
        load_mask(path)
    whole = torch.zeros(100_000, dtype=torch.uint8)
    rewrite(path, header | {"shapes": {f"{n}": [800_000] for n in range(20)}}, {f"{n}": whole for n in range(20)})
    assert path.stat().st_size < 110_000
    with pytest.raises(PhoenixError, match="the same bytes"):
        load_mask(path)
    place, value = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.uint8)
    sparse = torch.sparse_coo_tensor(place, value, (10**12,), check_invariants=True)
    for part in (sparse, torch.empty(10**12, dtype=torch.uint8, device="meta"), torch.nn.Parameter(torch.ones(1))):
        torch.save({KEY: json.dumps(header), "masks": {"a": part}}, path)
        with pytest.raises(PhoenixError, match="masks:"):
            load_mask(path)
