"""With ModelZoo: from a run to a job, trained on the CPU by the real Trainer, and back."""

import json
import shutil
import subprocess

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from phoenix_sparse.cerebras.layout import read_record
from phoenix_sparse.cerebras.validating import validate
from phoenix_sparse.cerebras_runs import export_run, import_run, trace_run
from phoenix_sparse.cli import app
from phoenix_sparse.errors import CheckFailed, PhoenixError
from phoenix_sparse.files import read_json
from phoenix_sparse.masks import load_mask, save_mask

pytestmark = [pytest.mark.modelzoo, pytest.mark.slow]
CHANGES = ["steps=20", "batch_size=4", "warmup=2", "precision=float32", "checkpoint_every=20"]
JOBS = [("llama", "static"), ("llama", "sparse_lora"), ("mistral", "sparse_lora"), ("mixtral", "sparse_lora")]


def trainer(environment, job, *arguments):
    return environment.run(["run.py", *arguments, "--device", "CPU"], cwd=job)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, with_modelzoo, run_of):
    made = {}

    def make(kind, mode):
        if (kind, mode) not in made:
            job = tmp_path_factory.mktemp("jobs") / f"{kind}-{mode}"
            export_run(run_of(kind), job, mode, CHANGES, with_modelzoo)
            made[kind, mode] = job
        return made[kind, mode]

    return make


@pytest.fixture(scope="module")
def trained(exported, with_modelzoo):
    done = {}

    def train(kind, mode):
        job = exported(kind, mode)
        if job not in done:
            result = trainer(with_modelzoo, job, "train", "params.yaml")
            assert result.returncode == 0, result.stderr[-3000:]
            done[job] = result
        return job

    return train


def trainers_loss(environment, job):
    result = trainer(environment, job, "eval", "params.yaml", "--checkpoint", "model_dir/checkpoint_20.mdl")
    told = [line for line in (result.stderr + result.stdout).splitlines() if "Avg Eval Loss" in line]
    assert told, result.stderr[-3000:]
    return float(told[-1].rpartition(":")[2])


def hugging_faces_loss(environment, model, job, tmp_path):
    """The mean over batches of the mean over a batch's learned tokens, as the Trainer reports it."""
    import numpy as np

    code = "import sys, h5py, numpy as np; np.save(sys.argv[2], h5py.File(sys.argv[1])['data'][:])"
    array = tmp_path / "validation.npy"
    environment.run(["-c", code, str(job / "data/validation/examples.h5"), str(array)])
    data = torch.from_numpy(np.load(array)).long()
    losses = []
    for batch in data.split(4):
        if len(batch) < 4:
            continue
        with torch.no_grad():
            logits = model(input_ids=batch[:, 0]).logits.float()
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 2], reduction="none")
        losses.append(float((each * batch[:, 1]).sum() / batch[:, 1].sum()))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("kind", "mode"), JOBS)
def test_there_and_back(kind, mode, trained, run_of, with_modelzoo, tmp_path):
    job, run = trained(kind, mode), run_of(kind)
    certificate = import_run(job, run, tmp_path / "back", None, with_modelzoo)
    assert certificate["off_mask_nonzeros"] == 0
    before, after = run / "sparse", tmp_path / "back" / "merged"
    assert read_json(after / "config.json") == read_json(before / "config.json")
    masks = load_mask(run / "masks.safetensors")[0]
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert {name: value.dtype for name, value in old.items()} == {name: value.dtype for name, value in new.items()}
    for name, mask in masks.items():
        assert not new[f"{name}.weight"][~mask].any()
        assert not torch.equal(new[f"{name}.weight"], old[f"{name}.weight"])  # it was trained
    if mode == "sparse_lora":
        assert all(torch.equal(new[name], old[name]) for name in old if name.removesuffix(".weight") not in masks)
    if kind != "mistral":  # whose weights go back to bfloat16, as the run had them
        assert certificate["max_abs_logit_difference"] < 1e-4
        model = AutoModelForCausalLM.from_pretrained(after).eval()
        loss = hugging_faces_loss(with_modelzoo, model, job, tmp_path)
        assert loss == pytest.approx(trainers_loss(with_modelzoo, job), abs=1e-5)


@pytest.mark.parametrize(("kind", "mode"), JOBS)
def test_the_compiler_sees_every_pruned_weight(kind, mode, exported, with_modelzoo):
    found = trace_run(exported(kind, mode), mode, with_modelzoo)
    assert found["valid"], found
    assert set(found["weights"]) == set(read_record(exported(kind, mode))["weights"])
    shares = {round(weight["compiler_sparsity"], 1) for weight in found["weights"].values()}
    assert shares == {0.5, 0.8}  # 0.75, rounded: each block its own


def test_trace_fails_over_a_wrong_and_a_missing_sparsity(exported, with_modelzoo, tmp_path):
    job = tmp_path / "job"
    shutil.copytree(exported("llama", "static"), job, ignore=shutil.ignore_patterns("model_dir"))
    params = yaml.safe_load((job / "params.yaml").read_text())
    first, second = params["trainer"]["init"]["sparsity"]
    first["sparsity"], lost = 0.4, second["param_filter"].pop()
    (job / "params.yaml").write_text(yaml.safe_dump(params))
    result = CliRunner().invoke(
        app,
        ["cerebras", "trace", str(job), "--output", str(tmp_path / "t.json"), "--python", str(with_modelzoo.python)],
    )
    assert result.exit_code == 1
    found = read_json(tmp_path / "t.json")["weights"]
    assert found[lost.lstrip("*")]["verdict"] == "missing"
    assert sum(weight["verdict"] == "wrong" for weight in found.values()) == 7


def test_validate_before_and_after_training(trained, run_of, with_modelzoo):
    job = trained("llama", "sparse_lora")
    masks = load_mask(run_of("llama") / "masks.safetensors")[0]
    for name, adapters in (("checkpoint.mdl", 0), ("model_dir/checkpoint_20.mdl", 14)):
        found = validate(job / name, masks, None, with_modelzoo)
        assert (found["valid"], found["adapters"]) == (True, adapters)


def test_an_unregistered_callback_fails(exported, with_modelzoo):
    """As `cszoo fit` would start it: the Trainer must not run without the callback, and doesn't."""
    code = (
        "import yaml\n"
        "from cerebras.modelzoo.trainer.utils import run_trainer\n"
        "params = yaml.safe_load(open('params.yaml'))\n"
        "params['trainer']['init']['backend'] = {'backend_type': 'CPU'}\n"
        "run_trainer('train', params)\n"
    )
    job = exported("llama", "sparse_lora")
    done = with_modelzoo.run(["-c", code], cwd=job)
    assert done.returncode != 0
    assert "MaskedLora" in done.stderr


def test_without_its_export_a_trained_checkpoint_is_not_merged(trained, run_of, with_modelzoo, tmp_path):
    with pytest.raises(PhoenixError, match="other masks"):
        import_run(trained("llama", "sparse_lora"), run_of("mistral"), tmp_path / "back", None, with_modelzoo)


def test_a_dense_update_is_not_merged(trained, run_of, with_modelzoo, tmp_path):
    """A checkpoint whose zeros are gone, by whatever way: refused, and nothing written."""
    job, filled = trained("llama", "sparse_lora"), tmp_path / "filled.mdl"
    code = (
        "import sys, cerebras.pytorch as cstorch\n"
        "state = cstorch.load(sys.argv[1])\n"
        "model = {n: v.to('cpu') for n, v in state['model'].items()}\n"
        "name = next(n for n in model if n.endswith('proj_v_dense_layer.weight'))\n"
        "model[name] = model[name] + 1e-3\n"
        "cstorch.save({'model': model}, sys.argv[2])\n"
    )
    done = with_modelzoo.run(["-c", code, str(job / "model_dir/checkpoint_20.mdl"), str(filled)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    with pytest.raises(PhoenixError, match="non-zeros off its mask"):
        import_run(job, run_of("llama"), tmp_path / "back", filled, with_modelzoo)
    assert not (tmp_path / "back" / "merged").exists()


@pytest.mark.parametrize("damage", ["dense", "missing", "truncated"])
def test_a_failed_conversion_leaves_no_checkpoint(damage, run_of, with_modelzoo, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_of("llama"), run)
    file = run / "sparse" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        tensors[name] = torch.randn_like(tensors[name])
        if damage == "missing":
            del tensors[name]
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises((CheckFailed, PhoenixError)) as told:
        export_run(run, tmp_path / "job", "static", CHANGES, with_modelzoo)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "job").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_experts_are_never_left_random(exported, with_modelzoo, tmp_path):
    """With the model section as the converter emits it the experts have other names, and random ones would train."""
    job = tmp_path / "job"
    shutil.copytree(exported("mixtral", "sparse_lora"), job, ignore=shutil.ignore_patterns("model_dir"))
    params = yaml.safe_load((job / "params.yaml").read_text())
    assert params["trainer"]["init"]["model"]["moe"].pop("moe_implementation") == "optimized"
    (job / "params.yaml").write_text(yaml.safe_dump(params))
    done = trainer(with_modelzoo, job, "train", "params.yaml")
    assert done.returncode != 0
    assert "would stay random" in done.stderr, done.stderr[-2000:]


def test_a_checkpoint_without_a_weight_is_not_trained(exported, with_modelzoo, tmp_path):
    job = tmp_path / "job"
    shutil.copytree(exported("mixtral", "sparse_lora"), job, ignore=shutil.ignore_patterns("model_dir"))
    code = (
        "import cerebras.pytorch as cstorch\n"
        "model = {n: v.to('cpu') for n, v in cstorch.load('checkpoint.mdl')['model'].items()}\n"
        "cstorch.save({'model': {n: v for n, v in model.items() if 'expert_weights' not in n}}, 'part.mdl')\n"
    )
    assert with_modelzoo.run(["-c", code], cwd=job).returncode == 0
    done = trainer(with_modelzoo, job, "train", "params.yaml", "--checkpoint", "part.mdl")
    assert done.returncode != 0
    assert "would stay random" in done.stderr


def test_the_yaml_is_valid_to_modelzoo_with_the_callbacks_known(exported, with_modelzoo):
    code = (
        "import sys, yaml, phoenix_masked_lora\n"
        "from cerebras.modelzoo.trainer.validate import validate_trainer_params\n"
        "params = yaml.safe_load(open('params.yaml'))\n"
        "print(len(validate_trainer_params(params)))\n"
        "params['trainer']['init']['optimiser'] = {}\n"
        "try:\n    validate_trainer_params(params)\n"
        "except Exception:\n    print('refused')\n"
    )
    for mode in ("static", "sparse_lora"):
        done: subprocess.CompletedProcess[str] = with_modelzoo.run(["-c", code], cwd=exported("llama", mode))
        assert done.stdout.split()[-2:] == ["1", "refused"], done.stderr[-2000:]


def test_masks_of_another_model_are_refused(run_of, with_modelzoo, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_of("llama"), run)
    masks = {name: torch.ones(8, 8, dtype=torch.bool) for name in load_mask(run / "masks.safetensors")[0]}
    save_mask(masks, run / "masks.safetensors")
    with pytest.raises(PhoenixError, match="another size"):
        export_run(run, tmp_path / "job", "static", CHANGES, with_modelzoo)


def test_the_record_is_json_that_says_what_was_done(exported):
    record = json.loads((exported("mixtral", "sparse_lora") / "phoenix.json").read_text())
    assert record["shape"]["kind"] == "mixtral"
    assert len(record["weights"]) == 8  # its experts are no linears, and nothing prunes them
    assert record["lora"]["r"] == 4
