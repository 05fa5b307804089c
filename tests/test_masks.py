import io
import json
import pickle
import shutil
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

from phoenix_sparse.errors import CheckFailed, PhoenixError
from phoenix_sparse.masks import (
    apply_masks,
    check_fit,
    compute_sparsity_stats,
    inspect,
    load_mask,
    masks_sha256,
    plot_sparsity_histogram,
    require_preserved,
    save_mask,
    validate_mask,
)
from phoenix_sparse.models import prunable_linears

FORMATS = ["safetensors", "npz", "pt"]
KEY = "phoenix-masks"

shapes = st.lists(st.integers(1, 17), min_size=1, max_size=3)
names = st.text(
    st.characters(codec="utf-8", categories=["L", "N"], include_characters="._-/ "), min_size=1, max_size=20
)
facts = st.dictionaries(
    st.text(max_size=8), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
)


def random_masks(layers, density=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(layer.weight.shape, generator=generator) < density for name, layer in layers.items()}


def few_masks():
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.rand(shape, generator=generator) < 0.5 for name, shape in {"b.0.q": (3, 7), "a": (8, 5)}.items()
    }


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", FORMATS)
@settings(deadline=None)
@given(st.dictionaries(names, shapes, max_size=4), st.floats(0, 1), st.integers(0, 2**31), facts)
def test_masks_come_back_bit_for_bit(tmp_path_factory, kind, layout, density, seed, metadata):
    generator = torch.Generator().manual_seed(seed)
    masks = {name: torch.rand(shape, generator=generator) < density for name, shape in layout.items()}
    path = tmp_path_factory.getbasetemp() / f"m.{kind}"
    digest = save_mask(masks, path, metadata)
    loaded, found = load_mask(path)
    assert same(loaded, masks)
    assert all(mask.dtype == torch.bool for mask in loaded.values())
    assert found == metadata
    assert masks_sha256(loaded) == digest == masks_sha256(masks)


@pytest.mark.parametrize("kind", FORMATS)
def test_equal_masks_give_equal_files(tmp_path, llama, kind):
    masks = random_masks(prunable_linears(llama))
    files = set()
    for count in range(4):
        path = tmp_path / f"{count}.{kind}"
        save_mask(dict(sorted(masks.items(), reverse=count % 2 == 1)), path, {"seed": 0, "kind": "x"})
        files.add(path.read_bytes())
    assert len(files) == 1


def test_the_checksum_is_one_for_all_formats(tmp_path):
    masks = few_masks()
    assert {save_mask(masks, tmp_path / f"m.{kind}") for kind in FORMATS} == {masks_sha256(masks)}
    # Files and adapters of earlier versions carry it: it may not change.
    assert masks_sha256({"a": torch.eye(3, dtype=torch.bool)}).startswith("b4f979310e63")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_weight_takes_one_bit(tmp_path, kind):
    path = tmp_path / f"m.{kind}"
    save_mask({"a": torch.ones(1024, 1024, dtype=torch.bool)}, path)
    assert path.stat().st_size < 1024 * 1024 / 8 + 3000


def test_masks_may_be_views(tmp_path):
    mask = torch.rand(6, 8).t() < 0.5
    for kind in FORMATS:
        save_mask({"a": mask[::2], "b": mask[:1].expand(4, -1)}, tmp_path / f"m.{kind}")
        assert same(load_mask(tmp_path / f"m.{kind}")[0], {"a": mask[::2], "b": mask[:1].expand(4, -1)})


def test_others_can_read_the_files(tmp_path):
    masks = few_masks()
    for kind in ("npz", "pt"):
        save_mask(masks, tmp_path / f"m.{kind}", {"seed": 1})
    plain = torch.load(tmp_path / "m.pt", weights_only=True)
    with np.load(tmp_path / "m.npz") as file:
        header = json.loads(file["phoenix-masks.json"])
        assert header == json.loads(plain[KEY])
        assert header["metadata"] == {"seed": 1}
        for name, mask in masks.items():
            assert (file[name] == plain["masks"][name].numpy()).all()
            bits = np.unpackbits(file[name], bitorder="little")[: mask.numel()]
            assert (bits.reshape(header["shapes"][name]) == mask.numpy()).all()


@pytest.mark.parametrize("name", ["m", "m.bin", "m.safetensor", "m.npz.gz", "m.PT"])
def test_another_suffix_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    for act in (lambda path: save_mask(few_masks(), path), load_mask):
        with pytest.raises(PhoenixError, match=r"\.safetensors, \.npz or \.pt"):
            act(tmp_path / name)
    assert (tmp_path / name).stat().st_size == 0


def test_a_format_may_be_said(tmp_path):
    save_mask(few_masks(), tmp_path / "m.npz", format="npz")
    assert same(load_mask(tmp_path / "m.npz", format="npz")[0], few_masks())
    save_mask(few_masks(), tmp_path / "m", format="pt")
    assert same(load_mask(tmp_path / "m", format="pt")[0], few_masks())
    with pytest.raises(PhoenixError, match="as format 'pt' is no mask file"):
        save_mask(few_masks(), tmp_path / "m.npz", format="pt")
    with pytest.raises(PhoenixError, match="as format 'hdf5' is no mask file"):
        save_mask(few_masks(), tmp_path / "m", format="hdf5")


@pytest.mark.parametrize("kind", FORMATS)
def test_the_old_file_stays_when_the_new_one_can_not_be_written(tmp_path, kind, monkeypatch):
    path = tmp_path / f"m.{kind}"
    save_mask(few_masks(), path)
    before = path.read_bytes()

    def fail(_kind, temporary, _packed, _header):
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("phoenix_sparse.masks.write", fail)
    with pytest.raises(PhoenixError, match="disk is full"):
        save_mask({"x": torch.ones(2, 2, dtype=torch.bool)}, path)
    assert path.read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == [path.name]


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


def test_only_masks_are_saved(tmp_path):
    for masks, message in (
        ({"a": torch.ones(2, 2)}, "not boolean"),
        ({"a": torch.ones(0, 2, dtype=torch.bool)}, "at least one weight"),
        ({"a": torch.tensor(True)}, "at least one weight"),
        ({"a\n": torch.ones(2, dtype=torch.bool)}, "no layer's name"),
    ):
        with pytest.raises(PhoenixError, match=message):
            save_mask(masks, tmp_path / "m.safetensors")
    with pytest.raises(PhoenixError, match="metadata can't be written as JSON"):
        save_mask(few_masks(), tmp_path / "m.pt", {"path": Path("x")})
    assert not list(tmp_path.iterdir())


def test_statistics_and_validation():
    masks = {"a": torch.tensor([[True, False], [False, False]]), "b": torch.tensor([[True, True]])}
    stats = compute_sparsity_stats(masks)
    assert stats["nnz"] == 3
    assert stats["sparsity"] == pytest.approx(0.5)
    assert stats["layers"]["a"] == {"shape": [2, 2], "nnz": 1, "sparsity": 0.75}
    assert stats["per_layer"] == stats["layers"]
    assert stats["global"] == pytest.approx(
        {
            "sparsity": 0.5,
            "num_layers": 2,
            "mean_layer_sparsity": 0.375,
            "std_layer_sparsity": 0.375,
            "min_layer_sparsity": 0,
            "max_layer_sparsity": 0.75,
        }
    )
    json.dumps(stats, allow_nan=False)
    valid, stats = validate_mask(masks, expected_sparsity=0.5)
    assert valid
    assert "error" not in stats
    assert not validate_mask(masks, expected_sparsity=0.6, tolerance=0.05)[0]
    assert not validate_mask(masks, expected_sparsity=float("nan"))[0]
    valid, stats = validate_mask(masks | {"c": torch.zeros(1, 2, dtype=torch.bool)}, 0.625)
    assert not valid
    assert stats["dead_layers"] == ["c"]
    assert stats["error"] == "c keeps nothing"


def test_one_mask_is_validated_as_it_is():
    mask = torch.arange(100).reshape(10, 10) % 2 == 0
    valid, stats = validate_mask(mask, expected_sparsity=0.5, tolerance=0.01)
    assert valid
    assert stats["sparsity"] == 0.5
    assert compute_sparsity_stats(mask)["nnz"] == 50
    valid, stats = validate_mask(mask, expected_sparsity=0.7, tolerance=0.01)
    assert not valid
    assert stats["error"] == "the sparsity is 0.5000, not 0.7000 ± 0.01"
    assert validate_mask(mask)[0]
    assert "not boolean" in validate_mask(mask.float(), 0.5)[1]["error"]
    assert validate_mask({}) == (False, compute_sparsity_stats({}) | {"dead_layers": [], "error": "there are no masks"})


def test_masks_of_another_model_are_refused_by_name(llama):
    layers = prunable_linears(llama)
    masks = random_masks(layers)
    first = next(iter(masks))
    with pytest.raises(PhoenixError, match=f"no mask for {first}"):
        check_fit({name: mask for name, mask in masks.items() if name != first}, layers)
    with pytest.raises(PhoenixError, match=r"other\.q_proj is no prunable linear"):
        check_fit(masks | {"other.q_proj": masks[first]}, layers)
    with pytest.raises(PhoenixError, match="has shape"):
        check_fit(masks | {first: masks[first][:1]}, layers)
    check_fit(masks, layers)


def test_a_filled_zero_is_found(llama):
    layers = prunable_linears(llama)
    masks = random_masks(layers)
    apply_masks(masks, layers)
    report = require_preserved(masks, layers, "model")
    name = "model.layers.1.mlp.up_proj"
    assert report[name]["sparsity"] == pytest.approx(report[name]["mask_sparsity"])
    row, column = (~masks[name]).nonzero()[0].tolist()
    with torch.no_grad():
        layers[name].weight[row, column] = 1e-3
    assert inspect(masks, layers)[name]["off_mask_nonzeros"] == 1
    with pytest.raises(CheckFailed, match=f"1 non-zeros off the mask in 1 of 14 layers, {name}"):
        require_preserved(masks, layers, "model")


def test_a_kept_weight_may_be_zero(llama):
    layers = prunable_linears(llama)
    masks = {name: torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in layers.items()}
    with torch.no_grad():
        layers["model.layers.0.mlp.up_proj"].weight[0, 0] = 0
    report = require_preserved(masks, layers, "model")
    assert report["model.layers.0.mlp.up_proj"]["nnz"] == masks["model.layers.0.mlp.up_proj"].numel() - 1


def test_the_histogram_is_a_picture(tmp_path, llama):
    plot_sparsity_histogram(random_masks(prunable_linears(llama)), save_path=tmp_path / "h.png")
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")


def test_a_directory_in_the_place_of_masks_is_named_for_what_it_is(tmp_path, model_directory):
    expected = "and masks are one file; give the one that pruning wrote, such as"
    with pytest.raises(PhoenixError) as error:
        load_mask(model_directory)
    assert str(error.value) == f"masks: {model_directory} is a model's directory, {expected} masks.safetensors"
    run = tmp_path / "run"
    shutil.copytree(model_directory, run / "sparse")
    save_mask(few_masks(), run / "masks.safetensors")
    for place, kind in ((run, "a directory"), (run / "sparse", "a model's directory")):
        with pytest.raises(PhoenixError) as error:
            load_mask(place)
        assert str(error.value) == f"masks: {place} is {kind}, {expected} {run / 'masks.safetensors'}"
