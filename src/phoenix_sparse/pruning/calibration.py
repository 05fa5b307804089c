"""Calibration tokens: the task's own examples packed without padding, or passages of a text, all of one length."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_text
from phoenix_sparse.pruning.settings import CalibrationSettings

T = TypeVar("T")


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
    stream, _ = _packed(settings.samples * length, [("", text) for text in examples], tokenizer, generator)
    _require(len(stream), length)
    return _rows(stream, settings.samples, length)


def labelled_calibration_tokens(
    settings: CalibrationSettings,
    examples: Iterable[tuple[str, str]],
    tokenizer: Any,
    *,
    max_length: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """The task's calibration sequences, and which of their tokens are completions.

    Args:
        settings: how many, how long.
        examples: the prompt and the completion of each training example.
        tokenizer: as for `calibration_tokens`, which gives the same tokens.
        max_length: the longest sequence that the model can read.
        seed: chooses the examples.

    Returns:
        Tokens and labels, both (sequences, tokens) int64; labels are -100 on prompts.
    """
    length = min(settings.length, max_length)
    parts = [(prompt, prompt + completion) for prompt, completion in examples]
    stream, labels = _packed(settings.samples * length, parts, tokenizer, torch.Generator().manual_seed(seed))
    _require(len(stream), length)
    return _rows(stream, settings.samples, length), _rows(labels, settings.samples, length)


def _packed(
    needed: int, documents: list[tuple[str, str]], tokenizer: Any, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """Tokens of documents (what to hide of it, the whole) in a drawn order, and labels: -100 where hidden."""
    stream, labels = list[int](), list[int]()
    for index in torch.randperm(len(documents), generator=generator).tolist():
        hidden, whole = documents[index]
        # As in training: with the tokenizer's own special tokens, and the end-of-text token at the end.
        ids = tokenizer(whole).input_ids
        ids = ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
        first = min(len(tokenizer(hidden).input_ids), len(ids) - 1) if hidden else 0
        stream += ids
        labels += [-100] * first + ids[first:]
        if len(stream) >= needed:
            break
    return stream, labels


def _rows(stream: list[int], samples: int, length: int) -> Tensor:
    rows = min(samples, len(stream) // length)
    return torch.tensor(stream[: rows * length]).reshape(rows, length)


def choose_examples(examples: Sequence[T], count: int, seed: int) -> list[T]:
    """Some examples, or all where there are no more, in an order that the seed draws."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [examples[index] for index in order[:count]]


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
