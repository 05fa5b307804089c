"""Perplexity against a reference that goes token by token in float64."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.evaluation import perplexity as module
from phoenix_sparse.evaluation.perplexity import perplexity

CONFIG = LlamaConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=31,
    max_position_embeddings=32,
)


class Letters:
    """A tokenizer of one token a character, with a start token before the text."""

    def __call__(self, text: str, **_: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[1] + [2 + ord(letter) % 29 for letter in text]])}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG).eval()


def reference(model: Any, text: str, length: int, stride: int) -> tuple[float, int]:
    """One forward pass a prediction; a token is scored once, by the first window that reaches it."""
    exact = copy.deepcopy(model).double()
    tokens = Letters()(text)["input_ids"][0].tolist()
    losses, reached = [], 0
    for start in range(0, len(tokens) - length + 1, stride):
        for position in range(1, length):
            # Where windows don't overlap, a window's first token has no context and is never scored.
            if start + position < reached:
                continue
            with torch.no_grad():
                logits = exact(torch.tensor([tokens[start : start + position]])).logits[0, -1]
            losses.append(-torch.log_softmax(logits, 0)[tokens[start + position]].item())
        reached = start + length
    return math.exp(sum(losses) / len(losses)), len(losses)


@given(
    text=st.text("abcdefghijk", min_size=12, max_size=30),
    length=st.integers(2, 9),
    stride=st.integers(1, 9) | st.none(),
    batch_size=st.integers(1, 4),
)
@settings(deadline=None, max_examples=25)
def test_equals_the_reference(model: Any, text: str, length: int, stride: int | None, batch_size: int) -> None:
    stride = min(stride, length) if stride else None
    result = perplexity(model, Letters(), text, context_length=length, stride=stride, batch_size=batch_size)
    expected, count = reference(model, text, length, stride or length)
    assert result["tokens"] == count
    assert result["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert result["context_length"] == length


def test_is_the_mean_of_the_windows_losses_as_in_gptq(model: Any) -> None:
    text = "a text of some length, for three windows"
    tokens = Letters()(text)["input_ids"]
    windows = [tokens[:, start : start + 12] for start in (0, 12, 24)]
    with torch.no_grad():
        losses = [model(window, labels=window).loss.item() for window in windows]
    result = perplexity(model, Letters(), text, context_length=12)
    assert result["windows"] == 3
    assert result["perplexity"] == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)


def test_small_chunks_change_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    whole = perplexity(model, Letters(), text, context_length=10, batch_size=2)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 3 * 2 * CONFIG.vocab_size)
    parts = perplexity(model, Letters(), text, context_length=10, batch_size=2)
    assert parts["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-6)
    assert parts["tokens"] == whole["tokens"]


def test_max_tokens_cuts_the_text(model: Any) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    short = perplexity(model, Letters(), text, context_length=8, max_tokens=17)
    assert short["windows"] == 2
    # The start token is one of the 17.
    assert short["perplexity"] == perplexity(model, Letters(), text[:16], context_length=8)["perplexity"]


def test_bfloat16_is_scored_in_float32(model: Any) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    text = "the quick brown fox jumps over the lazy dog"
    result = perplexity(half, Letters(), text, context_length=8)
    logits = half(Letters()(text)["input_ids"][:, :40].view(5, 8)).logits.double()
    targets = Letters()(text)["input_ids"][:, :40].view(5, 8)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 31), targets[:, 1:].reshape(-1))
    assert result["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_models_mode_alone(model: Any, training: bool) -> None:
    own = copy.deepcopy(model).train(training)
    perplexity(own, Letters(), "some text to read", context_length=8)
    assert own.training is training
    with pytest.raises(RuntimeError, match="broken"):
        perplexity(_broken(own), Letters(), "some text to read", context_length=8)
    assert own.training is training


def _broken(model: Any) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    model.forward = fail
    return model


def test_label(model: Any) -> None:
    assert perplexity(model, Letters(), "some text to read", context_length=8, label="mine")["text"] == "mine"
    named = perplexity(model, Letters(), "some text to read", context_length=8)["text"]
    other = perplexity(model, Letters(), "some text to rea!", context_length=8)["text"]
    assert named.startswith("17 characters")
    assert named != other


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("short", {"context_length": 8}, "6 tokens of text are less than one window of 8"),
        ("", {"context_length": 2}, "less than one window"),
        ("long enough, surely", {"context_length": 8, "max_tokens": 7}, "7 tokens of text"),
        ("long enough, surely", {"context_length": 33}, "between 2 and the model's 32"),
        ("long enough, surely", {"context_length": 1}, "context_length is 1"),
        ("long enough, surely", {"context_length": 8, "stride": 9}, "stride is 9"),
        ("long enough, surely", {"context_length": 8, "stride": 0}, "stride is 0"),
        ("long enough, surely", {"context_length": 8, "max_tokens": -1}, "max_tokens is -1"),
        ("long enough, surely", {"context_length": 8, "batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_input(model: Any, text: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(PhoenixError, match=message):
        perplexity(model, Letters(), text, **options)


def test_a_model_with_a_nan_is_an_error(model: Any) -> None:
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.lm_head.weight[3] = float("nan")
    with pytest.raises(PhoenixError, match="mean loss"):
        perplexity(damaged, Letters(), "some text to read", context_length=8)
