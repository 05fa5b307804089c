"""Every kind of recipe goes all the way; one that can't is refused at its beginning."""

import shutil

import pytest

from phoenix_sparse import pipeline, steps
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_json, sha256
from phoenix_sparse.finetuning.settings import SearchSettings
from phoenix_sparse.masks import load_mask
from phoenix_sparse.models import save_model
from phoenix_sparse.recipe import Recipe, check, override
from small_runs import QUICK, small
from tiny import CONFIGS, make_model


@pytest.mark.parametrize("importance", ["wanda", "magnitude", "random"])
def test_every_importance_leads_to_a_clean_merge(tmp_path, model_directory, task_directory, importance):
    recipe = small(
        model_directory, task_directory, *QUICK, f"sparsify.importance={importance}", "sparsify.sparsity=0.7"
    )
    out = pipeline.run(recipe, tmp_path / "run")
    certificate = read_json(out / "certificate.json")
    assert certificate["off_mask_nonzeros"] == 0
    assert certificate["sparsity"] == pytest.approx(0.7, abs=0.02)
    assert read_json(out / "allocation.json")["importance"] == importance
    assert read_json(out / "flops.json")["decode"]["total"]["reduction"] > 1.2
    assert not (out / "baselines").exists()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_architecture_goes_all_the_way(tmp_path, task_directory, tokenizer, kind, dtype):
    save_model(make_model(kind), tokenizer, tmp_path / "model")
    changes = (*QUICK, f"dtype={dtype}", "finetune.gradient_checkpointing=true")
    run = pipeline.run(small(tmp_path / "model", task_directory, *changes), tmp_path / "run")
    certificate = read_json(run / "certificate.json")
    assert certificate["off_mask_nonzeros"] == 0
    assert certificate["max_abs_logit_difference"] == 0
    assert certificate["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert certificate["dtype"] == dtype
    assert read_json(run / "flops.json")["prefill"]["total"]["sparse"] > 0


@pytest.mark.parametrize("merge", ["dense", "remask"])
def test_a_dense_update_shows_what_it_costs(tmp_path, model_directory, task_directory, merge):
    changes = ("finetune.mode=sparse_to_dense", f"finetune.dense_merge={merge}", "finetune.dropout=0.1")
    out = pipeline.run(small(model_directory, task_directory, *QUICK, *changes), tmp_path / "run")
    certificate = read_json(out / "certificate.json")
    assert certificate["mode"] == "sparse_to_dense"
    flops = read_json(out / "flops.json")
    if merge == "dense":
        assert certificate["off_mask_nonzeros"] > 1000
        assert certificate["sparsity"] < 0.01
        assert certificate["max_abs_logit_difference"] < 1e-4
        # The zeros are filled, so no FLOPs are saved.
        assert flops["decode"]["total"]["reduction"] == 1
        assert flops["parameters"]["density"] == 1
    else:
        assert certificate["off_mask_nonzeros"] == 0
        assert certificate["sparsity"] == pytest.approx(0.5, abs=0.01)
        assert certificate["max_abs_logit_difference"] > 1e-4
        assert flops["decode"]["total"]["reduction"] > 1.2


@pytest.mark.parametrize(
    "change", ["method=hira", "sampling=sandwich", "scale_rule=alpha_over_rank"], ids=lambda change: change
)
def test_every_kind_of_super_adapter_goes_all_the_way(tmp_path, model_directory, task_directory, change):
    """With ranks by kind of layer, and beside the baseline that has the recipe's largest ranks."""
    ranks = "finetune.ranks={q_proj: [6, 3], 'mlp.*': [5], '*': [4, 2]}"
    changes = (*QUICK[1:], "evaluate.baselines=[dense_lora]", ranks, f"finetune.{change}", "search.hill_climb=2")
    recipe = small(model_directory, task_directory, *changes)
    out = pipeline.run(recipe, tmp_path / "run")
    certificate = read_json(out / "certificate.json")
    assert certificate["mode"] == "sparse_to_sparse"
    assert certificate["off_mask_nonzeros"] == 0
    assert certificate["max_abs_logit_difference"] == 0
    search = read_json(out / "search.json")
    allowed = {"q_proj": {6, 3}, "up_proj": {5}, "down_proj": {5}, "gate_proj": {5}}
    for candidate in search["candidates"]:
        assert all(rank in allowed.get(name.rsplit(".", 1)[-1], {4, 2}) for name, rank in candidate["ranks"].items())
    field, value = change.split("=")
    assert read_json(out / "tune.json")[field] == value
    baseline = read_json(out / "baselines/dense_lora/tune.json")
    assert (baseline["method"], baseline["sampling"]) == ("lora", "uniform")
    assert baseline["trainable_parameters"] == read_json(out / "tune.json")["trainable_parameters"]
    assert "ranks from 6, 3 or 5 or 4, 2." in (out / "report.html").read_text()
    with pytest.raises(PhoenixError, match=r"finetune.ranks: 'w_proj' fits no adapted linear"):
        pipeline.prepare(small(model_directory, task_directory, "finetune.ranks={w_proj: [2], '*': [4, 2]}"))


def test_trained_weights_go_all_the_way(tmp_path, model_directory, task_directory):
    """Stopped by an error in the search, gone on with, and beside a baseline that is an adapter."""
    changes = (*QUICK[1:], "evaluate.baselines=[dense_lora]", "finetune.method=full", "finetune.weight_decay=0.1")
    changes += ("finetune.validate_every=2", "finetune.batching=packed", "dtype=bfloat16")
    with pytest.raises(PhoenixError, match="evaluate.dense_lora_learning_rate: the dense LoRA is an adapter"):
        pipeline.prepare(small(model_directory, task_directory, *changes))
    changes += ("evaluate.dense_lora_learning_rate=0.01",)
    recipe = small(model_directory, task_directory, *changes)

    def stop(stage, state):
        if (stage, state) == ("search", "started"):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        pipeline.run(recipe, tmp_path / "run", announce=stop)
    out = pipeline.run(recipe, tmp_path / "run", resume=True)
    certificate = read_json(out / "certificate.json")
    assert certificate["mode"] == "sparse_to_sparse"
    assert certificate["off_mask_nonzeros"] == 0
    assert certificate["max_abs_logit_difference"] == 0
    assert certificate["dtype"] == "bfloat16"
    tune, search = read_json(out / "tune.json"), read_json(out / "search.json")
    assert tune["trainable_parameters"] == sum(
        int(mask.sum()) for mask in load_mask(out / "masks.safetensors")[0].values()
    )
    assert len(tune["validation"]["curve"]) == 2
    assert [candidate["ranks"] for candidate in search["candidates"]] == [{}]
    assert read_json(out / "baselines/dense_lora/tune.json")["method"] == "lora"
    assert read_json(out / "flops.json")["decode"]["total"]["reduction"] > 1.2
    assert (out / "report.html").is_file()
    with pytest.raises(PhoenixError, match=r"search.nsga2: .*super has one rank or none, so nothing is searched"):
        steps.search(
            out / "sparse",
            load_mask(out / "masks.safetensors")[0],
            pipeline.open_task(recipe.task, seed=0),
            out / "adapter/super",
            SearchSettings(nsga2=2),
            recipe.evaluate,
            tmp_path / "again",
            steps.Machine("auto", "cpu", 0),
            work=tmp_path / "work",
        )


def test_the_same_recipe_gives_the_same_model_and_another_seed_another(tmp_path, model_directory, task_directory):
    def merged(name, *changes):
        return sha256(
            pipeline.run(small(model_directory, task_directory, *QUICK, *changes), tmp_path / name) / "merged"
        )

    assert merged("one") == merged("two") != merged("three", "seed=1")


def test_what_is_missing_is_told_before_anything_is_written(tmp_path, model_directory, task_directory):
    recipe = small(model_directory, task_directory)
    short, wordless, wider = (tmp_path / name for name in ("short", "wordless", "wider"))
    short.write_text("a few words")
    shutil.copytree(model_directory, wordless, ignore=shutil.ignore_patterns("*token*"))
    shutil.copytree(model_directory, wider)
    config = (wider / "config.json").read_text()
    (wider / "config.json").write_text(config.replace('"intermediate_size": 48', '"intermediate_size": 96'))
    for changes, words in (
        (["model=./nowhere"], "model: ./nowhere is not a directory"),
        (["task=nothing"], "task: 'nothing' is neither built in"),
        (["task.data=./nowhere"], "its data, nowhere, is not a folder"),
        (["task.validation=0"], "no examples to validate with; set task.validation above 0"),
        (["task.num_fewshot=71"], "task.num_fewshot=71 is more than the 70 training examples"),
        (["finetune.targets=[w_proj]"], "finetune.targets: no linear is called w_proj; there are down_proj, gate_proj"),
        (["evaluate.perplexity={text: a.txt, context_length: 1000}"], "the model's whole context is 256"),
        (["evaluate.perplexity={text: nowhere.txt, context_length: 64}"], r"nowhere\.txt: No such file"),
        ([f"evaluate.perplexity={{text: {short}, context_length: 64}}"], "perplexity.text: .* less than one sequence"),
        (
            [f"sparsify.calibration={{source: text, text: {short}, length: 64}}"],
            "calibration.text: .* less than one sequence of 64; give more",
        ),
        ([f"model={wordless}"], "the tokenizer can't be loaded .none of its files is there"),
        ([f"finetune.distill.teacher={wordless}"], "the tokenizer can't be loaded .none of its files is there"),
        ([f"model={wider}"], "by config.json; is it this model's configuration"),
    ):
        values = override(recipe.model_dump(mode="json"), changes)
        with pytest.raises(PhoenixError, match=words):
            pipeline.run(check(Recipe, values, "test"), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_run_is_not_gone_on_with_over_other_data(tmp_path, model_directory, task_directory):
    task = tmp_path / "task"
    task.mkdir()
    for path in task_directory.iterdir():
        (task / path.name).write_bytes(path.read_bytes())
    recipe = small(model_directory, task, *QUICK, "sparsify.importance=random")
    pipeline.run(recipe, tmp_path / "run")
    with (task / "test.jsonl").open("a") as file:
        file.write('{"question": "7+7+7", "answer": "21"}\n')
    with pytest.raises(PhoenixError, match=r"the task has changed since this run began \(test, sources\)"):
        pipeline.run(recipe, tmp_path / "run", resume=True)
