import json
import random

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.evaluation.harness import evaluate
from phoenix_sparse.tasks import TaskSettings, load_task

WORDS = ["red", "green", "blue", "big", "old"]


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level tokenizer whose padding token is its end token, as many have."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0} | {letter: index for index, letter in enumerate(alphabet, start=1)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def make_task(folder, **keys):
    rows = [
        {
            "question": f"Is the {WORDS[n % 5]} box{' here' * (n % 4)} number {n}?",
            "answer": WORDS[n % 3],
            "label": n % 2,
        }
        for n in range(24)
    ]
    for split, part in (("train", rows[:10]), ("validation", rows[10:14]), ("test", rows[14:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "task.yaml").write_text(yaml.safe_dump({"task": "boxes", "doc_to_text": "{{question}}\nAnswer:"} | keys))
    return load_task(TaskSettings(name=str(folder)), seed=0)


@pytest.fixture
def choosing(tmp_path):
    return make_task(
        tmp_path,
        output_type="multiple_choice",
        doc_to_choice=["no", "yes"],
        doc_to_target="label",
        metric_list=[{"metric": "acc"}],
    )


@pytest.fixture
def generating(tmp_path):
    return make_task(
        tmp_path,
        output_type="generate_until",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 12},
        metric_list=[{"metric": "exact_match"}],
    )


def by_hand(model, tokenizer, prompt, choice):
    """The log-likelihood of a choice after a prompt, without the harness."""
    start, whole = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + choice, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        scores = model(whole).logits.log_softmax(-1)[0]
    return sum(float(scores[place - 1, whole[0, place]]) for place in range(start, whole.shape[1]))


def test_multiple_choice_agrees_with_a_count_by_hand(model, tokenizer, choosing):
    results = evaluate(model, tokenizer, choosing, batch_size=4, seed=0, with_predictions=True)
    right = []
    for row in choosing.rows["test"]:
        scores = [by_hand(model, tokenizer, f"{row['question']}\nAnswer:", choice) for choice in (" no", " yes")]
        right.append(float(scores.index(max(scores)) == row["label"]))
    accuracy = sum(right) / len(right)
    assert results["phoenix"]["accuracy"] == pytest.approx(accuracy)
    spread = (sum((score - accuracy) ** 2 for score in right) / (len(right) - 1) / len(right)) ** 0.5
    assert results["phoenix"]["stderr"] == pytest.approx(spread)
    assert results["phoenix"]["stderr"] == results["results"]["boxes"]["acc_stderr,none"]
    for found, row, score in zip(results["predictions"], choosing.rows["test"], right, strict=True):
        prompt = f"{row['question']}\nAnswer:"
        assert (found["prompt"], found["choices"], found["target"]) == (prompt, ["no", "yes"], row["label"])
        expected = [by_hand(model, tokenizer, prompt, choice) for choice in (" no", " yes")]
        assert found["loglikelihoods"] == pytest.approx(expected, abs=1e-4)
        assert found["score"] == score == float(found["prediction"] == found["target"])
    assert [found["example"] for found in results["predictions"]] == list(range(len(right)))
    assert len({found["hash"] for found in results["predictions"]}) == len(right)
    assert "samples" not in results


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_generation_agrees_with_greedy_decoding_one_by_one(model, tokenizer, generating, batch_size):
    results = evaluate(model, tokenizer, generating, batch_size=batch_size, seed=0, with_predictions=True)
    for found, row in zip(results["predictions"], generating.rows["test"], strict=True):
        tokens = tokenizer(f"{row['question']}\nAnswer:")["input_ids"]
        start = len(tokens)
        with torch.no_grad():
            while len(tokens) < start + 12 and tokens[-1] != 0:
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        text = tokenizer.decode(tokens[start:], skip_special_tokens=True).split("\n")[0]
        assert found["output"] == text
        assert found["score"] == float(found["prediction"] == found["target"])
    accuracy = sum(found["score"] for found in results["predictions"]) / len(results["predictions"])
    assert results["phoenix"]["accuracy"] == pytest.approx(accuracy)


def test_results_have_the_schema(model, tokenizer, choosing):
    results = evaluate(model, tokenizer, choosing, batch_size=4, limit=6, seed=3)
    json.dumps(results, allow_nan=False)
    for key in ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config", "date"):
        assert key in results
    assert "samples" not in results
    assert "custom_dataset" not in results["configs"]["boxes"]
    assert results["n-samples"]["boxes"] == {"original": 10, "effective": 6}
    phoenix = dict(results["phoenix"])
    assert phoenix.pop("seconds") > 0
    assert phoenix.pop("accuracy") == results["results"]["boxes"]["acc,none"]
    assert phoenix.pop("stderr") > 0
    assert phoenix == {
        "metric": "acc,none",
        "task": "boxes",
        "split": "test",
        "examples": 6,
        "num_fewshot": 0,
        "truncated": 0,
    }


def test_one_example_has_no_standard_error(model, tokenizer, choosing):
    results = evaluate(model, tokenizer, choosing, batch_size=4, limit=1, seed=0)
    assert results["phoenix"]["stderr"] is None
    assert results["results"]["boxes"]["acc_stderr,none"] is None


def test_validation_split(model, tokenizer, choosing):
    phoenix = evaluate(model, tokenizer, choosing, split="validation", batch_size=4, seed=0)["phoenix"]
    assert (phoenix["split"], phoenix["examples"]) == ("validation", 4)


def test_few_shot_prompts_follow_the_seed(model, tokenizer, choosing):
    model.config.max_position_embeddings = 512

    def shown(seed):
        results = evaluate(model, tokenizer, choosing, batch_size=4, seed=seed, num_fewshot=2, with_predictions=True)
        assert results["n-shot"] == {"boxes": 2}
        return [found["prompt"] for found in results["predictions"]]

    assert shown(0) == shown(0)
    assert shown(0) != shown(1)
    assert all(prompt.count("Answer:") == 3 for prompt in shown(0))


def test_nothing_is_left_changed(model, tokenizer, generating, capfd):
    model.train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state, python_state, side = torch.get_rng_state(), random.getstate(), tokenizer.padding_side
    evaluate(model, tokenizer, generating, batch_size=4, limit=3, seed=0)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state
    assert tokenizer.padding_side == side
    assert capfd.readouterr() == ("", "")


def test_modes_come_back_after_an_error(model, tokenizer, generating, monkeypatch):
    model.train()
    monkeypatch.setattr(type(model), "generate", lambda *_args, **_options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, tokenizer, generating, batch_size=4, seed=0)
    assert all(module.training for module in model.modules())


def test_dropout_is_off(model, tokenizer, choosing):
    expected = evaluate(model, tokenizer, choosing, batch_size=4, seed=0, with_predictions=True)["predictions"]
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    assert evaluate(model, tokenizer, choosing, batch_size=4, seed=0, with_predictions=True)["predictions"] == expected


def test_an_adapter_scores_as_its_merge(model, tokenizer, generating):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    before = evaluate(adapted, tokenizer, generating, batch_size=4, seed=0, with_predictions=True)
    after = evaluate(adapted.merge_and_unload(), tokenizer, generating, batch_size=4, seed=0, with_predictions=True)
    assert before["predictions"] == after["predictions"]
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    changed = evaluate(model, tokenizer, generating, batch_size=4, seed=0, with_predictions=True)
    assert changed["predictions"] != after["predictions"]


def test_truncated_prompts_are_counted(model, tokenizer, generating):
    room = 30 - 12
    model.config.max_position_embeddings = 30
    lengths = [len(tokenizer(f"{row['question']}\nAnswer:")["input_ids"]) for row in generating.rows["test"]]
    phoenix = evaluate(model, tokenizer, generating, batch_size=4, seed=0)["phoenix"]
    assert phoenix["truncated"] == sum(length > room for length in lengths) > 0


def test_truncated_choices_are_counted(model, tokenizer, choosing):
    rows = choosing.rows["test"]
    longest = max(len(tokenizer(f"{row['question']}\nAnswer: yes")["input_ids"]) for row in rows)

    def run(context):
        model.config.max_position_embeddings = context
        return evaluate(model, tokenizer, choosing, batch_size=4, seed=0, with_predictions=True)

    whole, fitting, cut = run(96), run(longest - 1), run(longest - 2)
    assert [results["phoenix"]["truncated"] > 0 for results in (whole, fitting, cut)] == [False, False, True]
    assert fitting["predictions"] == whole["predictions"] != cut["predictions"]


def test_a_context_without_room_is_refused(model, tokenizer, generating):
    model.config.max_position_embeddings = 12
    with pytest.raises(PhoenixError, match=r"up to 12 tokens .* context is 12"):
        evaluate(model, tokenizer, generating, batch_size=4, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"num_fewshot": 11}, "11 solved examples"),
        ({"num_fewshot": -1}, "-1 solved examples"),
    ],
)
def test_bad_numbers(model, tokenizer, choosing, options, message):
    with pytest.raises(PhoenixError, match=message):
        evaluate(model, tokenizer, choosing, **{"batch_size": 4, "seed": 0} | options)
