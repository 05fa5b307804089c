"""Gradients taken block by block against plain autograd through the whole model, in float64."""

import copy

import pytest
import torch
from torch import nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.models import prunable_linears
from phoenix_sparse.pruning import gradients as module
from phoenix_sparse.pruning.blocks import Blocks
from phoenix_sparse.pruning.gradients import COMPLETE, GradientFiles, measure_gradients
from tiny import CONFIGS, make_model


def make_rows(count=4, seed=0):
    """Samples of unlike lengths; the prompt's tokens are not learned."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        ids = torch.randint(0, 256, (7 + 6 * index,), generator=generator).tolist()
        start = 2 + 2 * index
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return rows


def by_autograd(model, rows):
    """|∂L/∂W| averaged over samples, L the mean of -log p over a sample's labelled tokens, written out."""
    model = copy.deepcopy(model).double()
    layers = prunable_linears(model)
    sums = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
        places = [place for place in range(1, len(row["labels"])) if row["labels"][place] != -100]
        loss = -sum(logits[place - 1].log_softmax(-1)[row["labels"][place]] for place in places) / len(places)
        found = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
        for name, gradient in zip(sums, found, strict=True):
            sums[name] += gradient.abs() / len(rows)
    return sums


@pytest.mark.parametrize("kind", CONFIGS)
def test_they_are_those_of_the_whole_model(kind):
    model, rows = make_model(kind), make_rows()
    found = measure_gradients(Blocks(model), rows)
    expected = by_autograd(model, rows)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        assert found[name].device.type == "cpu"
        scale = float(gradient.max())
        torch.testing.assert_close(found[name].double(), gradient, rtol=1e-3, atol=1e-5 * scale)


def test_a_sample_counts_as_one_however_long_it_is():
    model, rows = make_model(), make_rows(2)
    both = measure_gradients(Blocks(model), rows)
    each = [measure_gradients(Blocks(model), [row]) for row in rows]
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, (each[0][name] + each[1][name]) / 2)


def test_samples_without_a_label_are_left_out(llama):
    rows = make_rows(3)
    idle = {"input_ids": [1, 2, 3], "labels": [-100] * 3}
    first = {"input_ids": [1, 2, 3], "labels": [1, -100, -100]}  # nothing precedes the only labelled token
    found = measure_gradients(Blocks(llama), [idle, *rows[:2], first, rows[2]])
    expected = measure_gradients(Blocks(llama), rows)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    for nothing in ([], [idle], [idle, first], [{"input_ids": [], "labels": []}]):
        with pytest.raises(PhoenixError, match="gradients: no example has a completion to learn"):
            measure_gradients(Blocks(llama), nothing)


@pytest.mark.parametrize("no_grad", [False, True])
def test_the_model_stays_as_it_is(llama, no_grad):
    for index, parameter in enumerate(llama.parameters()):
        parameter.requires_grad_(index % 3 != 0)
    flags = [parameter.requires_grad for parameter in llama.parameters()]
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    with torch.set_grad_enabled(not no_grad):
        found = measure_gradients(Blocks(llama), make_rows(2))
    assert [parameter.requires_grad for parameter in llama.parameters()] == flags
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert not any(gradient.requires_grad for gradient in found.values())


def test_flags_come_back_after_an_error(llama, monkeypatch):
    for parameter in llama.parameters():
        parameter.requires_grad_(False)
    blocks = Blocks(llama)

    def broken(*_args, **_kwargs):
        raise RuntimeError("no room")

    monkeypatch.setattr(module.torch.autograd, "grad", broken)
    with pytest.raises(RuntimeError, match="no room"):
        measure_gradients(blocks, make_rows(1))
    monkeypatch.undo()
    block = blocks.blocks[blocks.names[0]]
    hidden = blocks.embed(torch.tensor([[1, 2, 3]]))
    monkeypatch.setattr(module.torch.autograd, "grad", broken)
    with pytest.raises(RuntimeError, match="no room"):
        module._backward(blocks, 0, block, [hidden], [torch.ones_like(hidden)])
    assert not any(parameter.requires_grad for parameter in llama.parameters())


def test_a_linear_that_no_token_passes_has_none(llama):
    """As an expert may have that the router never chose."""
    llama.model.layers[0].idle = nn.Linear(3, 5)
    found = measure_gradients(Blocks(llama), make_rows(2))
    assert torch.equal(found["model.layers.0.idle"], torch.zeros(5, 3))
    assert found["model.layers.0.mlp.up_proj"].any()


def test_gradients_that_are_not_finite_are_refused_by_name(llama):
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(PhoenixError, match="gradients: those of model.layers.1.* are not finite; use dtype=float32"):
        measure_gradients(Blocks(llama), make_rows(2))


def test_files_hold_the_same(llama, tmp_path):
    rows, calls = make_rows(3), []
    files = measure_gradients(
        Blocks(llama), rows, directory=tmp_path / "g", progress=lambda what, done, of: calls.append((what, done, of))
    )
    memory = measure_gradients(Blocks(llama), rows)
    assert isinstance(files, GradientFiles)
    assert set(files) == set(memory)
    assert len(files) == len(memory) == 14
    assert all(torch.equal(files[name], memory[name]) for name in memory)
    assert sorted(path.name for path in (tmp_path / "g").iterdir()) == [
        "complete.json",
        "model.layers.0.safetensors",
        "model.layers.1.safetensors",
    ]
    assert calls == [(what, done, 2) for what in ("running block", "gradients of block") for done in (1, 2)]


def test_finished_files_are_used_again_and_unfinished_ones_are_not(llama, tmp_path, monkeypatch):
    rows, calls = make_rows(3), []
    backward = module._backward
    monkeypatch.setattr(module, "_backward", lambda *given: (calls.append(given[1]), backward(*given))[1])

    def stop(what, done, _of):
        if what == "gradients of block" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_gradients(Blocks(llama), rows, directory=tmp_path, progress=stop)
    assert calls == [1]
    assert not (tmp_path / COMPLETE).exists()
    again = measure_gradients(Blocks(llama), rows, directory=tmp_path)
    assert calls == [1, 1, 0]
    kept = measure_gradients(Blocks(llama), rows, directory=tmp_path)
    assert calls == [1, 1, 0]
    expected = measure_gradients(Blocks(llama), rows)
    for files in (again, kept):
        assert set(files) == set(expected)
        assert all(torch.equal(files[name], expected[name]) for name in expected)


def test_damaged_files_are_told(llama, tmp_path):
    rows = make_rows(1)
    measure_gradients(Blocks(llama), rows, directory=tmp_path)
    file = tmp_path / "model.layers.1.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-40])
    with pytest.raises(PhoenixError, match="model.layers.1.safetensors: the weights can't be loaded"):
        measure_gradients(Blocks(llama), rows, directory=tmp_path)
    file.unlink()
    with pytest.raises(PhoenixError, match="files are missing; remove it, and the gradients are measured anew"):
        measure_gradients(Blocks(llama), rows, directory=tmp_path)
