"""Distillation: the losses against small implementations in float64, and a step's gradient however it is cut."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from phoenix_sparse import steps
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.finetuning.adapter import add_adapter
from phoenix_sparse.finetuning.batching import PackRows, training_order
from phoenix_sparse.finetuning.distill import divergence, relative_error, require_alike, token_shares
from phoenix_sparse.finetuning.examples import PadRight
from phoenix_sparse.finetuning.full import train_weights, trained_linears
from phoenix_sparse.finetuning.loop import COMPLETE
from phoenix_sparse.finetuning.sections import DistillSettings
from phoenix_sparse.finetuning.settings import FinetuneSettings
from phoenix_sparse.finetuning.trainer import train
from phoenix_sparse.masks import save_mask
from phoenix_sparse.models import prunable_linears, save_model
from phoenix_sparse.pipeline import open_task
from phoenix_sparse.plan import estimate
from phoenix_sparse.recipe import Recipe, check
from phoenix_sparse.tasks import TaskSettings
from tiny import make_model, pruned

ROWS = [
    {"input_ids": [n % 250, (n * 7) % 250, *range(3, 5 + n % 4)], "labels": [-100, -100, *range(3, 5 + n % 4)]}
    for n in range(12)
]
DISTILL = {"logits": 0.7, "temperature": 2.0, "hidden": 0.3, "task": 0.4}


def chosen(**changes):
    base = {"ranks": (4, 2, 1), "epochs": 1, "batch_size": 4, "learning_rate": 1e-2, "distill": DISTILL, "trackers": []}
    return FinetuneSettings(**(base | changes))


def trained(work, **changes):
    """A tiny training with a teacher of other weights; gives what trained."""
    wanted = chosen(**changes)
    model, masks = pruned()
    if wanted.method == "full":
        model = train_weights(model, masks)
    else:
        model = add_adapter(model, rank=4, scale=2.0, masks=masks, seed=0)
    record = train(model, ROWS, wanted, pad=256, seed=0, work=work, teacher=make_model(seed=3))
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}, record


def close(one, two):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=2e-5)


def reference(student, teacher, rows, weights=DISTILL):
    """The loss of a step, example by example and token by token, in the dtype of the models."""
    total, scored = 0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        ours = student(ids, output_hidden_states=True)
        theirs = teacher(ids, output_hidden_states=True)
        places = [place for place, label in enumerate(row["labels"]) if place and label != -100]
        scored += len(places)
        for place in places:
            s, t = ours.logits[0, place - 1], theirs.logits[0, place - 1].detach()
            total = total - weights["task"] * s.log_softmax(0)[row["labels"][place]]
            p, q = (t / 2.0).softmax(0), (s / 2.0).softmax(0)
            total = total + weights["logits"] * 4.0 * (p * (p.log() - q.log())).sum()
        for layer in range(1, len(ours.hidden_states)):
            s, t = ours.hidden_states[layer][0], theirs.hidden_states[layer][0].detach()
            ratios = [((s[n] - t[n]) ** 2).mean() / (t[n] ** 2).mean() for n in range(len(s))]
            total = total + weights["hidden"] * len(places) * sum(ratios) / len(ratios)
    return total / scored


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.integers(2, 9), st.floats(0.5, 4), st.integers(0, 99))
def test_the_divergence_is_the_sum_written_out(tokens, words, temperature, seed):
    torch.manual_seed(seed)
    s, t = 3 * torch.randn(2, tokens, words)
    total = 0.0
    for one, two in zip(s.double().tolist(), t.double().tolist(), strict=True):
        p, q = (torch.tensor(x, dtype=torch.float64).div(temperature).exp() for x in (two, one))
        p, q = p / p.sum(), q / q.sum()
        total += temperature**2 * float((p * (p / q).log()).sum())
    assert float(divergence(s, t, temperature)) == pytest.approx(total, rel=1e-4, abs=1e-5)
    assert float(divergence(s, s, temperature)) == pytest.approx(0, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 8), st.sampled_from([1.0, 1e3]), st.integers(0, 99))
def test_the_relative_error_and_its_gradient_are_autograd_s(rows, tokens, hidden, size, seed):
    torch.manual_seed(seed)
    s, t, shares = torch.randn(rows, tokens, hidden), size * torch.randn(rows, tokens, hidden), torch.rand(rows, tokens)
    t[..., 0] += 1
    s.requires_grad_()
    (3 * relative_error(s, t, shares)).backward()
    one = s.detach().double().requires_grad_()
    wanted = (((one - t.double()) ** 2).mean(-1) / (t.double() ** 2).mean(-1) * shares.double()).sum()
    (3 * wanted).backward()
    assert float(relative_error(s, t, shares).detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    torch.testing.assert_close(s.grad, one.grad.float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("collate", [PadRight(256), PackRows(256, 16)], ids=["padded", "packed"])
def test_an_example_s_tokens_share_its_weight(collate):
    shares = token_shares(batch := collate(ROWS[:5]))
    scored = sum(label != -100 for row in ROWS[:5] for label in row["labels"])
    assert float(shares.sum()) == pytest.approx(scored)
    assert not shares[batch["input_ids"] == 256].any()
    each = sorted(round(float(value), 5) for value in shares[shares > 0])
    lengths = [(len(row["input_ids"]), len(row["input_ids"]) - 2) for row in ROWS[:5]]
    assert each == sorted(round(count / length, 5) for length, count in lengths for _ in range(length))


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 1}, {"gradient_checkpointing": True}])
def test_a_step_s_gradient_is_that_of_the_loss_written_out_in_float64(tmp_path, monkeypatch, options):
    model, masks = pruned()
    student, teacher = pruned()[0].double(), make_model(seed=3).double()
    reference(student, teacher, ROWS[:4]).backward()
    wanted = {name: (layer.weight.grad * masks[name]).float() for name, layer in prunable_linears(student).items()}
    got = {}

    def stop(self, *_args, **_kwargs):
        got.update({name: layer.weight.grad.clone() for name, layer in trained_linears(self).items()})
        raise KeyboardInterrupt

    model = train_weights(model, masks)
    monkeypatch.setattr("accelerate.Accelerator.clip_grad_norm_", lambda *_args, **_kwargs: stop(model))
    with pytest.raises(KeyboardInterrupt):
        train(
            model,
            ROWS[:4],
            chosen(method="full", **options),
            pad=256,
            seed=0,
            work=tmp_path,
            teacher=make_model(seed=3),
        )
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"micro_batch_size": 1}, {"gradient_checkpointing": True}, {"batching": "packed", "max_length": 16}]
)
def test_however_a_step_is_cut_its_weights_are_the_same(tmp_path, options):
    base = {"learning_rate": 1e-3, "sampling": "sandwich"}  # packing rounds otherwise, and Adam makes much of it
    close(trained(tmp_path / "1", **base)[0], trained(tmp_path / "2", **base, **options)[0])


def parts_of(rows):
    """Cross-entropy, T²·KL and the blocks' errors of a step, from `reference` with one weight at a time."""
    student, teacher = pruned()[0].double(), make_model(seed=3).double()
    return {
        name: float(reference(student, teacher, rows, dict.fromkeys(DISTILL, 0.0) | {name: 1.0}).detach())
        for name in ("task", "logits", "hidden")
    }


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 1}, {"sampling": "sandwich"}])
def test_what_the_loss_is_made_of_is_logged_apart(tmp_path, options):
    """At the first step an adapter adds nothing, whatever its ranks."""
    record = trained(tmp_path, log_every=1, **options)[1]
    assert len(record["log"]) == 3
    for entry in record["log"]:
        total = sum(DISTILL[name] * entry[f"loss_{name}"] for name in ("task", "logits", "hidden"))
        assert total == pytest.approx(entry["loss"], rel=1e-5)
    order = training_order([len(row["input_ids"]) for row in ROWS], chosen(), 0)
    wanted = parts_of([ROWS[index] for index in order[:4]])
    assert {name: record["log"][0][f"loss_{name}"] for name in wanted} == pytest.approx(wanted, rel=1e-4)


def test_an_entry_of_the_log_is_the_mean_of_its_steps(tmp_path):
    each, both = (trained(tmp_path / str(every), epochs=2, log_every=every)[1]["log"] for every in (1, 3))
    assert [entry["step"] for entry in both] == [3, 6]
    for entry, three in zip(both, (each[:3], each[3:]), strict=True):
        for name in ("loss", "loss_task", "loss_logits", "loss_hidden"):
            assert entry[name] == pytest.approx(sum(one[name] for one in three) / 3, rel=1e-5)


def test_a_loss_without_a_weight_is_not_measured(tmp_path):
    (entry, *_) = trained(tmp_path, log_every=1, distill={"hidden": 0.0})[1]["log"]
    assert {name for name in entry if name.startswith("loss_")} == {"loss_task", "loss_logits"}
    (entry, *_) = trained(tmp_path / "plain", log_every=1, distill=None)[1]["log"]
    assert not [name for name in entry if name.startswith("loss_")]


def test_trackers_are_told_the_parts(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model, masks = pruned()
    adapted = add_adapter(model, rank=4, scale=2.0, masks=masks, seed=0)
    wanted = chosen(log_every=1, trackers=["tensorboard"])
    places = {"work": tmp_path / "work", "logs": tmp_path / "logs"}
    record = train(adapted, ROWS, wanted, pad=256, seed=0, teacher=make_model(seed=3), **places)
    read = events.EventAccumulator(str(tmp_path / "logs"))
    read.Reload()
    for name in ("loss_task", "loss_logits", "loss_hidden"):
        told = [one.value for one in read.Scalars(f"train/{name}")]
        assert told == pytest.approx([entry[name] for entry in record["log"]])


def test_a_teacher_teaches(tmp_path):
    """With the loss of the teacher alone, the student comes closer to it, and its record says what it learnt from."""
    before, teacher = pruned()[0], make_model(seed=0)
    model, masks = pruned()
    model = train_weights(model, masks)
    wanted = chosen(method="full", distill={"task": 0.0, "hidden": 1.0}, epochs=20, log_every=1)
    record = train(model, ROWS, wanted, pad=256, seed=0, work=tmp_path, teacher=teacher)
    assert record["distill"]["hidden"] == 1.0
    ids = torch.tensor([ROWS[3]["input_ids"]])

    def distance(one):
        logits = [m(ids).logits[0, 1:].detach() for m in (one, teacher)]
        return float(divergence(*logits, 1.0))

    assert distance(model) < 0.5 * distance(before)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_resumed_training_ends_in_the_same_weights(tmp_path):
    options = {"epochs": 2, "checkpoint_every": 2}
    whole, _ = trained(tmp_path / "whole", **options)
    trained(tmp_path / "resumed", **options)
    for checkpoint in sorted((tmp_path / "resumed").glob("checkpoint-*"))[1:]:
        (checkpoint / COMPLETE).unlink()
    again, record = trained(tmp_path / "resumed", **options)
    assert record["resumed_from"] == 4
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_bfloat16_student_learns(tmp_path):
    model, masks = pruned()
    model = add_adapter(model.bfloat16(), rank=4, scale=2.0, masks=masks, seed=0)
    record = train(
        model,
        ROWS,
        chosen(epochs=6, log_every=1),
        pad=256,
        seed=0,
        work=tmp_path,
        teacher=make_model(seed=0).bfloat16(),
    )
    losses = [entry["loss"] for entry in record["log"]]
    assert losses[-1] < losses[0]


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither logits nor hidden has a weight"):
        DistillSettings(logits=0)
    with pytest.raises(PhoenixError, match="no teacher; give its model"):
        train(pruned()[0], ROWS, chosen(), pad=256, seed=0, work=tmp_path)
    one = LlamaConfig(vocab_size=257, num_hidden_layers=2)
    require_alike(LlamaConfig(vocab_size=257, num_hidden_layers=3), one, DistillSettings(), "there")
    with pytest.raises(PhoenixError, match="there has num_hidden_layers 3 and the model 2"):
        require_alike(LlamaConfig(vocab_size=257, num_hidden_layers=3), one, DistillSettings(hidden=1), "there")
    with pytest.raises(PhoenixError, match="has vocab_size 7 and the model 257"):
        require_alike(LlamaConfig(vocab_size=7), one, DistillSettings(), "there")


def test_a_directory_teaches(tmp_path, tokenizer, task_directory):
    model, masks = pruned()
    save_model(model, tokenizer, tmp_path / "sparse")
    save_model(make_model(), tokenizer, tmp_path / "dense")
    save_mask(masks, tmp_path / "masks.safetensors")
    task = open_task(check(TaskSettings, {"name": str(task_directory)}, "task"), seed=0)
    args = (tmp_path / "sparse", masks, task)
    for teacher, out in ((str(tmp_path / "dense"), "one"), ("dense", "two")):
        wanted = chosen(distill={"teacher": teacher}, max_steps=2, batch_size=10)
        where = (tmp_path / out, steps.Machine(seed=0))
        if out == "one":
            steps.tune(*args, wanted, *where, work=tmp_path / "work")
            assert json.loads((tmp_path / out / "tune.json").read_text())["distill"]["teacher"] == teacher
        else:
            with pytest.raises(PhoenixError, match="dense is known in a run alone"):
                steps.tune(*args, wanted, *where, work=tmp_path / "work")


def test_a_plan_counts_the_teacher_and_the_moving_masks(model_directory, task_directory):
    def planned(**finetune):
        values = {"name": "a", "model": str(model_directory), "task": str(task_directory)}
        values |= {"finetune": {"ranks": [8, 4], "batch_size": 4} | finetune, "evaluate": {"baselines": []}}
        recipe = check(Recipe, values, "test")
        return estimate(recipe, model_directory, open_task(recipe.task, seed=0))

    plain, taught = planned(), planned(distill={"hidden": 1.0})
    weights = 4 * plain["model"]["parameters"]
    assert taught["memory_bytes"]["teacher"] > weights
    assert taught["memory_bytes"]["in all"] == plain["memory_bytes"]["in all"] + taught["memory_bytes"]["teacher"]
    assert taught["training"]["FLOPs of a step"] == pytest.approx(plain["training"]["FLOPs of a step"] * 4 / 3)
    assert (plain["training"]["trainings"], taught["training"]["trainings"]) == (1, 2)
    assert planned(distill={"teacher": "dense"})["training"]["trainings"] == 1
    moving = plain["model"]["prunable"]
    assert planned(evolve={})["memory_bytes"]["evolving masks"] == moving // 8
    assert planned(evolve={}, micro_batch_size=1)["memory_bytes"]["evolving masks"] == moving // 8 + 4 * moving
