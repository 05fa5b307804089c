"""Masked full fine-tuning: zeros stay zeros, the gradient is the masked one, and what is saved is what was trained."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from phoenix_sparse import steps
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.finetuning.full import (
    WEIGHTS,
    TrainedLinear,
    is_full,
    load_weights,
    save_weights,
    train_weights,
    trained_linears,
)
from phoenix_sparse.finetuning.loop import COMPLETE
from phoenix_sparse.finetuning.settings import FinetuneSettings
from phoenix_sparse.finetuning.trainer import train
from phoenix_sparse.masks import save_mask
from phoenix_sparse.models import load_model, prunable_linears, save_model
from phoenix_sparse.pipeline import open_task
from phoenix_sparse.recipe import check
from phoenix_sparse.tasks import TaskSettings
from tiny import CONFIGS, pruned

ROWS = [{"input_ids": [n % 250, (n * 7) % 250, 3, 4, 5, 6], "labels": [-100, -100, 3, 4, 5, 6]} for n in range(24)]


def settings(**changes):
    base = {"method": "full", "epochs": 1, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "trackers": []}
    return FinetuneSettings(**(base | changes))


def trained(work, dtype=torch.float32, **changes):
    model, masks = pruned()
    model = train_weights(model.to(dtype), masks, changes.get("targets"))
    record = train(model, ROWS, settings(**changes), pad=256, seed=0, work=work)
    return model, masks, record


def weights(model):
    return {name: layer.weight.detach().clone() for name, layer in trained_linears(model).items()}


def test_a_step_is_that_of_adamw_on_the_masked_gradient_in_float64(tmp_path):
    """An independent small implementation: autograd in float64, AdamW written out, clipping by the masked norm."""
    model, masks = pruned()
    reference = copy.deepcopy(model).double()
    chosen = settings(max_steps=3, weight_decay=0.1, warmup=0, schedule="constant_with_warmup", max_grad_norm=0.7)
    model = train_weights(model, masks)
    start = {name: layer.weight.detach().double() for name, layer in trained_linears(model).items()}
    train(model, ROWS[:4], chosen, pad=256, seed=0, work=tmp_path)  # every step has the same four examples
    layers = prunable_linears(reference)
    state = {name: (torch.zeros_like(weight), torch.zeros_like(weight)) for name, weight in start.items()}
    ids, labels = (torch.tensor([row[key] for row in ROWS[:4]]) for key in ("input_ids", "labels"))
    for step in range(1, 4):
        reference.zero_grad()
        logits = reference(ids).logits[:, :-1].flatten(0, 1)
        functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100).backward()
        gradients = {name: layer.weight.grad * masks[name] for name, layer in layers.items()}
        norm = sum((gradient**2).sum() for gradient in gradients.values()).sqrt()
        for name, gradient in gradients.items():
            gradient = gradient * min(1.0, 0.7 / (norm + 1e-6))
            one, two = state[name]
            one.mul_(0.9).add_(0.1 * gradient)
            two.mul_(0.999).add_(0.001 * gradient**2)
            weight = layers[name].weight.data
            weight.mul_(1 - 1e-2 * 0.1)
            weight -= 1e-2 * (one / (1 - 0.9**step)) / ((two / (1 - 0.999**step)).sqrt() + 1e-8)
    for name, weight in weights(model).items():
        assert (weight != start[name]).any()
        # Adam divides by a root of the gradient's square: where that is next to nothing, rounding is all there is.
        close = torch.isclose(weight.double(), layers[name].weight, rtol=1e-3, atol=1e-5)
        assert close.float().mean() > 0.995


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True, "micro_batch_size": 1}])
def test_zeros_stay_zeros_and_all_else_stays_frozen(tmp_path, dtype, options):
    before = {name: p.detach().clone() for name, p in pruned()[0].to(dtype).named_parameters()}
    model, masks, record = trained(tmp_path, dtype, weight_decay=0.3, epochs=2, **options)
    layers = trained_linears(model)
    assert set(layers) == set(masks)
    for name, layer in layers.items():
        assert layer.weight.dtype == torch.float32
        assert not layer.weight[~masks[name]].any()
        assert not layer.rounded[~masks[name]].any()
        assert (layer.weight != before[f"{name}.weight"])[masks[name]].float().mean() > 0.9
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(parameter, before[name])
    state = torch.load(sorted(tmp_path.glob("checkpoint-*"))[-1] / "optimizer.pt", weights_only=True)["state"]
    for name, moments in zip(layers, state.values(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert not moments[key][~masks[name]].any()
            assert moments[key][masks[name]].any()
    assert record["trainable_parameters"] == sum(int(mask.sum()) for mask in masks.values())
    losses = [entry["loss"] for entry in record["log"]]
    assert losses[-1] < losses[0]


def test_a_float32_master_learns_what_bfloat16_weights_would_round_away(tmp_path):
    """Steps of 1e-5 are below bfloat16's resolution of a weight of 0.1, and add up all the same."""
    model, _masks, _ = trained(tmp_path, torch.bfloat16, learning_rate=1e-5, schedule="constant_with_warmup", epochs=5)
    before = prunable_linears(pruned()[0].to(torch.bfloat16))
    moved = [(layer.weight - before[name].weight.float()).abs().max() for name, layer in trained_linears(model).items()]
    assert 1e-4 < max(moved) < 1e-3
    changed = sum(int((layer.rounded != before[name].weight).sum()) for name, layer in trained_linears(model).items())
    assert changed > 100


def test_a_resumed_training_ends_in_the_same_weights(tmp_path):
    options = {"epochs": 2, "checkpoint_every": 5, "weight_decay": 0.1}
    whole = weights(trained(tmp_path / "whole", **options)[0])
    trained(tmp_path / "resumed", **options)
    for checkpoint in sorted((tmp_path / "resumed").glob("checkpoint-*"))[1:]:
        (checkpoint / COMPLETE).unlink()
    again, masks, record = trained(tmp_path / "resumed", **options)
    assert record["resumed_from"] == 10
    for name, weight in weights(again).items():
        assert torch.equal(weight, whole[name])
        assert not weight[~masks[name]].any()


def test_only_targets_train(tmp_path):
    model, _masks, record = trained(tmp_path, targets=("q_proj", "down_proj"), max_steps=1)
    assert {name.rsplit(".", 1)[-1] for name in trained_linears(model)} == {"q_proj", "down_proj"}
    assert record["trainable_parameters"] == sum(int(layer.mask.sum()) for layer in trained_linears(model).values())
    with pytest.raises(PhoenixError, match="no linear is called w_proj"):
        train_weights(*pruned(), ("w_proj",))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_trained_linear_computes_as_the_one_it_was(kind):
    model, masks = pruned(kind)
    ids = torch.arange(20).reshape(2, 10)
    before = model.to(torch.bfloat16)(ids).logits
    assert torch.equal(train_weights(model, masks)(ids).logits, before)


def test_a_linear_s_gradient_is_autograd_s_under_the_mask():
    torch.manual_seed(0)
    linear, mask = torch.nn.Linear(7, 5), torch.rand(5, 7) > 0.5
    layer = TrainedLinear(linear, mask)
    x, grad = torch.randn(3, 4, 7, requires_grad=True), torch.randn(3, 4, 5)
    layer(x).backward(grad)
    got = (x.grad.clone(), layer.weight.grad)
    x.grad = None
    weight = (linear.weight.detach() * mask).requires_grad_()
    (x @ weight.t() + linear.bias.detach()).backward(grad)
    torch.testing.assert_close(got[0], x.grad)
    torch.testing.assert_close(got[1], weight.grad * mask)


def test_what_is_saved_is_checked_when_loaded(tmp_path):
    model, masks, _ = trained(tmp_path / "work", torch.bfloat16, max_steps=2)
    ids = torch.arange(20).reshape(2, 10)
    logits = model(ids).logits
    place = tmp_path / "trained"
    save_weights({name: layer.rounded for name, layer in trained_linears(model).items()}, place, masks)
    assert is_full(place)
    base = pruned()[0].to(torch.bfloat16)
    assert torch.equal(load_weights(base, place, masks)(ids).logits, logits)

    with pytest.raises(PhoenixError, match="does not fit this model"):
        load_weights(pruned()[0], place, masks)  # float32
    with pytest.raises(PhoenixError, match="give its masks.safetensors"):
        load_weights(base, place, None)
    with pytest.raises(PhoenixError, match="trained through other masks"):
        load_weights(base, place, {name: ~mask for name, mask in masks.items()})
    tensors = load_file(place / WEIGHTS)
    name = next(iter(tensors))
    tensors[name] = torch.ones_like(tensors[name])
    save_file(tensors, place / WEIGHTS)
    with pytest.raises(PhoenixError, match="has non-zeros off its mask"):
        load_weights(base, place, masks)
    (place / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(PhoenixError, match="can't be loaded"):
        load_weights(base, place, masks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_steps_on_files(tmp_path, tokenizer, task_directory, dtype):
    model, masks = pruned()
    save_model(model.to(getattr(torch, dtype)), tokenizer, tmp_path / "sparse")
    save_mask(masks, tmp_path / "masks.safetensors")
    task = open_task(check(TaskSettings, {"name": str(task_directory)}, "task"), seed=0)
    machine = steps.Machine(seed=0)
    chosen = settings(max_steps=3, batch_size=10, weight_decay=0.1)
    from phoenix_sparse.evaluation.settings import EvaluateSettings
    from phoenix_sparse.finetuning.settings import SearchSettings

    work = tmp_path / "work"
    steps.tune(tmp_path / "sparse", masks, task, chosen, tmp_path, machine, work=work)
    super_adapter = tmp_path / "adapter" / "super"
    args = (SearchSettings(), EvaluateSettings(), tmp_path, machine)
    steps.search(tmp_path / "sparse", masks, task, super_adapter, *args, work=work)
    search = json.loads((tmp_path / "search.json").read_text())
    assert len(search["candidates"]) == 1
    assert search["candidates"][0]["parameters"] == sum(int(mask.sum()) for mask in masks.values())
    assert search["method"] == "none (method full has no ranks)"
    steps.merge(tmp_path / "sparse", masks, tmp_path / "adapter/chosen", tmp_path, machine, texts=["1+2=3", "4"])
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    assert certificate["off_mask_nonzeros"] == certificate["max_abs_logit_difference"] == 0
    assert certificate["dtype"] == dtype
    merged, before = (prunable_linears(load_model(tmp_path / name)) for name in ("merged", "sparse"))
    assert all((merged[name].weight != before[name].weight).any() for name in merged)
    with pytest.raises(PhoenixError, match="method: full trains under masks"):
        steps.tune(tmp_path / "sparse", None, task, chosen, tmp_path, machine, work=work)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "sparse_to_dense"}, "full trains the kept weights and no others"),
        ({"sampling": "sandwich"}, "sandwich draws ranks, and method: full has none"),
        ({"patience": 2}, "nothing is validated; set validate_every too"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        settings(**changes)
