"""The command line: its words, the steps chained on files, and one line for whatever is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.main import get_command
from typer.testing import CliRunner

from phoenix_sparse import cli, commands
from phoenix_sparse.files import read_json
from phoenix_sparse.masks import load_mask, validate_mask
from phoenix_sparse.models import load_model

ON_A_MACHINE = ["--seed", "--dtype", "--device"]
OPTIONS = {
    "run": ["--out", "--resume", "--overwrite"],
    "plan": [],
    "prune": [
        *("--out", "--task", "--data", "--sparsity", "--importance", "--method", "--format", "--plot", "--compare"),
        *ON_A_MACHINE,
    ],
    "tune": ["--task", "--out", "--masks", "--data", *ON_A_MACHINE],
    "search": ["--adapter", "--task", "--out", "--masks", "--data", "--batch-size", *ON_A_MACHINE],
    "merge": ["--masks", "--adapter", "--out", "--remask", "--task", "--data", *ON_A_MACHINE],
    "validate": ["--masks", "--out"],
    "eval": [
        *("--out", "--task", "--data", "--limit", "--text", "--context-length", "--max-tokens", "--batch-size"),
        *ON_A_MACHINE,
    ],
    "flops": ["--masks", "--sparsity", "--out", "--prompt-length", "--context-length", "--rank"],
    "report": ["--out"],
    "sweep": [],
    "cerebras": [],
    "shrink": ["--masks", "--out", "--dtype", "--device"],
    "pack": ["--out", "--values"],
    "unpack": ["--out"],
    "generate": ["--max-new-tokens", "--dtype", "--device", "--prefill"],
    "bench": [
        *("--batch", "--prompt", "--tokens", "--repeats", "--layers", "--training", "--values", "--threads", "--out"),
        *("--dtype", "--device", "--prefill"),
    ],
}
ARGUMENTS = {
    **{name: ["recipe", "overrides"] for name in ("run", "plan")},
    **{name: ["model", "settings"] for name in ("prune", "tune", "search")},
    **{name: ["model"] for name in ("merge", "validate", "eval", "flops", "shrink")},
    "report": ["directory"],
    "sweep": [],
    "cerebras": [],
    "pack": ["model"],
    "unpack": ["directory"],
    "generate": ["model", "prompt"],
    "bench": ["model"],
}


def test_the_commands_and_their_options_are_these():
    """What people and scripts rely on: a change here is a change to them."""
    commands = get_command(cli.app).commands
    assert set(commands) == set(OPTIONS)
    for name, command in commands.items():
        given = [parameter for parameter in command.params if parameter.name != "help"]
        assert sorted(p.opts[0] for p in given if p.param_type_name == "option") == sorted(OPTIONS[name]), name
        assert [p.name for p in given if p.param_type_name == "argument"] == ARGUMENTS[name], name


@pytest.mark.parametrize("name", [None, *OPTIONS])
def test_help_names_everything(name):
    result = CliRunner().invoke(cli.app, [name, "--help"] if name else ["--help"])
    assert result.exit_code == 0
    for word in OPTIONS[name] if name else OPTIONS:
        assert word in result.output
    if name:
        assert get_command(cli.app).commands[name].help.split(".")[0] in " ".join(result.output.split())


def test_the_steps_do_their_work_on_files(chain, phx, task_directory):
    assert {path.name for path in chain.iterdir()} == {
        *("masks.safetensors", "allocation.json", "plots", "sparse"),
        *("adapter", "tune.json", "logs", "search.json", "merged", "certificate.json"),
    }
    certificate = read_json(chain / "certificate.json")
    assert certificate["off_mask_nonzeros"] == 0
    assert certificate["sparsity"] == pytest.approx(0.6, abs=0.02)
    assert read_json(chain / "tune.json")["steps"] == 4
    assert read_json(chain / "search.json")["validation_examples"] == 10

    figures = chain.parent / "figures"
    code, said, errors = phx(
        *("validate", chain / "merged", "--masks", chain / "masks.safetensors", "--out", figures / "layers.json")
    )
    assert (code, errors) == (0, [])
    assert "0 non-zeros off the mask in 14 layers" in said
    assert f"sparsity {100 * certificate['sparsity']:.4f}%" in said
    assert all(layer["off_mask_nonzeros"] == 0 for layer in read_json(figures / "layers.json").values())

    code, said, _ = phx("eval", chain / "merged", "--task", task_directory, "--limit", 5, "--out", figures)
    assert code == 0
    assert "on 5 examples" in said
    assert read_json(figures / "eval.json")["phoenix"]["examples"] == 5

    (figures / "text.txt").write_text("some words, and some more of them\n" * 20)
    code, said, _ = phx(
        *("eval", chain / "merged", "--text", figures / "text.txt", "--context-length", 32, "--out", figures)
    )
    assert code == 0
    read = read_json(figures / "perplexity.json")
    assert f"perplexity {read['perplexity']:.3f} at context 32 over {read['tokens']} tokens" in said
    code, _, errors = phx("eval", chain / "merged", "--out", figures)
    assert (code, len(errors)) == (2, 1)
    assert "give --task, or --text" in errors[0]

    code, said, errors = phx("flops", chain / "merged", "--masks", chain / "masks.safetensors", "--out", figures)
    assert (code, errors) == (0, [])
    assert read_json(figures / "flops.json")["decode"]["linears"]["reduction"] == pytest.approx(2.5, abs=0.1)
    assert "FLOPs" in said
    training = read_json(figures / "flops.json")["training"]
    assert (training["rank"], training["sequence_length"]) == (32, 512)
    # Two dense products of every weight for each token, and a third for what is adapted.
    weights = {name: layer["shape"] for name, layer in read_json(figures / "flops.json")["linears"].items()}
    products = sum((2 if name == "lm_head" else 3) * 2 * shape[0] * shape[1] for name, shape in weights.items())
    assert training["frozen"] + training["adapted"] == 32 * 512 * products
    assert "one token of training, rank 32" in said
    _, said, _ = phx("flops", "llama-3-8b", "--sparsity", 0.5, "--rank", 8)
    assert "one token of training, rank 8" in said


def test_tune_says_how_many_examples_were_too_long(chain, phx, task_directory, tmp_path):
    shutil.copytree(task_directory, tmp_path / "sums")
    with (tmp_path / "sums" / "train.jsonl").open("a") as file:
        file.writelines(json.dumps({"question": f"{number}+1", "answer": "7" * 40}) + "\n" for number in range(3))
    call = (
        "tune",
        chain / "sparse",
        "--masks",
        chain / "masks.safetensors",
        "ranks=[2]",
        "max_steps=1",
        "batch_size=4",
    )
    code, said, _ = phx(*call, "max_length=32", "--task", tmp_path / "sums", "--out", tmp_path / "out")
    assert code == 0
    assert "training examples left out, too long for max_length: 3\n" in said
    code, said, _ = phx(*call, "max_length=64", "--task", tmp_path / "sums", "--out", tmp_path / "longer")
    assert code == 0
    assert "left out" not in said


SPREAD = {
    "--sparsity 0.5 0.7 0.9": "--sparsity 0.5 --sparsity 0.7 --sparsity 0.9",
    "m --sparsity .5 7e-1 a=1 --out o 0.9": "m --sparsity .5 --sparsity 7e-1 a=1 --out o 0.9",
    "--sparsity=0.5 0.7 m 0.9": "--sparsity=0.5 --sparsity 0.7 m 0.9",
    "--sparsity 0.5 --sparsity 0.7 --plot 0.9": "--sparsity 0.5 --sparsity 0.7 --plot 0.9",
    "--sparsity -1 -2": "--sparsity -1 --sparsity -2",
    "m --compare wanda ria+owl 2:4 a.b=1 x": "m --compare wanda --compare ria+owl --compare 2:4 a.b=1 x",
    "--compare wanda --sparsity 0.5 -- --compare a b": "--compare wanda --sparsity 0.5 -- --compare a b",
    "--sparsity": "--sparsity",
    "m --task t": "m --task t",
}


@pytest.mark.parametrize(("given", "meant"), SPREAD.items(), ids=SPREAD)
def test_an_option_takes_several_values(given, meant):
    assert list(commands._repeated(given.split(), {"--sparsity": True, "--compare": False})) == meant.split()


@pytest.mark.parametrize("format", ["pt", "npz", "safetensors", None])
def test_masks_at_several_levels(phx, tmp_path, model_directory, format):
    options = ["--format", format] if format else ["--plot"]
    out = tmp_path / "out"
    call = ("prune", model_directory, "--out", out, "--sparsity", "0.5", "0.333", "--method", "unstructured", *options)
    code, said, errors = phx(*call, "importance=magnitude")
    assert code == 0
    assert not [line for line in errors if not line.startswith("  scoring block ")]
    assert said.startswith("sparsity 50.0000% in 14 layers: ")
    written = {f"{part}_sparsity{level}_unstructured" for part in ("masks", "stats") for level in ("50", "33.3")}
    written |= {f"histogram_sparsity{level}_unstructured" for level in ("50", "33.3") if not format}
    assert {path.stem for path in out.iterdir()} == written
    masks, facts = load_mask(out / f"masks_sparsity33.3_unstructured.{format or 'pt'}")
    assert facts["target_sparsity"] == 0.333
    assert validate_mask(masks, expected_sparsity=0.333)[0]
    assert read_json(out / "stats_sparsity50_unstructured.json")["sparsity"] == 0.5


@pytest.mark.parametrize(
    ("words", "update", "group"),
    [
        ((), "sparsegpt", "layer"),
        (("pattern=2:4",), "sparsegpt", "layer"),
        (("--importance", "wanda"), "none", "row"),
        (("importance=wanda",), "none", "row"),
        (("update=sparsegpt",), "sparsegpt", "layer"),
        (("group=layer",), "none", "layer"),
        (("pattern=16x1",), "none", "layer"),
    ],
)
def test_a_model_is_pruned_by_what_is_named(phx, tmp_path, model_directory, task_directory, words, update, group):
    few = ("calibration.samples=2", "calibration.length=16")
    code, _, _ = phx("prune", model_directory, "--task", task_directory, "--out", tmp_path, *words, *few)
    assert code == 0
    allocation = read_json(tmp_path / "allocation.json")
    assert (allocation["update"], allocation["group"]) == (update, group)
    masks, facts = load_mask(tmp_path / "masks.safetensors")
    # An importance that took no part is not on record.
    assert (facts["update"], facts["importance"]) == (update, "wanda" if update == "none" else None)
    dense = load_file(model_directory / "model.safetensors")
    sparse = load_file(tmp_path / "sparse" / "model.safetensors")
    kept = [torch.equal(sparse[f"{name}.weight"], dense[f"{name}.weight"] * mask) for name, mask in masks.items()]
    assert all(kept) if update == "none" else not any(kept)


def test_masks_alone_are_wanda_s_unless_an_importance_is_named(phx, tmp_path, model_directory, task_directory):
    """They come from the dense model, whose weights stay; what adjusts weights has no such masks."""
    call = ("prune", model_directory, "--task", task_directory, "--sparsity", "0.5", "0.7", "calibration.samples=2")
    assert phx(*call, "--out", tmp_path / "plain")[0] == phx(*call, "--out", tmp_path / "named", "importance=wanda")[0]
    for level in (50, 70):
        stats, named = (
            read_json(tmp_path / one / f"stats_sparsity{level}_unstructured.json") for one in ("plain", "named")
        )
        assert stats == named
        assert (stats["importance"], stats["group"]) == ("wanda", "row")
        one, other = (load_mask(tmp_path / d / f"masks_sparsity{level}_unstructured.pt")[0] for d in ("plain", "named"))
        assert all(torch.equal(mask, other[name]) for name, mask in one.items())


def test_what_is_there_is_not_written_over(phx, tmp_path, model_directory):
    (tmp_path / "stats_sparsity70_random.json").write_text("mine")
    call = ("prune", model_directory, "--out", tmp_path, "--method", "random", "--sparsity")
    code, _, errors = phx(*call, "0.5", "0.7")
    assert code == 2
    assert errors == [
        f"phx: --out: {tmp_path / 'stats_sparsity70_random.json'} exists already; give another directory, or remove it"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["stats_sparsity70_random.json"]
    assert phx(*call, "0.5")[0] == 0


def test_gradients_are_kept_for_another_attempt(phx, tmp_path, model_directory, task_directory, monkeypatch):
    """What was measured before a kill is taken up; a place for it is left only until the masks are written."""
    from phoenix_sparse import levels

    call = ("prune", model_directory, "--out", tmp_path, "--task", task_directory, "--sparsity", "0.5", "0.7")
    call = (*call, "--importance", "taylor", "calibration.samples=2")
    with monkeypatch.context() as broken:
        broken.setattr(levels, "keep", lambda *_args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        code, _, errors = phx(*call)
    assert (code, errors[-1].startswith("phx: the disk is full")) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == [".work"]
    code, _, errors = phx(*call)
    assert code == 0
    assert not [line for line in errors if "gradients" in line]
    assert not (tmp_path / ".work").exists()


def test_initialisations_are_compared(phx, tmp_path, model_directory, task_directory):
    call = ("prune", model_directory, "--out", tmp_path, "--task", task_directory, "--sparsity", 0.5, "--compare")
    few = ("calibration.samples=2", "calibration.length=16", "finetune.max_steps=1", "finetune.ranks=[2]")
    code, said, errors = phx(*call, "random", "magnitude+2:4", *few)
    assert code == 0
    assert errors[-1] == "magnitude+2:4: report: done in " + errors[-1].rpartition(" in ")[2]
    compared = read_json(tmp_path / "compare.json")
    assert {entry["spec"] for entry in compared["specs"]} == {"random", "magnitude+2:4"}
    for word in ("random", "magnitude+2:4", "50.0%", "before", "after", "best after the fine-tune: ", "compare.json"):
        assert word in said
    assert {path.name for path in tmp_path.iterdir()} == {"compare.json", "random", "magnitude-2of4"}

    code, said, errors = phx(*call, "random", "7x1", *few)
    assert code == 3
    assert "random: report: done before, kept" in errors
    assert errors[-1].startswith("phx: 7x1: sparsify.pattern: 7x1 does not divide model.layers.0.self_attn.q_proj")
    assert "failed" in said
    assert "magnitude+2:4" in said

    code, said, errors = phx(*call, "ria")
    assert (code, said, len(errors)) == (2, "", 1)
    assert "is a comparison with other settings: finetune.max_steps is 1 there and 100 here" in errors[0]


def test_a_filled_zero_is_a_failed_check(chain, phx, model_directory):
    """The dense model against the masks: a check that fails, which is not bad input."""
    code, said, errors = phx("validate", model_directory, "--masks", chain / "masks.safetensors")
    assert code == 1
    assert said == ""
    assert len(errors) == 1
    assert errors[0].startswith(f"phx: {model_directory}: ")
    assert "non-zeros off the mask in 14 of 14 layers, model.layers.0." in errors[0]


def test_one_filled_zero_is_found(chain, phx, tmp_path):
    shutil.copytree(chain / "merged", tmp_path / "model")
    masks, _ = load_mask(chain / "masks.safetensors")
    name = "model.layers.1.mlp.down_proj"
    weights = load_file(tmp_path / "model/model.safetensors")
    row, column = (~masks[name]).nonzero()[0].tolist()
    weights[f"{name}.weight"][row, column] = 1e-8
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    code, _, errors = phx("validate", tmp_path / "model", "--masks", chain / "masks.safetensors")
    assert code == 1
    assert f"1 non-zeros off the mask in 1 of 14 layers, {name} first (1)" in errors[0]


def test_a_structured_model_gets_smaller(phx, tmp_path, model_directory):
    few = ("--importance", "magnitude", "--sparsity", 0.4)
    assert phx("prune", model_directory, "--out", tmp_path / "pruned", *few, "pattern=structured")[0] == 0
    masks = tmp_path / "pruned" / "masks.safetensors"
    code, said, _ = phx("shrink", tmp_path / "pruned" / "sparse", "--masks", masks, "--out", tmp_path / "small")
    assert code == 0
    counts = [sum(p.numel() for p in load_model(d).parameters()) for d in (model_directory, tmp_path / "small")]
    assert counts[1] < counts[0]
    assert f"{counts[0]:,} parameters before, {counts[1]:,} after" in said
    assert "were not zero" not in said
    code, said, _ = phx("shrink", model_directory, "--masks", masks, "--out", tmp_path / "again")
    assert f"{counts[0] - counts[1]:,} of the weights that the masks drop were not zero" in said
    code, _, errors = phx("shrink", model_directory, "--masks", masks, "--out", tmp_path / "again")
    assert code == 2
    assert "exists already" in errors[-1]


def test_a_plan_is_shown_and_nothing_done(phx, tmp_path, monkeypatch, model_directory, task_directory):
    monkeypatch.chdir(tmp_path)
    values = {"name": "good", "model": str(model_directory), "task": str(task_directory)}
    (tmp_path / "good.yaml").write_text(json.dumps(values))
    code, said, errors = phx("plan", "good.yaml", "finetune.epochs=2")
    assert (code, errors) == (0, [])
    assert "epochs: 2.0" in said
    assert "memory" in said
    assert [path.name for path in tmp_path.iterdir()] == ["good.yaml"]


def test_report_writes_a_run_s_report_again(phx, tmp_path):
    code, said, errors = phx("report", tmp_path)
    assert (code, said) == (2, "")
    assert errors == [f"phx: {tmp_path}: no run lies in it (no manifest.json); give a run's directory, or one of runs"]


def test_a_step_does_not_go_on_from_another_s_checkpoints(phx, chain, task_directory, tmp_path, monkeypatch):
    """A killed search leaves its journal; the same search takes it up, one of another adapter must not."""
    from phoenix_sparse import steps

    seen = []
    monkeypatch.setattr(steps, "search", lambda *_args, work, **_kwargs: seen.append(work))
    masks = ("--masks", chain / "masks.safetensors", "--task", task_directory, "--out", tmp_path)
    for adapter in ("super", "super", "chosen"):
        assert phx("search", chain / "sparse", "--adapter", chain / "adapter" / adapter, *masks)[0] == 0
    assert phx("search", chain / "sparse", "--adapter", chain / "adapter/super", *masks, "--seed", "1")[0] == 0
    assert seen[0] == seen[1]
    assert len(set(seen)) == 3


def test_a_bad_recipe_or_override_makes_no_run(phx, tmp_path, monkeypatch, model_directory, task_directory):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("name: [\n")
    good = {"name": "good", "model": str(model_directory), "task": str(task_directory)}
    (tmp_path / "good.yaml").write_text(json.dumps(good))
    for command in ("run", "plan"):
        for arguments, words in (
            (["bad.yaml"], "bad.yaml is not YAML"),
            (["none.yaml"], "none.yaml can't be read (FileNotFoundError); give a YAML file"),
            (["good.yaml", "sparsify.sparsity=1"], "good.yaml: sparsify.sparsity=1 should be less than 1"),
            (["good.yaml", "finetune.epoch=1"], "did you mean finetune.epochs?"),
            (["good.yaml", "sparsify.evolution.budget=5"], "sparsify.evolution: it is for allocation=evolutionary"),
            (["good.yaml", "evaluate.dense_lora_learning_rate=1", "evaluate.baselines=[]"], "no dense LoRA is trained"),
            (["good.yaml", "nonsense"], "'nonsense' is not key=value"),
            (["good.yaml", "model=./nowhere"], "./nowhere is not a directory"),
        ):
            code, said, errors = phx(command, *arguments)
            assert (code, said, len(errors)) == (2, "", 1), errors
            assert errors[0].startswith("phx: ")
            assert words in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.yaml", "good.yaml"]
