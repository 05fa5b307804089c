"""Tokenised examples as the array that ModelZoo trains on."""

from collections.abc import Sequence

import numpy as np

from phoenix_sparse.errors import PhoenixError

IGNORED = -100
STEP = 32  # lengths are multiples of it


def fitting_length(rows: Sequence[dict[str, list[int]]], most: int) -> int:
    """The shortest length, a multiple of 32, that holds every example; never above `most`."""
    longest = max((len(row["input_ids"]) - 1 for row in rows), default=1)
    return min(most, -(-longest // STEP) * STEP)


def token_array(rows: Sequence[dict[str, list[int]]], length: int, pad: int) -> np.ndarray:
    """Lay examples out as (examples, 3, length) int32: input tokens, loss mask, labels.

    A label is the token that follows its input (ModelZoo shifts nothing), the loss mask is 1 where it is learned from:
    on the completion. Padding has the pad token and mask 0.

    Args:
        rows: `input_ids` and `labels` (-100 on the prompt) per example, of equal length within one.
        length: positions; an example has at most length + 1 tokens.
        pad: the padding token.

    Raises:
        PhoenixError: there are no examples, or one is too long.
    """
    if not rows:
        raise PhoenixError("cerebras: there are no examples to train on")
    data = np.zeros((len(rows), 3, length), np.int32)
    data[:, 0] = data[:, 2] = pad
    for number, row in enumerate(rows):
        ids = np.asarray(row["input_ids"], np.int32)
        learned = np.asarray(row["labels"]) != IGNORED
        count = len(ids) - 1
        if count > length:
            raise PhoenixError(f"cerebras: example {number} has {count + 1} tokens, and {length + 1} have room")
        data[number, 0, :count] = ids[:-1]
        data[number, 1, :count] = learned[1:]
        data[number, 2, :count] = ids[1:]
    return data
