import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.finetuning import trainer
from phoenix_sparse.finetuning.adapter import ElasticLinear, add_adapter, elastic_layers
from phoenix_sparse.finetuning.elastic import draw, spaces
from phoenix_sparse.finetuning.loop import COMPLETE
from phoenix_sparse.finetuning.settings import FinetuneSettings
from phoenix_sparse.finetuning.trainer import latest_checkpoint, train
from tiny import pruned

ROWS = [{"input_ids": [n % 250, (n * 7) % 250, 3, 4, 5, 6], "labels": [-100, -100, 3, 4, 5, 6]} for n in range(24)]


def settings(**changes):
    base = {"ranks": (4, 2, 1), "epochs": 1, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1}
    return FinetuneSettings(**(base | changes))


def adapter(chosen, seed=0):
    model, masks = pruned()
    return add_adapter(model, rank=chosen.ranks[0], scale=2.0, masks=masks, seed=seed)


def factors(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def trained(work: Path, **changes):
    chosen = settings(**changes)
    model = adapter(chosen)
    record = train(model, ROWS, chosen, pad=256, seed=0, work=work)
    return factors(model), record


def test_the_loss_falls_and_is_recorded(tmp_path):
    _, record = trained(tmp_path, epochs=4, learning_rate=3e-2)
    losses = [entry["loss"] for entry in record["log"]]
    assert len(losses) == record["steps"] == 24
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])
    assert record["examples"] == 96
    assert record["tokens"] == 96 * 6
    assert record["log"][-1]["epoch"] == pytest.approx(4)


def test_a_single_step_trains_and_is_recorded(tmp_path):
    """The learning rate is zero at the first step of a warm-up, and the log looks at one step in ten."""
    found, record = trained(tmp_path, max_steps=1, log_every=10)
    assert [entry["step"] for entry in record["log"]] == [1]
    assert record["log"][0]["learning_rate"] > 0
    assert all(factor.any() for name, factor in found.items() if "lora_B" in name)


def test_weights_do_not_move(tmp_path):
    chosen = settings()
    model = adapter(chosen)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    train(model, ROWS, chosen, pad=256, seed=0, work=tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_the_same_seed_gives_the_same_weights(tmp_path):
    one, two = trained(tmp_path / "1")[0], trained(tmp_path / "2")[0]
    assert same(one, two)


def test_accumulation_gives_the_step_of_the_whole_batch(tmp_path):
    whole, parts = trained(tmp_path / "1")[0], trained(tmp_path / "2", micro_batch_size=1)[0]
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=2e-5)


def test_gradient_checkpointing_gives_the_same_weights(tmp_path):
    """It recomputes the forward pass: with ranks drawn in the forward, as in SQFT, this would not hold."""
    plain, checkpointed = trained(tmp_path / "1")[0], trained(tmp_path / "2", gradient_checkpointing=True)[0]
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 1}, {"gradient_checkpointing": True}])
def test_one_draw_a_step_reaches_every_forward(tmp_path, monkeypatch, options):
    seen = []
    forward = ElasticLinear.forward

    def note(self, *args, **kwargs):
        seen.append((id(self), self.rank))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(ElasticLinear, "forward", note)
    chosen = settings(max_steps=3, **options)
    model = adapter(chosen)
    names = {id(layer): name for name, layer in elastic_layers(model).items()}
    train(model, ROWS, chosen, pad=256, seed=0, work=tmp_path)
    per_step = len(seen) // 3
    assert per_step >= len(names) * (4 if "micro_batch_size" in options else 1)
    for step in range(3):
        expected = draw(spaces(names.values(), chosen.ranks), 0, step)
        for module, rank in seen[step * per_step : (step + 1) * per_step]:
            assert rank == expected[names[module]]


def test_a_resumed_training_ends_in_the_same_weights(tmp_path):
    """The second half of a training is done again from its checkpoint, in a model that knows nothing of the first."""
    whole, _ = trained(tmp_path / "whole", epochs=2, checkpoint_every=5)
    chosen = settings(epochs=2, checkpoint_every=5)
    first = adapter(chosen)
    train(first, ROWS, chosen, pad=256, seed=0, work=tmp_path / "resumed")
    for checkpoint in sorted((tmp_path / "resumed").glob("checkpoint-*"))[1:]:
        (checkpoint / COMPLETE).unlink()  # as a kill while it was being written would leave it
    second = adapter(chosen, seed=9)
    record = train(second, ROWS, chosen, pad=256, seed=0, work=tmp_path / "resumed")
    assert record["resumed_from"] == 10
    assert same(factors(second), whole)


def test_half_written_checkpoints_are_not_used(tmp_path):
    for step, complete in ((5, True), (10, True), (15, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / COMPLETE).write_text("{}")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-15").exists()
    assert latest_checkpoint(tmp_path / "none") is None


def test_a_lost_loss_ends_the_training(tmp_path):
    chosen = settings()
    model = adapter(chosen)
    with torch.no_grad():
        next(iter(elastic_layers(model).values())).lora_A["default"].weight.fill_(float("inf"))
    with pytest.raises(PhoenixError, match=r"the (loss|grad_norm) is nan at step \d; lower finetune.learning_rate"):
        train(model, ROWS, chosen, pad=256, seed=0, work=tmp_path)


def test_factors_that_are_finite_and_whose_product_is_not_are_noticed():
    chosen = settings()
    model = adapter(chosen)
    trainer._require_finite(model, chosen)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.fill_(1e30)
    with pytest.raises(PhoenixError, match=r"effective weight of .* is no longer finite; lower finetune.learning_rate"):
        trainer._require_finite(model, chosen)


def test_a_loss_that_is_lost_between_two_entries_of_the_log_is_noticed(tmp_path):
    with pytest.raises(PhoenixError, match=r"no longer finite after the last step|the (loss|grad_norm) is"):
        trained(tmp_path, learning_rate=1e30, log_every=100)


def test_no_examples_is_an_error(tmp_path):
    chosen = settings()
    with pytest.raises(PhoenixError, match="no training example"):
        train(adapter(chosen), [], chosen, pad=256, seed=0, work=tmp_path)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import torch
from test_trainer import ROWS, adapter, factors, settings
from phoenix_sparse.finetuning.trainer import train
chosen = settings(epochs=40, checkpoint_every=3)
model = adapter(chosen)
train(model, ROWS * 4, chosen, pad=256, seed=0, work=Path(sys.argv[1]) / "work", progress=lambda *_: print(flush=True))
torch.save(factors(model), Path(sys.argv[1]) / "end.pt")
"""


def test_kill_at_any_moment_and_resume(tmp_path):
    """kill -9 at three moments; the weights at the end are those of an undisturbed training."""
    here = str(Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(here).parent), here, *sys.path])}

    def start(directory):
        directory.mkdir(exist_ok=True)
        command = [sys.executable, "-c", SCRIPT, str(directory), here]
        with (directory / "stderr").open("w") as words:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=words, env=environment)

    calm = start(tmp_path / "calm")
    calm.communicate()
    for steps in (5, 40, 25):
        process = start(tmp_path / "killed")
        for _ in range(steps):
            process.stdout.readline()
        time.sleep(0.003 * steps)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed" / "end.pt").exists()
    end = start(tmp_path / "killed")
    end.communicate()
    words = [(tmp_path / name / "stderr").read_text()[-1000:] for name in ("calm", "killed")]
    assert end.returncode == calm.returncode == 0, words
    one, two = (torch.load(tmp_path / name / "end.pt", weights_only=True) for name in ("calm", "killed"))
    assert same(one, two)
