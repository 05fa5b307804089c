"""The demo's tokenizer: it round-trips any text, keeps digits apart, and makes the task's problems short."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phoenix_sparse.demo.language import documents
from phoenix_sparse.demo.task import make_problems
from phoenix_sparse.demo.tokenizer import CONTEXT, END, VOCABULARY, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The tokenizer as it comes back from its directory."""
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer().save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


def test_special_tokens(tokenizer):
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == END
    assert len(tokenizer) <= VOCABULARY
    assert tokenizer.model_max_length == CONTEXT
    assert tokenizer("").input_ids == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_tasks_text_comes_back_and_is_short(tokenizer):
    for problem in itertools.chain.from_iterable(make_problems().values()):
        question, answer = tokenizer(problem.question).input_ids, tokenizer(" " + problem.answer).input_ids
        assert tokenizer.decode(question) == problem.question
        assert tokenizer.decode(answer) == " " + problem.answer
        assert len(question) <= 45
        assert len(answer) <= 45


def test_every_digit_stands_alone(tokenizer):
    digits = set("0123456789")
    tokens = {token for token in tokenizer.get_vocab() if digits & set(token)}
    assert tokens <= digits | {f"Ġ{digit}" for digit in digits}
    assert tokenizer.tokenize("4 + 37 = 41") == ["4", "Ġ+", "Ġ3", "7", "Ġ=", "Ġ4", "1"]


def test_the_answers_mark_is_made_of_known_tokens(tokenizer):
    tokens = set(tokenizer("#### 5").input_ids)
    texts = itertools.islice(documents("marks"), 2000)
    assert tokens <= {token for text in texts for token in tokenizer(text).input_ids}


def test_training_is_deterministic(tokenizer):
    assert train_tokenizer().get_vocab() == tokenizer.get_vocab()
