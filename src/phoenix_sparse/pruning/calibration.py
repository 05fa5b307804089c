"""Calibration tokens: the task's own examples packed without padding, or passages of a text, all of one length."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_text
from phoenix_sparse.pruning.settings import CalibrationSettings


def calibration_tokens(
    settings: CalibrationSettings, examples: Iterable[str], tokenizer: Any, *, max_length: int, seed: int
) -> Tensor:
    """Make the calibration sequences.

    Args:
        settings: how many, how long, from where.
        examples: the task's training examples as whole texts, used for `source: task`.
        tokenizer: its end-of-text token stands between documents.
        max_length: the longest sequence that the model can read.
        seed: chooses the examples, or the passages of the text.

    Returns:
        (sequences, tokens), int64; fewer sequences than asked for where the task has fewer tokens.

    Raises:
        PhoenixError: there isn't enough text for one sequence.
    """
    length = min(settings.length, max_length)
    generator = torch.Generator().manual_seed(seed)
    if settings.source == "text":
        stream = _text_stream(settings, tokenizer)
        _require(len(stream), length)
        # Windows from anywhere in the text, as the Wanda repository draws them.
        starts = torch.randint(0, len(stream) - length + 1, (settings.samples,), generator=generator).tolist()
        return torch.tensor([stream[start : start + length] for start in starts])
    documents = list(examples)
    needed, stream = settings.samples * length, list[int]()
    for index in torch.randperm(len(documents), generator=generator).tolist():
        # As in training: with the tokenizer's own special tokens, and the end-of-text token at the end.
        ids = tokenizer(documents[index]).input_ids
        stream += ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
        if len(stream) >= needed:
            break
    _require(len(stream), length)
    rows = min(settings.samples, len(stream) // length)
    return torch.tensor(stream[: rows * length]).reshape(rows, length)


def _require(tokens: int, length: int) -> None:
    if tokens < length:
        raise PhoenixError(
            f"sparsify.calibration: {tokens} tokens are less than one sequence of {length}; "
            "set calibration.length lower or give more text"
        )


def _text_stream(settings: CalibrationSettings, tokenizer: Any) -> list[int]:
    """All tokens of the text, with the end-of-text token between its documents (parted by `<|endoftext|>`)."""
    assert settings.text is not None
    stream = list[int]()
    for part in read_text(settings.text, "sparsify.calibration.text").split("<|endoftext|>"):
        if part.strip():
            stream += [*tokenizer(part.strip(), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return stream
