"""A mask that evolves: the same sparsity, every zero kept, the same end after a kill, and files that fit together."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from phoenix_sparse import pipeline
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_json
from phoenix_sparse.finetuning.adapter import add_adapter, elastic_layers, load_adapter, save_adapter
from phoenix_sparse.finetuning.evolve import (
    Evolution,
    exchange,
    moving_masks,
    require_change,
    require_unstructured,
    share_at,
)
from phoenix_sparse.finetuning.full import train_weights, trained_linears
from phoenix_sparse.finetuning.loop import COMPLETE
from phoenix_sparse.finetuning.sections import EvolveSettings
from phoenix_sparse.finetuning.settings import FinetuneSettings
from phoenix_sparse.finetuning.trainer import train
from phoenix_sparse.masks import load_mask, masks_sha256
from phoenix_sparse.models import load_model, prunable_linears
from phoenix_sparse.pruning.initialise import prune
from phoenix_sparse.pruning.settings import SparsifySettings
from phoenix_sparse.recipe import Recipe, check
from tiny import make_model, pruned

ROWS = [{"input_ids": [n % 250, (n * 7) % 250, 3, 4, 5, 6], "labels": [-100, -100, 3, 4, 5, 6]} for n in range(24)]
EVOLVE = {"every": 2, "fraction": 0.3, "until": 1.0}


def chosen(**changes):
    base = {"ranks": (4, 2, 1), "epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1}
    return FinetuneSettings(**(base | {"evolve": EVOLVE, "trackers": [], "checkpoint_every": 3} | changes))


def trained(work, dtype=torch.float32, **changes):
    """A tiny training; gives the model, the pruning's masks, the masks at the end, and the record."""
    wanted = chosen(**changes)
    model, masks = pruned()
    model = model.to(dtype)
    if wanted.method == "full":
        model = learner = train_weights(model, masks)
    else:
        model = add_adapter(model, rank=4, scale=2.0, masks=masks, seed=0)
        learner = model.get_base_model()
    record = train(model, ROWS, wanted, pad=256, seed=0, work=work, validation=ROWS[:6])
    return model, masks, {name: one.mask.clone() for name, one in moving_masks(learner).items()}, record


def trained_values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.floats(0, 0.5), st.booleans(), st.integers(0, 999))
def test_an_exchange_takes_the_least_and_gives_where_the_gradient_is_largest(rows, columns, density, share, by, seed):
    torch.manual_seed(seed)
    mask, weight, gradient = torch.rand(rows, columns) < density, *torch.randn(2, rows, columns)
    drop = "sensitivity" if by else "magnitude"
    after = exchange(mask, weight, gradient, share, drop)
    assert after.sum() == mask.sum()
    lost, won = mask & ~after, after & ~mask
    assert lost.sum() == min(round(share * int(mask.sum())), int((~mask).sum()))
    score = (weight * gradient if by else weight).abs()
    if lost.any():
        assert score[lost].max() <= score[mask & after].min() if (mask & after).any() else True
        assert (~mask & ~after).sum() == 0 or gradient[won].abs().min() >= gradient[~mask & ~after].abs().max()


def test_nothing_grows_without_a_gradient():
    mask, gradient = torch.tensor([[True, True, False, False]]), torch.tensor([[1.0, 2.0, 0.0, 3.0]])
    after = exchange(mask, torch.ones(1, 4), gradient, 0.9, "sensitivity")
    assert after.tolist() == [[False, True, False, True]]


def test_the_share_falls_to_nothing():
    wanted = EvolveSettings(every=10, fraction=0.2, until=0.5)
    shares = [share_at(wanted, step, 100) for step in range(101)]
    assert [step for step, share in enumerate(shares) if share] == [10, 20, 30, 40]
    assert shares[10] == pytest.approx(0.1 * (1 + math.cos(math.pi / 5)))
    assert shares[10] > shares[20] > shares[30] > shares[40] > 0


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 1}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_first_change_is_the_one_that_the_whole_step_s_gradient_asks_for(tmp_path, method, options):
    """Against autograd on the effective weights in float64, and an exchange written out with sorting."""
    wanted = {"max_steps": 2, "method": method, "ranks": (4,), "learning_rate": 1e-12, "evolve": EVOLVE | {"every": 1}}
    _, masks, after, record = trained(tmp_path, **wanted, **options)
    assert [change["step"] for change in record["changes"]] == [1]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:4].tolist()
    ids, labels = (torch.tensor([ROWS[index][key] for index in order]) for key in ("input_ids", "labels"))
    reference = copy.deepcopy(pruned()[0]).double()
    functional.cross_entropy(
        reference(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    ).backward()
    for name, layer in prunable_linears(reference).items():
        mask, gradient = masks[name].flatten().tolist(), layer.weight.grad.flatten().tolist()
        score = (layer.weight * layer.weight.grad).abs().flatten().tolist()
        kept = [place for place, here in enumerate(mask) if here]
        count = round(share_at(EvolveSettings(**EVOLVE | {"every": 1}), 1, 2) * len(kept))
        out = sorted(kept, key=lambda place: score[place])[:count]
        grown = sorted((p for p, here in enumerate(mask) if not here), key=lambda place: -abs(gradient[place]))[:count]
        wanted_mask = (set(kept) - set(out)) | set(grown)
        got = set(after[name].flatten().nonzero().flatten().tolist())
        assert len(got ^ wanted_mask) <= 4, name  # float32 may see two at the threshold the other way round
        assert len(got - set(kept)) == count > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("method", "options"), [("lora", {}), ("lora", {"sampling": "sandwich"}), ("full", {"weight_decay": 0.1})]
)
def test_the_sparsity_stays_and_what_is_off_the_mask_is_zero(tmp_path, method, dtype, options):
    model, masks, after, record = trained(tmp_path, dtype, method=method, **options)
    assert [change["step"] for change in record["changes"]] == [2, 4, 6, 8, 10]
    start = prunable_linears(pruned()[0].to(dtype))
    layers = trained_linears(model) if method == "full" else elastic_layers(model)
    for name, layer in layers.items():
        assert after[name].sum() == masks[name].sum()
        moved = int((after[name] & ~masks[name]).sum())
        assert moved > 20
        if method == "full":
            assert not layer.weight[~after[name]].any()
            assert (layer.weight != 0)[after[name] & ~masks[name]].float().mean() > 0.9
        else:
            assert torch.equal(layer.weight, start[name].weight * after[name])  # the mask alone says what the base is
            assert not layer.merged_weight()[~after[name]].any()
            assert (layer.merged_weight() != 0)[after[name] & ~masks[name]].float().mean() > 0.9
    if method == "full":
        state = torch.load(tmp_path / "checkpoint-12" / "optimizer.pt", weights_only=True)["state"]
        for name, moments in zip(layers, state.values(), strict=True):
            assert not moments["exp_avg"][~after[name]].any()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_mask_that_is_chosen_after_the_backward_pass_is_the_one_chosen_within(tmp_path, monkeypatch, method):
    """As where several processes add up a step's gradient: by the weights that it belongs to, not by those after it."""
    options = {"method": method, "learning_rate": 0.1, "warmup": 0}
    within = trained(tmp_path / "within", **options)[2]
    watch = Evolution.watch
    monkeypatch.setattr(Evolution, "watch", lambda self, done, *, last: watch(self, done, last=False))
    after = trained(tmp_path / "after", **options)[2]
    assert all(torch.equal(within[name], after[name]) for name in within)


@pytest.mark.parametrize("options", [{}, {"method": "full"}, {"sampling": "sandwich", "micro_batch_size": 2}])
def test_a_resumed_training_ends_in_the_same_weights_and_masks(tmp_path, options):
    one, _, masks, record = trained(tmp_path / "whole", **options)
    trained(tmp_path / "resumed", **options)
    for kept in (1, 0):  # gone on with from step 9 and, again, from step 3 or 6 and whatever that wrote
        for checkpoint in sorted((tmp_path / "resumed").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))[kept:]:
            (checkpoint / COMPLETE).unlink()
        two, _, again, second = trained(tmp_path / "resumed", **options)
        assert second["changes"] == record["changes"]
        assert all(torch.equal(masks[name], again[name]) for name in masks)
        weights = trained_values(one), trained_values(two)
        assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
        assert second["resumed_from"] == (9 if kept else None)


def test_the_best_weights_come_with_their_mask(tmp_path):
    """The loss rises from the middle on; what is kept is the state of the best step, mask and all."""
    options = {"validate_every": 1, "learning_rate": 0.3, "warmup": 0, "schedule": "constant_with_warmup"}
    model, masks, after, record = trained(tmp_path, **options)
    best = record["validation"]["best_step"]
    assert best < 12
    start = prunable_linears(pruned()[0])
    changed = sum(change["step"] <= best for change in record["changes"])
    for name, layer in elastic_layers(model).items():
        assert torch.equal(layer.weight, start[name].weight * after[name])
        assert torch.equal(after[name], masks[name]) == (changed == 0)


def test_a_full_memory_begins_the_step_s_gradient_anew(tmp_path, monkeypatch):
    """The same masks as with small parts from the beginning, which have the same sums in the same order."""
    from phoenix_sparse.finetuning import loop

    calm = trained(tmp_path / "calm", micro_batch_size=2)[2]
    step, failed = loop.Trainer.training_step, []

    def full(self, model, inputs, items=None):
        loss = step(self, model, inputs, items)
        if self.state.global_step == 1 and not failed:  # the step after which the mask changes
            failed.append(1)
            raise torch.OutOfMemoryError
        return loss

    monkeypatch.setattr(loop.Trainer, "training_step", full)
    *_, masks, record = trained(tmp_path / "full")
    assert record["out_of_memory"] == [{"step": 1, "micro_batch_size": 2}]
    different = sum(int((masks[name] != calm[name]).sum()) for name in masks)
    assert different <= 0.01 * sum(mask.numel() for mask in masks.values())


def test_an_adapter_is_loaded_onto_the_pruned_model_under_its_mask(tmp_path):
    model, masks, after, _ = trained(tmp_path / "work")
    ids = torch.arange(20).reshape(2, 10)
    save_adapter(model, tmp_path / "adapter", after, evolved=True)
    again = load_adapter(pruned()[0], tmp_path / "adapter", after)
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(PhoenixError, match="trained through other masks"):
        load_adapter(pruned()[0], tmp_path / "adapter", masks)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "structured", "16x1"])
def test_patterns_are_refused(pattern):
    masks = prune(make_model(), SparsifySettings(importance="magnitude", pattern=pattern), tokens=None, seed=0)
    with pytest.raises(PhoenixError, match="the masks follow a pattern"):
        require_unstructured(masks)
    require_unstructured(pruned()[1])


@pytest.mark.parametrize("changes", [{"method": "hira"}, {"mode": "sparse_to_dense"}])
def test_what_does_not_go_together_is_refused(changes):
    with pytest.raises(ValueError, match="evolve: the update has to be zero off the mask"):
        chosen(**changes)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_with_a_teacher_and_an_evolving_mask(tmp_path, model_directory, task_directory, method):
    """The pipeline: the teacher is trained first, the last mask is what the files and the certificate go by."""
    values = {
        "name": "evolving",
        "model": str(model_directory),
        "task": str(task_directory),
        "sparsify": {"importance": "magnitude", "sparsity": 0.6},
        "finetune": {
            **{"ranks": [4, 2], "max_steps": 4, "batch_size": 10, "learning_rate": 0.01, "method": method},
            **{"max_length": 32, "trackers": [], "evolve": EVOLVE | {"every": 1}, "distill": {"hidden": 0.1}},
        },
        "search": {"bounds": False, "hill_climb": 1},
        "evaluate": {"batch_size": 20, "baselines": ["pruned"], "dense_lora_learning_rate": 0.01},
    }
    out = pipeline.run(check(Recipe, values, "test"), tmp_path / "run")
    stages = list(read_json(out / "manifest.json")["stages"])
    assert stages.index("baseline dense_lora") < stages.index("finetune")
    certificate = read_json(out / "certificate.json")
    first, last = (load_mask(out / f"{name}.safetensors")[0] for name in ("masks", "masks_evolved"))
    assert certificate["off_mask_nonzeros"] == 0
    assert certificate["max_abs_logit_difference"] < 1e-4
    assert certificate["masks_sha256"] == masks_sha256(last) != masks_sha256(first)
    for name, layer in prunable_linears(load_model(out / "merged")).items():
        assert last[name].sum() == first[name].sum()
        assert not layer.weight[~last[name]].any()
        assert layer.weight[last[name] & ~first[name]].any()
    assert read_json(out / "tune.json")["distill"]["teacher"] == "dense_lora"


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"sparsify": {"pattern": "2:4"}, "finetune": {"evolve": {}}}, "which would break sparsify.pattern=2:4"),
        (
            {"finetune": {"evolve": {}}},
            "evolve.every: 100 steps, and the mask stays from .* would never change",
        ),
        ({"finetune": {"evolve": {"every": 9, "until": 0.9}, "max_steps": 10}}, "from step 9 of 10 on"),
        ({"finetune": {"distill": {"teacher": "nowhere"}}}, "nowhere is no directory; give dense_lora"),
        (
            {"finetune": {"distill": {}, "method": "full"}},
            "evaluate.dense_lora_learning_rate: the dense LoRA is an adapter",
        ),
    ],
)
def test_a_recipe_is_told_before_the_work(model_directory, task_directory, section, words):
    values = {"name": "wrong", "model": str(model_directory), "task": str(task_directory)} | section
    with pytest.raises(PhoenixError, match=words):
        pipeline.prepare(check(Recipe, values, "test"))


@given(every=st.integers(1, 40), until=st.floats(0.01, 1), steps=st.integers(1, 40))
def test_a_mask_that_would_never_change_is_refused(every, until, steps):
    settings = EvolveSettings(every=every, until=until)
    if any(share_at(settings, step, steps) for step in range(steps + 1)):
        require_change(settings, steps)
    else:
        with pytest.raises(PhoenixError, match=r"finetune.evolve.every: .* it would never change; lower every"):
            require_change(settings, steps)
