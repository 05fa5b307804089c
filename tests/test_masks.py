"""Masks saved, read again, measured and held against a model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
from some_masks import FORMATS, KEY, few_masks, random_masks, same

shapes = st.lists(st.integers(1, 17), min_size=1, max_size=3)
names = st.text(
    st.characters(codec="utf-8", categories=["L", "N"], include_characters="._-/ "), min_size=1, max_size=20
)
facts = st.dictionaries(
    st.text(max_size=8), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
)


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


@pytest.mark.parametrize("tenths", [0, 5, 7, 10])
def test_layers_stand_at_their_sparsity_in_the_histogram(tmp_path, monkeypatch, tenths):
    from matplotlib.axes import Axes

    drawn, draw = [], Axes.hist
    monkeypatch.setattr(Axes, "hist", lambda *given, **options: drawn.append(draw(*given, **options)))
    mask = torch.arange(1000).reshape(10, 100) >= 100 * tenths - 1  # a weight less than asked for
    plot_sparsity_histogram({"one": mask, "two": mask}, tmp_path / "h.png")
    ((_, _, bars),) = drawn
    (bar,) = [bar for bar in bars if bar.get_height()]
    assert bar.get_x() + bar.get_width() / 2 == pytest.approx(tenths / 10)


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
