"""From prompts and completions to token tensors with labels on the completion alone."""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError

IGNORED = -100


class PromptAndCompletion(Protocol):
    @property
    def prompt(self) -> str: ...
    @property
    def completion(self) -> str: ...


def tokenize(examples: Iterable[PromptAndCompletion], tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    """Tokenize examples as lm-eval scores them: the whole text at once, split where the prompt's own tokens end.

    The completion ends with the end-of-text token. A text of more than `max_length` tokens loses the beginning of its
    prompt (as lm-eval truncates), never a part of its completion; one whose completion alone is too long is left out.

    Returns:
        `input_ids` and `labels` per example; labels are -100 on the prompt.
    """
    rows = []
    for example in examples:
        ids = [*tokenizer(example.prompt + example.completion).input_ids, tokenizer.eos_token_id]
        ids = _one_end(ids, tokenizer.eos_token_id)
        start = _common_prefix(ids, tokenizer(example.prompt).input_ids)
        labels = [IGNORED] * start + ids[start:]
        excess = len(ids) - max_length
        if excess > 0:
            first = 1 if ids[0] == tokenizer.bos_token_id else 0
            # The completion's first token is predicted from a token before it, a BOS at the least.
            if start - excess < 1:
                continue
            ids, labels = ids[:first] + ids[first + excess :], labels[:first] + labels[first + excess :]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def require_rows(some: Any) -> None:
    """Refuse to train on nothing.

    Args:
        some: what `tokenize` gave, or whether it gives anything.

    Raises:
        PhoenixError: it is empty.
    """
    if not some:
        raise PhoenixError(
            "finetune: no training example fits finetune.max_length; raise it or look at the task's data"
        )


def _one_end(ids: list[int], end: int) -> list[int]:
    """Some tokenizers add the end token themselves."""
    while len(ids) > 1 and ids[-2] == end:
        ids = ids[:-1]
    return ids


def _common_prefix(ids: list[int], prompt: list[int]) -> int:
    """Length of the prompt within the whole; shorter than the prompt where a token spans the boundary."""
    length = 0
    while length < min(len(prompt), len(ids) - 1) and ids[length] == prompt[length]:
        length += 1
    return length


class PadRight:
    """Collate rows of unequal length into one batch."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)

        def stack(key: str, fill: int) -> Tensor:
            return torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])

        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
        return {"input_ids": stack("input_ids", self.pad), "labels": stack("labels", IGNORED), "attention_mask": mask}
