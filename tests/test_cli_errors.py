"""One line for whatever is wrong, exit code 2, and nothing left behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from phoenix_sparse.masks import load_mask, save_mask


@pytest.fixture
def broken(tmp_path, chain, model_directory, task_directory) -> Path:
    """Everything that can be wrong with an input, each in a place of its own."""
    torch.manual_seed(0)
    for name in ("nan", "truncated", "config", "missing"):
        shutil.copytree(model_directory, tmp_path / name)
    weights = load_file(model_directory / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, tmp_path / "nan/model.safetensors", metadata={"format": "pt"})
    whole = (model_directory / "model.safetensors").read_bytes()
    (tmp_path / "truncated/model.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "config/config.json").write_text("{")
    (tmp_path / "missing/model.safetensors").unlink()
    masks, _ = load_mask(chain / "masks.safetensors")
    save_mask({name: mask for name, mask in masks.items() if "layers.1" not in name}, tmp_path / "fewer.safetensors")
    save_mask({name: mask.t().contiguous() for name, mask in masks.items()}, tmp_path / "turned.safetensors")
    save_mask({f"other.{name}": mask for name, mask in masks.items()}, tmp_path / "others.safetensors")
    flipped = {name: ~mask for name, mask in masks.items()}
    save_mask(flipped, tmp_path / "flipped.safetensors")
    packed = (chain / "masks.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(packed[: len(packed) // 2])
    for name in ("empty", "nan_row", "field", "no_yaml", "key"):
        shutil.copytree(task_directory, tmp_path / f"task_{name}")
    (tmp_path / "task_empty/train.jsonl").write_text("")
    (tmp_path / "task_nan_row/test.jsonl").write_text('{"question": "1+1", "answer": NaN}\n')
    (tmp_path / "task_field/train.jsonl").write_text('{"question": "1+1"}\n')
    (tmp_path / "task_no_yaml/task.yaml").unlink()
    text = (task_directory / "task.yaml").read_text()
    (tmp_path / "task_key/task.yaml").write_text(text.replace("doc_to_target", "doc_to_targt"))
    (tmp_path / "file").write_text("a file")
    shutil.copytree(model_directory, tmp_path / "run/sparse")
    shutil.copytree(chain / "adapter/super", tmp_path / "plain")
    (tmp_path / "plain/phoenix.json").write_text('{"masked": false, "masks_sha256": null, "space": [4, 2]}')
    for name in ("wordless", "wider"):
        shutil.copytree(model_directory, tmp_path / name)
    for file in (tmp_path / "wordless").glob("*token*"):
        file.unlink()
    config = json.loads((tmp_path / "wider/config.json").read_text())
    (tmp_path / "wider/config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    return tmp_path


BAD = {
    # models
    "no model": ("prune {b}/nowhere --task {task}", "nowhere is not a directory; give a Hugging Face model directory"),
    "a run for a model": (
        "prune {b}/run --importance magnitude",
        "run has no config.json; its model is {b}/run/sparse",
    ),
    "a search of nothing": (
        "prune {model} --task {task} evolution.budget=5",
        "prune: evolution: it is for allocation=evolutionary, and this one is uniform; set that, or leave",
    ),
    "a text for none": (
        "prune {model} --importance random calibration.samples=5",
        "prune: calibration: random measures nothing on it; leave calibration out, or prune by what does, such as",
    ),
    "a text for none at several levels": (
        "prune {model} --method random --sparsity 0.5 0.6 calibration.samples=5",
        "prune: calibration: random measures nothing on it",
    ),
    "no tokenizer": (
        "prune {b}/wordless --task {task}",
        "the tokenizer can't be loaded (none of its files is there); put that of the model which this came from there",
    ),
    "no tokenizer to compare with": (
        "prune {b}/wordless --task {task} --compare wanda",
        "wordless: the tokenizer can't be loaded (none of its files is there)",
    ),
    "another configuration": ("prune {b}/wider --importance magnitude", "by config.json, and so are "),
    "another configuration to compare": (
        "prune {b}/wider --task {task} --compare wanda",
        "by config.json; is it this model's configuration?",
    ),
    "no weights": ("prune {b}/missing --task {task}", "has no model.safetensors; only safetensors weights are read"),
    "no config": ("prune {b}/config --task {task}", "not a model configuration"),
    "NaN": ("prune {b}/nan --task {task}", "model.layers.1.mlp.up_proj.weight has 1 weights that are NaN or infinite"),
    "half a model": ("prune {b}/truncated --task {task}", "the weights can't be loaded"),
    "NaN, evaluated": ("eval {b}/nan --task {task}", "NaN or infinite"),
    # masks
    "half a mask": ("validate {model} --masks {b}/half.safetensors", "is damaged or truncated"),
    "no masks": ("validate {model} --masks {b}/none.safetensors", "is not a file; give a mask file that pruning wrote"),
    "weights for masks": ("validate {model} --masks {model}/model.safetensors", "is not the bytes of a mask"),
    "fewer masks": ("tune {sparse} --task {task} --masks {b}/fewer.safetensors", "no mask for model.layers.1."),
    "turned masks": ("tune {sparse} --task {task} --masks {b}/turned.safetensors", "and the model's weight ("),
    "other masks": (
        "tune {sparse} --task {task} --masks {b}/others.safetensors",
        "is no prunable linear of this model",
    ),
    "other masks, merged": (
        "merge {sparse} --adapter {chain}/adapter/chosen --masks {b}/flipped.safetensors",
        "was trained through other masks than these",
    ),
    "other masks, counted": ("flops {model} --masks {b}/others.safetensors", "the model has no linear named 'other."),
    "masks forgotten": ("tune {sparse} --task {task}", "give --masks, or mode=sparse_to_dense"),
    "masks forgotten in search": (
        "search {sparse} --adapter {chain}/adapter/super --task {task}",
        "was trained through masks; give its masks.safetensors",
    ),
    "masks in search for nothing": (
        "search {sparse} --adapter {b}/plain --task {task} --masks {masks}",
        "plain was trained without masks; leave --masks out",
    ),
    # adapters
    "a dense model": (
        "tune {model} --task {task} --masks {masks}",
        "of its weights are not zero where these masks are; give the model that was pruned to them",
    ),
    "a dense model to search": (
        "search {model} --adapter {chain}/adapter/super --task {task} --masks {masks}",
        "of its weights are not zero where these masks are",
    ),
    "a dense model to merge": (
        "merge {model} --adapter {chain}/adapter/chosen --masks {masks}",
        "of its weights are not zero where these masks are",
    ),
    "masks of another model": ("flops {model} --masks {b}/turned.safetensors", "; give this model's"),
    "masks for nothing": (
        "tune {sparse} --task {task} --masks {masks} mode=sparse_to_dense",
        "trains without masks; leave --masks out",
    ),
    "masked again by another command": (
        "tune {sparse} --task {task} mode=sparse_to_dense dense_merge=remask",
        "dense_merge: nothing is merged here; leave it out, and give phx merge --remask",
    ),
    "masked again": (
        "merge {sparse} --adapter {chain}/adapter/chosen --masks {masks} --remask",
        "was trained through masks and fills no zero; leave --remask out",
    ),
    "a directory of adapters": (
        "merge {sparse} --adapter {chain} --masks {masks}",
        "is no adapter: No such file as phoenix.json is there; give {chain}/adapter/chosen or {chain}/adapter/super",
    ),
    "no adapter": ("search {sparse} --adapter {b}/none --task {task} --masks {masks}", "No such file"),
    "no super-adapter": (
        "search {sparse} --adapter {chain}/adapter/chosen --task {task} --masks {masks}",
        "is no super-adapter; give the one that fine-tuning wrote",
    ),
    # tasks
    "no task": ("prune {model} --task nothing", "'nothing' is neither built in ("),
    "no task.yaml": ("prune {model} --task {b}/task_no_yaml", "has no task.yaml"),
    "data of no task": ("prune {model} --importance magnitude --data {task}", "give --task, or leave --data out"),
    "data of no task to score": ("eval {model} --text {b}/file --data {task}", "give --task, or leave --data out"),
    "data of no task to merge": (
        "merge {sparse} --adapter {chain}/adapter/chosen --masks {masks} --data {task}",
        "give --task, or leave --data out",
    ),
    "no data": ("prune {model} --task gsm8k --data {b}/none", "is not a folder; it should hold <split>.jsonl"),
    "empty data": ("prune {model} --task {b}/task_empty", "train.jsonl: the file is empty"),
    "NaN in data": (
        "eval {model} --task {b}/task_nan_row",
        "test.jsonl:1: not a JSON object (NaN is not a JSON number)",
    ),
    "a field missing": ("prune {model} --task {b}/task_field", "train.jsonl:1: the field 'answer'"),
    "a key wrong": ("prune {model} --task {b}/task_key", "task.yaml: "),
    "no text": ("prune {model}", "sparsegpt needs text to calibrate on; give --task, or calibration.source=text"),
    # settings
    "all zeros": ("prune {model} --task {task} --sparsity 1.0", "sparsity=1.0 should be less than 1"),
    "all zeros by key": ("prune {model} --task {task} sparsity=1", "sparsity=1 should be less than 1"),
    "no such setting": ("prune {model} --task {task} sparsty=0.5", "sparsty is no field; did you mean sparsity?"),
    "a section too many": (
        "tune {sparse} --task {task} --masks {masks} finetune.epochs=2",
        "tune: finetune is no field; write epochs=... alone",
    ),
    "an empty list": (
        "tune {sparse} --task {task} --masks {masks} targets=[]",
        "targets=[] should have at least 1 item",
    ),
    "no sparsities": ("prune {model} --importance magnitude allocation={{}}", "allocation: use uniform, owl"),
    "a teacher that is not there": (
        "tune {sparse} --task {task} --masks {masks} distill.teacher={b}/none",
        "none is not a directory; give a Hugging Face model directory or a hub name",
    ),
    "no setting": ("tune {sparse} --task {task} --masks {masks} ranks", "'ranks' is not key=value"),
    "no such target": (
        "tune {sparse} --task {task} --masks {masks} targets=[nothing]",
        "no linear is called nothing; there are down_proj",
    ),
    "no such dtype": ("prune {model} --task {task} --dtype int8", "dtype='int8' should be 'auto', 'float32'"),
    "no such device": ("prune {model} --task {task} --device tpu", "device='tpu' should be 'auto', 'cpu' or 'cuda'"),
    "nothing to evaluate on": (
        "eval {model} --task {task} --limit 0",
        "--limit should be greater than or equal to 1",
    ),
    "a limit of no task": ("eval {model} --text {b}/file --limit 5", "--limit is for --task, which isn't given"),
    "a window of no text": ("eval {model} --task {task} --context-length 64", "--context-length is for --text"),
    "tokens of no text": ("eval {model} --task {task} --max-tokens 64", "--max-tokens is for --text"),
    "too long a window beside a task": (
        "eval {model} --task {task} --text {b}/file --context-length 9999",
        "context_length is 9999; it must be between 2 and the model's 256",
    ),
    "no tokens": ("flops {model} --prompt-length 0", "prompt_length=0 should be greater than or equal to 1"),
    "too short a text": (
        "prune {model} calibration.source=text calibration.text={b}/file calibration.length=64",
        "7 tokens are less than one sequence of 64",
    ),
    "no such text": (
        "prune {model} calibration.source=text calibration.text={b}/none",
        "calibration.text: {b}/none can't be read",
    ),
    "no gradients": ("prune {model} importance=taylor", "taylor needs the gradients of a task's loss; give --task"),
    "an importance that would do nothing": (
        "prune {model} --importance ria update=sparsegpt",
        "update=sparsegpt has scores of its own; leave it out, or the importance (ria)",
    ),
    "no text for an update": (
        "prune {model} update=alps",
        "alps needs text to calibrate on; give --task",
    ),
    "no text for an allocation": ("prune {model} importance=random allocation=owl", "owl needs text to calibrate on"),
    "a pattern that does not divide": (
        "prune {model} importance=magnitude pattern=7x1",
        "7x1 does not divide model.layers.0.self_attn.q_proj, 32x32",
    ),
    # masks at several levels
    "a level of ones": ("prune {model} --sparsity 0.5 1.5 0.7", "prune: sparsity=1.5 should be less than 1"),
    "a negative level": (
        "prune {model} --sparsity 0.5 -0.5",
        "prune: sparsity=-0.5 should be greater than or equal to 0",
    ),
    "a level twice": ("prune {model} --sparsity 0.5 .50 importance=random", "gives one level twice (0.5, 0.5)"),
    "levels and a sparsity": ("prune {model} --sparsity 0.5 0.7 sparsity=0.6", "the sparsity is set twice"),
    "no such method": (
        "prune {model} --method hopeful",
        "method='hopeful' should be 'unstructured', 'structured' or 'random'",
    ),
    "no such format": ("prune {model} --format exe", "format='exe' should be 'pt', 'npz' or 'safetensors'"),
    "no such importance": ("prune {model} --sparsity 0.5 0.7 --importance luck", "'luck' is not known; use one of"),
    "an importance by lot": (
        "prune {model} --method random --importance ria",
        "draws by lot; leave the importance out",
    ),
    "an update at levels": (
        "prune {model} --plot update=dsnot",
        "update prunes a model, at one level; give one --sparsity, without --method",
    ),
    "no text for levels": ("prune {model} --plot", "wanda needs text to calibrate on; give --task"),
    "no gradients for levels": ("prune {model} --plot --importance gradient", "give --task"),
    "no such text for levels": (
        "prune {model} --plot calibration.source=text calibration.text={b}/none",
        "calibration.text: {b}/none can't be read",
    ),
    "no text for an update alone": (
        "prune {model} update=sparsegpt",
        "sparsegpt needs text to calibrate on; give --task",
    ),
    "a list that is too short": (
        "prune {model} --importance magnitude allocation=[0.5]",
        "1 values for 2 decoder blocks; give one value per block",
    ),
    "a group of structures": ("prune {model} --method structured group=row", "the pattern structured has its own"),
    "no model for levels": ("prune {b}/nowhere --method random", "nowhere is not a directory"),
    "NaN for levels": ("prune {b}/nan --method random", "model.layers.1.mlp.up_proj.weight has 1 weights that are NaN"),
    "out of reach": (
        "prune {model} --method structured --sparsity 0.3 0.99 importance=magnitude",
        "a sparsity of 0.99 can't be reached",
    ),
    # comparisons
    "no task to compare on": ("prune {model} --compare wanda", "--compare fine-tunes on a task; give --task"),
    "no such spec": (
        "prune {model} --task {task} --compare wanda magnitude+luck",
        "'luck' in 'magnitude+luck' is no importance (",
    ),
    "one spec twice": (
        "prune {model} --task {task} --compare owl ria sparsegpt+owl",
        "'owl' and 'sparsegpt+owl' are the same; leave one out",
    ),
    "specs at levels": (
        "prune {model} --task {task} --compare wanda --sparsity 0.5 0.7",
        "is at one sparsity; give one",
    ),
    "specs with a method": (
        "prune {model} --task {task} --compare wanda --method random",
        "--compare takes no --importance, --method, --format or --plot",
    ),
    "a pattern of another sparsity": (
        "prune {model} --task {task} --sparsity 0.7 --compare wanda 2:4",
        "compare: 2:4: sparsify.pattern: 2:4 is sparsity 0.5",
    ),
    "no such setting to compare with": (
        "prune {model} --task {task} --compare wanda finetune.epoch=1",
        "finetune.epoch is no field; did you mean finetune.epochs?",
    ),
    "no model to compare": ("prune {b}/nowhere --task {task} --compare wanda", "nowhere is not a directory"),
    "no such device to compare on": (
        "prune {model} --task {task} --compare wanda --device tpu",
        "device='tpu' should be 'auto', 'cpu' or 'cuda'",
    ),
}


@pytest.mark.parametrize(("command", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    phx, tmp_path, broken, chain, model_directory, task_directory, command, words
):
    places = {"b": broken, "chain": chain, "sparse": chain / "sparse", "masks": chain / "masks.safetensors"}
    places |= {"model": model_directory, "task": task_directory}
    arguments = command.format(**places).split()
    out = tmp_path / "out"
    out.mkdir()
    target = out / "layers.json" if arguments[0] == "validate" else out
    code, said, errors = phx(*arguments, "--out", target)
    assert len(errors) == 1, errors
    assert errors[0].startswith("phx: ")
    assert words.format(**places) in errors[0]
    assert (code, said) == (2, "")
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("command", ["prune {model} --task {task}", "eval {model} --task {task}", "flops {model}"])
def test_a_place_that_can_not_be_written_is_told_first(phx, broken, model_directory, task_directory, command):
    arguments = command.format(model=model_directory, task=task_directory).split()
    for out in ("file", "file/inner/most"):
        code, _, errors = phx(*arguments, "--out", broken / out)
        assert (code, errors) == (2, [f"phx: --out: {broken / 'file'} is not a directory"])
    assert (broken / "file").read_text() == "a file"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prune", "demo", "--sparsity", "50%", "--out", "x"), "prune: --sparsity should be a valid number"),
        (("prune", "demo"), "prune: missing option '--out' (the directory to write to); see `phx prune --help`"),
        (("prune", "--out", "x"), "prune: missing argument 'model' (a Hugging Face model directory, a hub name, or"),
        (("prune", "demo", "--out", "x", "--sparsity"), "option '--sparsity' requires an argument; see `phx"),
        (("prune", "demo", "--out", "x", "--hope"), "prune: no such option: --hope"),
        (("tune", "demo", "--task", "demo", "--out", "x", "--seed", "one"), "tune: --seed should be a valid integer"),
        (("generate", "demo", "Hello", "--max-new-tokens", "0"), "generate: --max-new-tokens should be greater than"),
        (("cerebras", "export", "run", "--out", "x", "--mode", "dense"), "cerebras export: --mode 'dense' is not one"),
        (("hope",), "no such command 'hope'; see `phx --help`"),
        (("sweep", "hope"), "sweep: no such command 'hope'; see `phx sweep --help`"),
        (("prune", "demo", "--out", ""), "the argument after --out is empty (a variable of the shell that isn't set?)"),
        (("prune", "demo", "--out="), "--out= is empty"),
        (("prune", "", "--out", "x"), "the argument after prune is empty"),
    ],
)
def test_a_command_in_the_wrong_form_is_one_line(phx, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, said, errors = phx(*arguments)
    assert (code, said, len(errors)) == (2, "", 1)
    assert errors[0].startswith(f"phx: {words}")
    assert not list(tmp_path.iterdir())


def test_no_command_is_told_which_there_are(phx):
    code, _, errors = phx()
    assert code == 2
    assert any("prune" in line for line in errors)
    assert phx("--help")[0] == 0


@pytest.mark.parametrize("command", ["validate {model} --masks {masks}", "bench {model} --batch 1"])
def test_a_directory_is_not_written_over_by_a_file(phx, broken, chain, model_directory, command):
    arguments = command.format(model=model_directory, masks=chain / "masks.safetensors").split()
    code, _, errors = phx(*arguments, "--out", broken / "task_empty")
    assert (code, len(errors)) == (2, 1)
    assert "task_empty is a directory; give a file's name" in errors[0]
    assert (broken / "task_empty" / "task.yaml").is_file()
    code, _, errors = phx(*arguments, "--out", broken / "file" / "x")
    assert (code, errors) == (2, [f"phx: --out: {broken / 'file'} is not a directory"])


@pytest.mark.parametrize("command", ["pack {sparse}", "unpack {sparse}", "shrink {sparse} --masks {masks}"])
def test_a_place_below_a_file_is_told_first(phx, broken, chain, command):
    arguments = command.format(sparse=chain / "sparse", masks=chain / "masks.safetensors").split()
    code, _, errors = phx(*arguments, "--out", broken / "file" / "x")
    assert (code, errors) == (2, [f"phx: --out: {broken / 'file'} is not a directory"])


def test_in_a_process_of_its_own(broken, model_directory, task_directory, tmp_path):
    """What libraries say when they are imported counts, too: stderr is one line and the exit code the shell's."""
    command = [sys.executable, "-m", "phoenix_sparse.cli", "prune", str(broken / "nan"), "--task", str(task_directory)]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("phx: ")
    assert "NaN or infinite" in done.stderr
    assert not (tmp_path / "out").exists()
