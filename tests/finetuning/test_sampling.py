"""The ranks that a step draws reach its forward and backward passes, whatever lies between them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.finetuning.adapter import ElasticLinear, add_super_adapter, elastic_layers, set_ranks
from phoenix_sparse.finetuning.batching import shares
from phoenix_sparse.finetuning.elastic import draw, largest, sandwich, spaces
from phoenix_sparse.finetuning.examples import PadRight
from phoenix_sparse.finetuning.settings import FinetuneSettings
from phoenix_sparse.finetuning.trainer import train
from phoenix_sparse.models import prunable_linears
from tiny import make_model, pruned

ROWS = [
    {"input_ids": [n % 250, (n * 7) % 250, *range(3, 5 + n % 3)], "labels": [-100, -100, *range(3, 5 + n % 3)]}
    for n in range(24)
]
RANKS = {"q_proj": (6, 3), "mlp.*": (5, 2), "*": (4, 2, 1)}
# name -> changes of the settings; each is trained alone, and by two processes
DISTRIBUTED = {
    "uniform": {"max_steps": 4},
    "sandwich": {"max_steps": 3, "sampling": "sandwich", "scale_rule": "alpha_over_rank"},
    "distill": {"max_steps": 3, "distill": {"hidden": 0.5, "temperature": 2.0}},
    "evolve": {"max_steps": 4, "evolve": {"every": 2, "fraction": 0.3, "until": 1.0}},
    "checkpointing": {"max_steps": 2, "sampling": "sandwich", "gradient_checkpointing": True, "method": "hira"},
}


def losses_of(record):
    """The losses of a training's log, by name: the whole, and its parts where there is a teacher."""
    return [{name: entry[name] for name in entry if name.startswith("loss")} for entry in record["log"]]


def settings(**changes):
    base = {"ranks": RANKS, "epochs": 1, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1}
    return FinetuneSettings(**(base | changes))


def adapter(chosen):
    model, masks = pruned()
    space = spaces(prunable_linears(model), chosen.ranks)
    return add_super_adapter(
        model, space, scale=2.0, masks=masks, seed=0, method=chosen.method, scale_rule=chosen.scale_rule
    )


def factors(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def trained(work: Path, **changes):
    """Train a tiny adapter; give its factors, its record, and the first layer's ranks in the order of its forwards."""
    chosen, seen = settings(**changes), list[int]()
    model = adapter(chosen)
    first = next(iter(elastic_layers(model).values()))
    first.register_forward_pre_hook(lambda layer, _: seen.append(layer.rank))
    teacher = make_model(seed=3) if chosen.distill is not None else None
    record = train(model, ROWS, chosen, pad=256, seed=0, work=work, teacher=teacher)
    if chosen.evolve is not None:  # the masks of every process, as numbers
        return {n: layer.mask.float() for n, layer in elastic_layers(model).items()} | factors(model), record, seen
    return factors(model), record, seen


def close(one, two, rtol=1e-4, atol=2e-6):
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 1}, {"gradient_checkpointing": True}])
def test_a_sandwich_s_three_reach_every_forward(tmp_path, monkeypatch, options):
    """In order: for each micro-batch the largest, the smallest and the step's draw, recomputations included."""
    seen = []
    forward = ElasticLinear.forward

    def note(self, *args, **kwargs):
        seen.append((id(self), self.rank))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(ElasticLinear, "forward", note)
    chosen = settings(max_steps=3, sampling="sandwich", **options)
    model = adapter(chosen)
    names = {id(layer): name for name, layer in elastic_layers(model).items()}
    train(model, ROWS, chosen, pad=256, seed=0, work=tmp_path)
    micro_batches = chosen.batch_size // chosen.micro_batch
    passes = 2 if chosen.gradient_checkpointing else 1
    one = len(names) * passes
    assert len(seen) == 3 * micro_batches * 3 * one
    space = spaces(names.values(), RANKS)
    for place in range(0, len(seen), one):
        step, which = place // (one * 3 * micro_batches), place // one % 3
        expected = sandwich(space, 0, step)[which]
        assert all(rank == expected[names[module]] for module, rank in seen[place : place + one])
        assert {module for module, _ in seen[place : place + one]} == names.keys()


def mean_gradients(model, batches, choices):
    """Gradients of the mean loss over all tokens and sub-adapters, with one backward pass."""
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    total = torch.zeros(())
    for batch in batches:
        for ranks in choices:
            set_ranks(model, ranks)
            total = total + model(**batch, num_items_in_batch=tokens).loss / len(choices)
    total.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("sampling", ["uniform", "sandwich"])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
def test_a_step_s_gradient_is_the_mean_over_its_sub_adapters(tmp_path, monkeypatch, sampling, micro_batch_size):
    got = {}

    def stop(self, *_args, **_kwargs):
        # The Trainer has the model inside PEFT's.
        prefix = "base_model.model."
        got.update({prefix + n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None})
        raise KeyboardInterrupt

    chosen = settings(sampling=sampling, micro_batch_size=micro_batch_size)
    model = adapter(chosen)
    torch.manual_seed(1)
    for layer in elastic_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    monkeypatch.setattr(
        "phoenix_sparse.finetuning.trainer.training_order", lambda *_: list(range(4))
    )  # one step, of the first rows
    monkeypatch.setattr("transformers.Trainer._clip_grad_norm", lambda self, model: stop(model))
    with pytest.raises(KeyboardInterrupt):
        train(model, ROWS, chosen, pad=256, seed=0, work=tmp_path)
    model.zero_grad()
    space = spaces(elastic_layers(model), RANKS)
    choices = sandwich(space, 0, 0) if sampling == "sandwich" else [draw(space, 0, 0)]
    close(mean_gradients(model, [PadRight(256)(ROWS[:4])], choices), got, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 1}, {"gradient_checkpointing": True}])
def test_a_resumed_sandwich_ends_in_the_same_weights(tmp_path, options):
    whole, _, seen = trained(tmp_path, sampling="sandwich", checkpoint_every=4, **options)
    (tmp_path / "checkpoint-6").rename(tmp_path.parent / f"{tmp_path.name}-end")
    again, record, resumed = trained(tmp_path, sampling="sandwich", checkpoint_every=4, **options)
    assert record["resumed_from"] == 4
    assert resumed == seen[-len(resumed) :]
    assert len(resumed) == len(seen) // 3
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_micro_batches_and_recomputation_give_the_same_sandwich(tmp_path):
    whole = trained(tmp_path / "0", sampling="sandwich")[0]
    close(whole, trained(tmp_path / "1", sampling="sandwich", gradient_checkpointing=True)[0], rtol=1e-5, atol=1e-7)
    close(whole, trained(tmp_path / "2", sampling="sandwich", micro_batch_size=1)[0], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["lora", "hira"])
def test_recomputation_has_the_ranks_of_its_forward(reentrant, method):
    """The settings reach non-reentrant checkpointing alone; the layers must not mind which."""
    batch = PadRight(256)(ROWS[:6])

    def gradients(model, between=None):
        """The gradients of all passes of a step, and of one whose ranks change before its backward pass."""
        model.train()
        space = spaces(elastic_layers(model), RANKS)
        for step in range(2):
            for ranks in sandwich(space, 0, step):
                set_ranks(model, ranks)
                loss = model(**batch, use_cache=False).loss
                if between is not None:
                    set_ranks(model, between(space))
                loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def model_with(checkpointing):
        model = adapter(settings(method=method))
        torch.manual_seed(1)
        for layer in elastic_layers(model).values():
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        return model

    plain = gradients(model_with(False))
    close(plain, gradients(model_with(True)), rtol=1e-5, atol=1e-7)
    if reentrant:  # the other kind notices by itself that it saves tensors of other shapes
        wrong = gradients(model_with(True), between=largest)
        assert any((plain[name] - wrong[name]).abs().max() > 1e-3 for name in plain)


def test_two_processes_train_the_adapter_of_one(tmp_path):
    """Over gloo, with half of every batch each and two micro-batches a step: the same adapter in both, as if alone."""
    here = Path(__file__).parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(here / "two_processes.py"), str(tmp_path)]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    common |= {"PYTHONPATH": os.pathsep.join([str(here.parent), str(here), *sys.path]), "CUDA_VISIBLE_DEVICES": ""}
    processes = []
    for rank in ("0", "1"):
        environment = os.environ | common | {"RANK": rank, "LOCAL_RANK": rank}
        with (tmp_path / f"{rank}.txt").open("w") as words:
            processes.append(subprocess.Popen(command, env=environment, stdout=words, stderr=words))
    alone = {name: trained(tmp_path / "alone" / name, **changes) for name, changes in DISTRIBUTED.items()}
    codes = [process.wait(timeout=120) for process in processes]
    assert codes == [0, 0], [(tmp_path / f"{rank}.txt").read_text()[-2000:] for rank in (0, 1)]
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, (expected, record, seen) in alone.items():
        assert all(torch.equal(one[name]["factors"][key], two[name]["factors"][key]) for key in expected)
        if name == "evolve":  # sums of two halves round otherwise, which may move a weight at the threshold
            for key in pruned()[1]:
                assert (expected[key] != pruned()[1][key].float()).sum() > 20
                assert (expected[key] != one[name]["factors"][key]).sum() <= 6
        else:
            close(expected, one[name]["factors"], rtol=1e-3, atol=2e-5)
        for told, wanted in zip(one[name]["losses"], losses_of(record), strict=True):
            assert told == pytest.approx(wanted, rel=1e-3)
            assert len(told) == (4 if name == "distill" else 1)  # and what it is made of
        assert one[name]["seen"] == two[name]["seen"]
        assert set(one[name]["seen"]) == set(seen)
        assert len(one[name]["seen"]) == 2 * len(seen)  # two micro-batches


def test_processes_share_a_batch_evenly():
    assert shares(settings(batch_size=32), 1) == (32, 1)
    assert shares(settings(batch_size=32), 4) == (8, 1)
    assert shares(settings(batch_size=32, micro_batch_size=4), 2) == (4, 4)
    for changes, processes in (({"batch_size": 6, "micro_batch_size": 2}, 2), ({"batch_size": 4}, 3), ({}, 8)):
        with pytest.raises(PhoenixError, match=f"finetune.batch_size: {processes} processes with"):
            shares(settings(**changes), processes)
