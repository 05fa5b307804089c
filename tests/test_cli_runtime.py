"""phx pack, unpack, generate and bench, as a user chains them."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from phoenix_sparse import cli, demo, training_speed
from phoenix_sparse.errors import PhoenixError


def phx(*arguments: object):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned")
    done = phx("prune", "demo", "--out", out, "--importance", "magnitude", "--sparsity", 0.6, "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    return out / "sparse"


def test_pack_and_unpack(sparse, tmp_path):
    done = phx("pack", sparse, "--out", tmp_path / "packed")
    assert done.exit_code == 0, done.output
    assert "40.0% of their weights kept" in done.output
    assert phx("unpack", tmp_path / "packed", "--out", tmp_path / "back").exit_code == 0
    for file in sparse.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("values", ["auto", "int8"])
def test_a_packed_model_writes_text(sparse, tmp_path, values):
    assert phx("pack", sparse, "--out", tmp_path / "packed", "--values", values).exit_code == 0
    done = phx("generate", tmp_path / "packed", "Ben has 3 red hats.", "--max-new-tokens", 8)
    assert done.exit_code == 0, done.output
    if values == "auto":
        assert done.stdout == phx("generate", sparse, "Ben has 3 red hats.", "--max-new-tokens", 8).stdout


def test_bench_writes_its_record(sparse, tmp_path):
    options = ["--batch", 1, "--prompt", 8, "--tokens", 2, "--repeats", 2]
    done = phx("bench", sparse, *options, "--layers", "--out", tmp_path / "bench.json")
    assert done.exit_code == 0, done.output
    assert "sparse / dense" in done.output
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["weight_bytes"]["sparse"] < record["weight_bytes"]["dense"]
    assert record["host"]["cores"] > 0
    assert "training" not in record


def test_bench_s_threads_are_those_of_training_too(sparse, monkeypatch):
    def measured(*_: object, **__: object) -> None:
        raise PhoenixError(f"{torch.get_num_threads()} threads")

    monkeypatch.setattr(training_speed, "measure_training", measured)
    before = torch.get_num_threads()
    try:
        assert str(phx("bench", sparse, "--training", "--threads", before + 1).exception) == f"{before + 1} threads"
    finally:
        torch.set_num_threads(before)


def test_bench_measures_training(sparse, tmp_path):
    options = ["--batch", 2, "--prompt", 8, "--tokens", 2, "--repeats", 2]
    done = phx("bench", sparse, *options, "--training", "--out", tmp_path / "bench.json")
    assert done.exit_code == 0, done.output
    assert "fine-tuning, LoRA of rank 32 on all linears" in done.output
    (row,) = json.loads((tmp_path / "bench.json").read_text())["training"]
    for way in ("dense", "masked"):
        found = row["samples_per_second"][way]
        assert 0 < found["low"] <= found["median"] <= found["high"]
        assert row["tokens_per_second"][way]["median"] == pytest.approx(8 * found["median"])


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("pack", "nowhere/at-all/x", "--out", "OUT"), "is not a directory"),
        (("pack", "MODEL", "--out", "OUT", "--values", "int4"), "--values: 'int4' is none of auto, bf16, int8"),
        (("unpack", "MODEL", "--out", "OUT"), "not a packed model"),
        (("generate", "nowhere/at-all/x", "Hello"), "is not a directory"),
        (("generate", "MODEL", ""), "the prompt is empty"),
        (("generate", "MODEL", "Hello", "--prefill", "fast"), "'fast' is none of packed, dense, semi, auto"),
        (("generate", "MODEL", "Hello", "--prefill", "dense"), "isn't packed, and multiplies densely as it is"),
        (
            ("bench", "MODEL", "--prefill", "semi", "--device", "cpu"),
            "copies are for GPUs, and this is cpu; give packed or auto",
        ),
        (("bench", "DENSE", "--training"), "has no zeros to train through"),
        (("flops", "llama-3-8b", "--sparsity", 1.5), "give a share from 0 to below 1"),
        (("flops", "llama-3-9b"), "is not a directory"),
        (("bench", "DENSE"), "prune it first"),
        (("bench", "MODEL", "--batch", 0), "give 1 or more"),
        (("bench", "MODEL", "--prompt", 100000), "more than the model's context"),
    ],
)
def test_bad_input_is_refused(sparse, tmp_path, arguments, what):
    places = {"MODEL": sparse, "OUT": tmp_path / "out", "DENSE": demo.model_directory()}
    done = phx(*(places.get(argument, argument) if isinstance(argument, str) else argument for argument in arguments))
    assert done.exit_code != 0
    assert what in str(done.exception)
    assert not (tmp_path / "out").exists()


DEMO = {
    # commands, and what they say of the demo where it is not for them
    "prune": (("demo", "--importance", "magnitude"), ""),
    "tune": (("demo", "--task", "demo", "mode=sparse_to_dense", "max_steps=1", "batch_size=2"), ""),
    "search": (("demo", "--task", "demo", "--adapter", "nowhere"), "nowhere"),
    "merge": (("demo", "--masks", "MASKS", "--adapter", "nowhere"), "nowhere"),
    "validate": (("demo", "--masks", "MASKS"), "demo: "),
    "eval": (("demo", "--task", "demo", "--limit", "1"), ""),
    "shrink": (("demo", "--masks", "MASKS"), "structured"),
    "flops": (("demo",), ""),
    "pack": (("demo",), "no linear of it has zeros enough to be smaller packed; give a pruned model"),
    "unpack": (("demo",), "not a packed model; `phx pack` makes one"),
    "generate": (("demo", "Ben has 3 red hats.", "--max-new-tokens", "2"), ""),
    "bench": (("demo", "--batch", "1"), "no linear of this model is sparse enough to be packed; prune it first"),
}


@pytest.mark.parametrize("command", DEMO)
def test_every_command_with_a_model_knows_the_demo(sparse, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    arguments, refused = DEMO[command]
    arguments = [sparse.parent / "masks.safetensors" if one == "MASKS" else one for one in arguments]
    done = phx(command, *arguments, *(() if command == "generate" else ("--out", "out")))
    if refused:
        assert isinstance(done.exception, PhoenixError)
        assert refused in str(done.exception)
        assert command == "validate" or not list(tmp_path.iterdir())
    else:
        assert done.exit_code == 0, done.output


def test_no_command_with_a_model_is_left_out():
    commands = typer.main.get_command(cli.app).commands
    named = {name for name, one in commands.items() if any(part.name == "model" for part in one.params)}
    assert named | {"unpack"} == set(DEMO)


def test_a_packed_model_is_not_written_over(sparse, tmp_path):
    (tmp_path / "out").mkdir()
    assert "exists already" in str(phx("pack", sparse, "--out", tmp_path / "out").exception)


def test_steps_want_the_dense_model(sparse, tmp_path):
    phx("pack", sparse, "--out", tmp_path / "packed")
    done = phx("prune", tmp_path / "packed", "--out", tmp_path / "out", "--importance", "magnitude")
    assert "phx unpack" in str(done.exception)


def test_flops_of_a_well_known_model_need_nothing_but_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = phx("flops", "llama-3-8b", "--sparsity", 0.5)
    assert done.exit_code == 0, done.output
    assert "Projected tokens a second: a roofline" in done.output
    assert not list(tmp_path.iterdir())
