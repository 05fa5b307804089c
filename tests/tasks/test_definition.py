import pytest
import yaml

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.tasks.definition import BUILT_IN, harness_config, load_definition

GENERATE = {
    "output_type": "generate_until",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
    "metric_list": [{"metric": "exact_match"}],
}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": ["no", "yes"],
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


def write(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "task.yaml").write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return str(folder)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_definitions(name):
    definition = load_definition(name)
    assert definition.name == name
    assert definition.config["metadata"]["version"]
    # math_train is a pool to train on, which is on no hub
    assert name == "math_train" or definition.config["dataset_path"].count("/") == 1
    assert definition.prompt_fields
    assert set(definition.prompt_fields) <= definition.fields


def test_gsm8k_keeps_the_prompt_and_the_filters_of_the_harness():
    from pathlib import Path

    import lm_eval.tasks

    theirs = yaml.safe_load((Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml").read_text())
    ours = load_definition("gsm8k").config
    for key in ("doc_to_text", "doc_to_target", "filter_list", "metric_list", "dataset_path"):
        assert ours[key] == theirs[key]
    assert ours["metadata"]["version"] == theirs["metadata"]["version"]
    assert ours["generation_kwargs"]["until"] == theirs["generation_kwargs"]["until"]


@pytest.mark.parametrize(("config", "metric"), [(GENERATE, "exact_match,none"), (CHOICE, "acc,none")])
def test_folder_task(tmp_path, config, metric):
    definition = load_definition(write(tmp_path / "mine", config))
    assert definition.name == "mine"
    assert definition.metric == metric
    assert definition.config["doc_to_text"] == config["doc_to_text"]


def test_declared_metric(tmp_path):
    config = CHOICE | {"metadata": {"phoenix_metric": "acc_norm,none"}}
    assert load_definition(write(tmp_path / "mine", config)).metric == "acc_norm,none"
    with pytest.raises(PhoenixError, match="the task has acc,none, acc_norm,none"):
        load_definition(write(tmp_path / "mine", CHOICE | {"metadata": {"phoenix_metric": "f1,none"}}))


def test_lm_eval_gets_a_copy():
    definition = load_definition("gsm8k")
    harness_config(definition)["generation_kwargs"]["until"].append("changed")
    assert "changed" not in definition.config["generation_kwargs"]["until"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GENERATE | {"process_results": "x"}, "process_results: not a key of a task folder"),
        (GENERATE | {"include": "other.yaml"}, "include: not a key"),
        (GENERATE | {"unsafe_code": True}, "unsafe_code: not a key"),
        (GENERATE | {"doc_to_text": "{{ ''.__class__ }}"}, "doc_to_text: the template uses"),
        (GENERATE | {"doc_to_text": "the same for all!"}, "uses no field"),
        (GENERATE | {"doc_to_text": 3}, "doc_to_text: "),
        (GENERATE | {"metric_list": [{"metric": "bleu"}]}, "metric_list.0.metric"),
        (GENERATE | {"metric_list": [{"metric": "exact_match", "hf_evaluate": True}]}, "metric_list.0.hf_evaluate"),
        (GENERATE | {"metric_list": [{"metric": "acc"}]}, "doesn't fit the output_type"),
        (GENERATE | {"generation_kwargs": {"until": ["\n"], "do_sample": True}}, "generation_kwargs.do_sample"),
        (GENERATE | {"generation_kwargs": {"until": ["\n"], "custom_generate": "x/y"}}, "generation_kwargs.custom"),
        (GENERATE | {"filter_list": [{"name": "a", "filter": [{"function": "custom"}]}]}, "filter_list.0.filter.0"),
        (
            GENERATE | {"filter_list": [{"name": "a", "filter": [{"function": "regex", "regex_pattern": "("}]}]},
            "not a regular expression",
        ),
        (GENERATE | {"training_split": "../../train"}, "training_split"),
        (GENERATE | {"dataset_path": "/somewhere/else"}, "dataset_path"),
        (GENERATE | {"dataset_path": "json"}, "dataset_path: 'json' is no data set .* put train.jsonl and test.jsonl"),
        ({**CHOICE, "doc_to_choice": None}, "needs doc_to_choice"),
        ({}, "output_type"),
        ("- a list\n", "a mapping"),
        ("a: [", "not a YAML file"),
        ("doc_to_text: !function os.system\n", r"line 1: `!function` runs code"),
        ("a: !!python/object/apply:os.system ['x']\n", "not a YAML file"),
    ],
)
def test_what_a_folder_may_not_say(tmp_path, config, message):
    with pytest.raises(PhoenixError, match=message) as caught:
        load_definition(write(tmp_path / "mine", config))
    assert "task.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_task(tmp_path):
    with pytest.raises(PhoenixError, match="boolq.*, gsm8k.*, mawps"):
        load_definition("gsm9k")
    with pytest.raises(PhoenixError, match=r"has no task\.yaml"):
        load_definition(str(tmp_path))
