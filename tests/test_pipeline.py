"""The whole story on a tiny model, undisturbed and killed at every turn."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from phoenix_sparse import pipeline
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_json, sha256
from phoenix_sparse.jsonl import read_jsonl
from phoenix_sparse.masks import load_mask, masks_sha256
from phoenix_sparse.models import prunable_linears
from phoenix_sparse.recipe import dump_recipe, load_recipe
from small_runs import small

STAGES = [
    *("sparsify", "finetune", "search", "merge", "evaluate"),
    *("baseline dense", "baseline pruned", "baseline dense_lora", "flops", "report"),
]
FILES = {
    *("recipe.yaml", "manifest.json", "report.html", "README.md", ".lock"),
    *("masks.safetensors", "allocation.json", "plots/sparsity.png", "sparse/model.safetensors", "sparse/config.json"),
    *("adapter/super/adapter_model.safetensors", "adapter/super/adapter_config.json", "adapter/super/phoenix.json"),
    *("adapter/chosen/adapter_model.safetensors", "adapter/chosen/adapter_config.json", "adapter/chosen/phoenix.json"),
    *("tune.json", "search.json", "merged/model.safetensors", "merged/config.json", "certificate.json"),
    *("sparse/tokenizer.json", "merged/tokenizer.json", "eval.json", "perplexity.json", "flops.json"),
    *("baselines/dense/eval.json", "baselines/pruned/eval.json", "baselines/dense_lora/eval.json"),
    *("predictions.jsonl", "baselines/dense/predictions.jsonl", "baselines/pruned/predictions.jsonl"),
    "baselines/dense_lora/predictions.jsonl",
    *("baselines/dense_lora/tune.json", "baselines/dense_lora/merged/model.safetensors"),
    "baselines/dense_lora/adapter/adapter_model.safetensors",
}


@pytest.fixture(scope="session")
def choices(tmp_path_factory) -> Path:
    """Is a sum even? Answered by choosing, so that a model that knows nothing is right half of the time."""
    directory = tmp_path_factory.mktemp("tasks") / "even"
    directory.mkdir()
    pairs = [(a, b) for a in range(10) for b in range(10)]
    for split, part in {"train": pairs[30:], "validation": pairs[:10], "test": pairs[10:30]}.items():
        rows = [json.dumps({"question": f"{a}+{b}", "label": (a + b) % 2}) for a, b in part]
        (directory / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    (directory / "task.yaml").write_text(
        'output_type: multiple_choice\ndoc_to_text: "{{question}} even?"\ndoc_to_choice: [yes, no]\n'.replace(
            "[yes, no]", '["yes", "no"]'
        )
        + "doc_to_target: label\n"
        "metric_list: [{metric: acc}]\n"
    )
    return directory


def phx_run(recipe: Path, out: Path, *options: str, kill_at: str | None = None) -> list[str]:
    """`phx run` in a process of its own that tells every step of its progress; give what it told.

    It is killed as soon as a line begins with `kill_at`, and must end well otherwise.
    """
    code = "from phoenix_sparse import cli, console; console.LINE_EVERY = 0; cli.main()"
    command = [sys.executable, "-c", code, "run", str(recipe), "--out", str(out), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    heard = []
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as one:
        assert one.stderr is not None
        for line in one.stderr:
            heard.append(line.strip())
            if kill_at is not None and heard[-1].startswith(kill_at):
                one.send_signal(signal.SIGKILL)
                break
    assert one.returncode == (0 if kill_at is None else -signal.SIGKILL), heard
    return heard


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory, model_directory, choices) -> Path:
    directory = tmp_path_factory.mktemp("recipe")
    (directory / "text.txt").write_text(20 * "Three and four are seven. ")
    chosen = small(
        *(model_directory, choices, f"evaluate.perplexity.text={directory / 'text.txt'}"),
        *("evaluate.perplexity.context_length=32",),
    )
    (directory / "recipe.yaml").write_text(dump_recipe(chosen))
    return directory / "recipe.yaml"


@pytest.fixture(scope="module")
def calm(tmp_path_factory, recipe_file) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("runs") / "calm"
    phx_run(recipe_file, out)
    return out


def files_of(run: Path) -> set[str]:
    return {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}


def test_every_file_is_there_and_no_other(calm, recipe_file):
    tokenizers = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"}
    models = ("sparse", "merged", "baselines/dense_lora/merged")
    adapters = ("adapter_config.json", "phoenix.json")
    more = {f"{model}/{name}" for model in models for name in tokenizers}
    more |= {f"baselines/dense_lora/adapter/{name}" for name in adapters}
    more |= {f"baselines/{name}/perplexity.json" for name in ("dense", "pruned", "dense_lora")}
    assert files_of(calm) == FILES | more
    assert load_recipe(calm / "recipe.yaml") == load_recipe(recipe_file)


def test_the_manifest_vouches_for_every_file(calm, model_directory, choices):
    manifest = read_json(calm / "manifest.json")
    assert sorted(manifest["stages"]) == sorted(STAGES)
    named = set()
    for record in manifest["stages"].values():
        assert record["status"] == "done"
        for name, digest in record["outputs"].items():
            assert sha256(calm / name) == digest
            named |= {name} if (calm / name).is_file() else {f"{name}/{file}" for file in files_of(calm / name)}
    assert named == files_of(calm) - {"manifest.json", "recipe.yaml", ".lock"}
    assert manifest["inputs"]["model"] == {"path": str(model_directory), "sha256": sha256(model_directory)}
    task = manifest["inputs"]["task"]
    assert (task["train"], task["validation"], task["test"]) == (70, 10, 20)
    assert task["sources"]["test.jsonl"] == sha256(choices / "test.jsonl")


def test_the_merged_model_is_plain_and_has_the_zeros(calm):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    masks, facts = load_mask(calm / "masks.safetensors")
    certificate = read_json(calm / "certificate.json")
    model = AutoModelForCausalLM.from_pretrained(calm / "merged")
    assert type(model) is LlamaForCausalLM
    layers = prunable_linears(model)
    assert list(layers) == list(certificate["layers"]) or set(layers) == set(certificate["layers"])
    for name, layer in layers.items():
        assert not (layer.weight[~masks[name]] != 0).any()
        assert certificate["layers"][name]["nnz"] == int((layer.weight != 0).sum())
        assert int(masks[name].sum()) == masks[name].numel() // 2
    assert facts["target_sparsity"] == 0.5
    # The training changed what was kept.
    sparse = AutoModelForCausalLM.from_pretrained(calm / "sparse")
    assert all(not torch.equal(layers[n].weight, layer.weight) for n, layer in prunable_linears(sparse).items())


def test_the_certificate_is_of_these_files(calm):
    certificate = read_json(calm / "certificate.json")
    masks, _ = load_mask(calm / "masks.safetensors")
    assert certificate["off_mask_nonzeros"] == 0
    assert certificate["max_abs_logit_difference"] < 1e-5
    assert certificate["logits_compared"] > 1000
    assert certificate["argmax_agreement"] == 1
    assert certificate["mode"] == "sparse_to_sparse"
    assert certificate["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert certificate["masks_sha256"] == masks_sha256(masks)
    assert certificate["adapter_sha256"] == sha256(calm / "adapter/chosen")
    assert certificate["merged_sha256"] == sha256(calm / "merged")
    assert read_json(calm / "adapter/chosen/phoenix.json")["masks_sha256"] == masks_sha256(masks)
    allocation = read_json(calm / "allocation.json")
    assert {name: layer["nnz"] for name, layer in allocation["layers"].items()} == {
        name: int(mask.sum()) for name, mask in masks.items()
    }


def test_the_search_chose_among_what_it_tried(calm):
    search = read_json(calm / "search.json")
    candidates = {candidate["id"]: candidate for candidate in search["candidates"]}
    assert len(candidates) <= search["budget"] == 7
    chosen = candidates[search["choice"]]
    assert chosen["accuracy"] == max(candidate["accuracy"] for candidate in candidates.values())
    assert search["validation_examples"] == 10
    config = read_json(calm / "adapter/chosen/adapter_config.json")
    ranks = {name: config["rank_pattern"].get(name, config["r"]) for name in chosen["ranks"]}
    assert ranks == chosen["ranks"]


@pytest.mark.parametrize("place", [".", "baselines/dense", "baselines/pruned", "baselines/dense_lora"])
def test_accuracies_are_in_the_harness_s_schema(calm, place):
    results = read_json(calm / place / "eval.json")
    assert {"results", "configs", "versions", "n-shot", "n-samples", "higher_is_better", "config"} <= results.keys()
    ours = results["phoenix"]
    assert ours["accuracy"] == results["results"]["even"]["acc,none"]
    assert ours["stderr"] == results["results"]["even"]["acc_stderr,none"]
    assert (ours["metric"], ours["task"], ours["split"], ours["examples"]) == ("acc,none", "even", "test", 20)
    assert 0 < ours["accuracy"] <= 1
    answers = read_jsonl(calm / place / "predictions.jsonl")
    assert sum(answer["score"] for answer in answers) == pytest.approx(20 * ours["accuracy"])
    assert all(answer["choices"] == ["yes", "no"] and answer["prompt"].endswith("even?") for answer in answers)
    assert read_json(calm / place / "perplexity.json")["perplexity"] > 1


def test_the_report_shows_what_was_measured(calm):
    html, card = ((calm / name).read_text(encoding="utf-8") for name in ("report.html", "README.md"))
    for place in (".", "baselines/dense", "baselines/pruned", "baselines/dense_lora"):
        accuracy = read_json(calm / place / "eval.json")["phoenix"]["accuracy"]
        assert f"{100 * accuracy:.1f}" in html
        assert f"{100 * accuracy:.1f}" in card
    rows = {place: read_jsonl(calm / place / "predictions.jsonl") for place in (".", "baselines/pruned")}
    apart = [mine["score"] - theirs["score"] for mine, theirs in zip(*rows.values(), strict=True)]
    spread = (statistics.variance(apart) / len(apart)) ** 0.5
    assert f"minus pruning alone: {100 * statistics.fmean(apart):+.1f} ± {100 * spread:.1f}".replace("-", "−") in html
    assert "on the same examples" in html
    assert sha256(calm / "merged") in html or sha256(calm / "merged")[:12] in html


def without(value: Any, *keys: str) -> Any:
    """A copy of nested values without what differs from run to run."""
    if isinstance(value, dict):
        return {key: without(inner, *keys) for key, inner in value.items() if key not in keys}
    return [without(inner, *keys) for inner in value] if isinstance(value, list) else value


def kept(heard: list[str]) -> list[str]:
    return [line.partition(":")[0] for line in heard if line.endswith(": done before, kept")]


def test_a_run_that_is_killed_at_every_turn_ends_like_a_calm_one(calm, recipe_file, tmp_path):
    out = tmp_path / "killed"
    moments = {
        "pruning block 1/2": "sparsify",
        "training step 5/7": "finetune",
        "sub-adapter 3/7": "search",
        "merge ...": "merge",
        "training step 3/7": "baseline dense_lora",
    }
    done: list[str] = []
    for moment, stage in moments.items():
        heard = phx_run(recipe_file, out, *(["--resume"] if done or out.exists() else []), kill_at=moment)
        assert kept(heard) == done
        records = read_json(out / "manifest.json")["stages"]
        done = [name for name in STAGES if records.get(name, {}).get("status") == "done"]
        assert done == STAGES[: STAGES.index(stage)]
    assert kept(phx_run(recipe_file, out, "--resume")) == done

    # By content: safetensors writes the entries of a header in any order.
    (masks, facts), (calm_masks, calm_facts) = (load_mask(run / "masks.safetensors") for run in (out, calm))
    assert (masks_sha256(masks), facts) == (masks_sha256(calm_masks), calm_facts)
    for name in ("sparse", "adapter/super", "adapter/chosen", "merged", "certificate.json"):
        assert sha256(out / name) == sha256(calm / name), name
    assert sha256(out / "baselines/dense_lora/merged") == sha256(calm / "baselines/dense_lora/merged")
    for name in ("eval.json", "baselines/dense/eval.json", "baselines/dense_lora/eval.json", "perplexity.json"):
        one, two = (without(read_json(run / name), "seconds", "date") for run in (out, calm))
        assert one == two, name
    for name in ("search.json", "flops.json", "allocation.json"):
        assert without(read_json(out / name), "seconds") == without(read_json(calm / name), "seconds"), name
    assert read_json(out / "tune.json")["resumed_from"] == 4
    assert read_json(out / "tune.json")["log"] == read_json(calm / "tune.json")["log"]
    assert read_json(out / "baselines/dense_lora/tune.json")["resumed_from"] == 2
    assert {record["status"] for record in read_json(out / "manifest.json")["stages"].values()} == {"done"}
    assert files_of(out) == files_of(calm)


def test_a_finished_run_is_kept_and_a_tampered_one_mended(calm, recipe_file):
    before = {name: sha256(calm / name) for name in files_of(calm)}
    heard = []
    recipe = load_recipe(recipe_file)
    pipeline.run(recipe, calm, resume=True, announce=lambda *words: heard.append(words))
    assert heard == [(stage, "kept") for stage in STAGES]
    assert {name: sha256(calm / name) for name in files_of(calm)} == before
    (calm / "flops.json").write_text("{}")
    heard.clear()
    pipeline.run(recipe, calm, resume=True, announce=lambda *words: heard.append(words))
    assert [stage for stage, state in heard if state == "started"] == ["flops", "report"]
    assert sha256(calm / "flops.json") == before["flops.json"]


def test_examples_that_all_are_too_long_are_told_before_the_pruning(tmp_path, model_directory, task_directory):
    """One that fits is enough; what is left out beside it is counted."""
    task = tmp_path / "sums"
    shutil.copytree(task_directory, task)
    rows = [{"question": f"{number}+1", "answer": "one more than that " + str(number)} for number in range(20)]
    (task / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    recipe = small(model_directory, task, "finetune.max_length=8")
    with pytest.raises(PhoenixError, match=r"no training example fits finetune.max_length"):
        pipeline.prepare(recipe)
    with (task / "train.jsonl").open("a") as file:
        file.write(json.dumps({"question": "1+5", "answer": "6"}) + "\n")
    pipeline.prepare(recipe)
