from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.finetuning.examples import IGNORED, PadRight, tokenize

text = st.text(alphabet="ab c", min_size=1, max_size=30)


def example(prompt, completion):
    return SimpleNamespace(prompt=prompt, completion=completion)


@given(text, text)
def test_the_loss_is_on_the_completion_and_its_end(tokenizer, prompt, completion):
    (row,) = tokenize([example(prompt, completion)], tokenizer, 100)
    scored = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    assert scored == [*tokenizer(completion).input_ids, tokenizer.eos_token_id]
    assert tokenizer.decode(row["input_ids"][:-1]) == prompt + completion


@given(text, text, st.integers(8, 40))
def test_a_long_prompt_loses_its_beginning(tokenizer, prompt, completion, limit):
    rows = tokenize([example(prompt, completion)], tokenizer, limit)
    # A completion needs itself, its end, and one token before it.
    assert len(rows) == (len(completion) + 2 <= limit)
    for row in rows:
        assert len(row["input_ids"]) == min(limit, len(prompt) + len(completion) + 1)
        scored = [label for label in row["labels"] if label != IGNORED]
        assert tokenizer.decode(scored[:-1]) == completion
        assert (prompt + completion).endswith(tokenizer.decode(row["input_ids"][:-1]))


def test_padding_is_on_the_right_and_unscored():
    rows = [{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = PadRight(9)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [4, IGNORED, IGNORED]]
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 1], [1, 0, 0]]))
