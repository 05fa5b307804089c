from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from phoenix_sparse import demo
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.pruning.calibration import (
    calibration_tokens,
    choose_examples,
    labelled_calibration_tokens,
)
from phoenix_sparse.pruning.settings import CalibrationSettings


def test_rows_are_full_and_documents_are_parted(tokenizer):
    settings = CalibrationSettings(samples=3, length=16)
    tokens = calibration_tokens(settings, ["ab" * 9, "cde" * 6, "f" * 20], tokenizer, max_length=256, seed=0)
    assert tokens.shape == (3, 16)
    text = tokenizer.decode(tokens.reshape(-1))
    assert set(text.replace("<end>", "|")) <= set("abcdef|")
    assert text.count("<end>") >= 2


def test_the_seed_chooses(tokenizer):
    def tokens(seed):
        texts = [f"text {n}" for n in range(100)]
        return calibration_tokens(
            CalibrationSettings(samples=2, length=32), texts, tokenizer, max_length=256, seed=seed
        )

    assert torch.equal(tokens(1), tokens(1))
    assert not torch.equal(tokens(1), tokens(2))


def test_passages_of_a_text_depend_on_the_seed(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text(" ".join(str(number) for number in range(1000)))
    settings = CalibrationSettings(source="text", text=tmp_path / "t.txt", samples=3, length=32)
    one, same, other = (calibration_tokens(settings, [], tokenizer, max_length=256, seed=seed) for seed in (1, 1, 2))
    assert one.shape == (3, 32)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_examples_keep_the_tokenizer_s_special_tokens(tokenizer):
    class WithStart:
        eos_token_id = 256

        def __call__(self, text):
            return SimpleNamespace(input_ids=[255, *tokenizer(text).input_ids])

    settings = CalibrationSettings(samples=1, length=8)
    tokens = calibration_tokens(settings, ["ab", "cd"], WithStart(), max_length=8, seed=0)
    assert tokens[0].tolist().count(255) == tokens[0].tolist().count(256) == 2


def test_fewer_sequences_where_there_is_less_text(tokenizer):
    tokens = calibration_tokens(CalibrationSettings(samples=9, length=8), ["a" * 20], tokenizer, max_length=256, seed=0)
    assert tokens.shape == (2, 8)


def test_the_model_s_context_is_not_exceeded(tokenizer):
    settings = CalibrationSettings(samples=1, length=512)
    assert calibration_tokens(settings, ["a" * 600], tokenizer, max_length=64, seed=0).shape == (1, 64)


def test_too_little_text_is_an_error(tokenizer):
    with pytest.raises(PhoenixError, match="less than one sequence"):
        calibration_tokens(CalibrationSettings(length=64), ["a"], tokenizer, max_length=256, seed=0)


def test_text_comes_from_a_file(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("first document\n<|endoftext|>\nsecond one")
    settings = CalibrationSettings(source="text", text=tmp_path / "t.txt", samples=1, length=20)
    tokens = calibration_tokens(settings, [], tokenizer, max_length=256, seed=0)
    assert "<|endoftext|>" not in tokenizer.decode(tokens[0])
    missing = CalibrationSettings(source="text", text=tmp_path / "none.txt")
    with pytest.raises(PhoenixError, match=r"none\.txt can't be read"):
        calibration_tokens(missing, [], tokenizer, max_length=256, seed=0)


def test_examples_are_chosen_by_the_seed():
    examples = [f"example {number}" for number in range(50)]
    chosen = choose_examples(examples, 20, seed=1)
    assert len(chosen) == len(set(chosen)) == 20
    assert set(chosen) <= set(examples)
    assert choose_examples(examples, 20, seed=1) == chosen
    assert set(choose_examples(examples, 20, seed=2)) != set(chosen)
    assert chosen[:5] == choose_examples(examples, 5, seed=1)  # more of them are the same ones and others


def test_where_there_are_no_more_examples_all_are_chosen():
    assert sorted(choose_examples(["a", "b", "c"], 7, seed=0)) == ["a", "b", "c"]
    assert choose_examples([], 7, seed=0) == []


def test_labels_mark_completions_of_the_same_tokens():
    tokenizer = AutoTokenizer.from_pretrained(demo.model_directory())
    pairs = [(f"Ann has {n} apples. How many?", f" {n} apples\n#### {n}") for n in range(40)]
    chosen = CalibrationSettings(samples=4, length=64)
    tokens, labels = labelled_calibration_tokens(chosen, pairs, tokenizer, max_length=256, seed=3)
    plain = calibration_tokens(chosen, [p + c for p, c in pairs], tokenizer, max_length=256, seed=3)
    assert torch.equal(tokens, plain)
    counted = labels != -100
    assert torch.equal(labels[counted], tokens[counted])
    assert 0.2 < float(counted.float().mean()) < 0.8
    shown = tokenizer.decode(tokens[0][counted[0]])
    assert "####" in shown
    assert "Ann" not in shown
