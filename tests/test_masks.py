import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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


def random_masks(layers, density=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(layer.weight.shape, generator=generator) < density for name, layer in layers.items()}


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**31))
def test_masks_come_back_bit_for_bit(tmp_path_factory, rows, columns, density, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    path = tmp_path_factory.getbasetemp() / "m.safetensors"
    digest = save_mask({"a.b": mask, "c": ~mask}, path, {"seed": seed})
    masks, metadata = load_mask(path)
    assert set(masks) == {"a.b", "c"}
    assert torch.equal(masks["a.b"], mask)
    assert torch.equal(masks["c"], ~mask)
    assert metadata == {"seed": seed}
    assert masks_sha256(masks) == digest


def test_equal_masks_give_equal_files(tmp_path, llama):
    masks = random_masks(prunable_linears(llama))
    files = set()
    for count in range(8):
        save_mask(dict(sorted(masks.items(), reverse=count % 2 == 1)), tmp_path / "m", {"seed": 0, "kind": "x"})
        files.add((tmp_path / "m").read_bytes())
    assert len(files) == 1


def test_a_weight_takes_one_bit(tmp_path):
    save_mask({"a": torch.ones(1024, 1024, dtype=torch.bool)}, tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_size < 1024 * 1024 / 8 + 2000


def test_damage_is_told_in_one_line(tmp_path, llama):
    path = tmp_path / "m.safetensors"
    save_mask(random_masks(prunable_linears(llama)), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PhoenixError, match="damaged or truncated"):
        load_mask(path)
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(PhoenixError, match="checksum|beyond"):
        load_mask(path)
    with pytest.raises(PhoenixError, match="not a file"):
        load_mask(tmp_path / "none")
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(PhoenixError, match="not a mask file"):
        load_mask(path)


@pytest.mark.parametrize("shape", [[3, 9], [-3, -8], [3, 8.0], [], "x", [10**12, 10**12]])
def test_shapes_that_do_not_fit_are_refused(tmp_path, shape):
    path = tmp_path / "m.safetensors"
    save_mask({"a": torch.ones(3, 8, dtype=torch.bool)}, path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["phoenix-masks"])
    save_file(load_file(path), path, metadata={"phoenix-masks": json.dumps(header | {"shapes": {"a": shape}})})
    with pytest.raises(PhoenixError, match="masks:"):
        load_mask(path)


def test_only_booleans_are_masks(tmp_path):
    with pytest.raises(PhoenixError, match="not boolean"):
        save_mask({"a": torch.ones(2, 2)}, tmp_path / "m.safetensors")


def test_statistics_and_validation():
    masks = {"a": torch.tensor([[True, False], [False, False]]), "b": torch.tensor([[True, True]])}
    stats = compute_sparsity_stats(masks)
    assert stats["nnz"] == 3
    assert stats["sparsity"] == pytest.approx(0.5)
    assert stats["layers"]["a"] == {"shape": [2, 2], "nnz": 1, "sparsity": 0.75}
    assert validate_mask(masks, expected_sparsity=0.5)[0]
    assert not validate_mask(masks, expected_sparsity=0.6, tolerance=0.05)[0]
    valid, stats = validate_mask(masks | {"c": torch.zeros(1, 2, dtype=torch.bool)}, 0.625)
    assert not valid
    assert stats["dead_layers"] == ["c"]


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
    plot_sparsity_histogram(random_masks(prunable_linears(llama)), tmp_path / "h.png")
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
