"""Calibration tokens: the task's own examples, or text, packed into sequences of equal length without padding."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
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
        seed: chooses the examples or the passages of the text.

    Returns:
        (sequences, tokens), int64; fewer sequences than asked for where the task has fewer tokens.

    Raises:
        PhoenixError: there isn't enough text for one sequence.
    """
    length = min(settings.length, max_length)
    documents = list(examples) if settings.source == "task" else _documents(settings)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    needed, stream = settings.samples * length, list[int]()
    for index in order:
        stream += [*tokenizer(documents[index], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        if len(stream) >= needed:
            break
    rows = min(settings.samples, len(stream) // length)
    if rows == 0:
        raise PhoenixError(
            f"sparsify.calibration: {len(stream)} tokens are less than one sequence of {length}; "
            "set calibration.length lower or give more text"
        )
    return torch.tensor(stream[: rows * length]).reshape(rows, length)


def _documents(settings: CalibrationSettings) -> list[str]:
    assert settings.text is not None
    try:
        text = settings.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PhoenixError(f"sparsify.calibration.text: {settings.text} can't be read ({error})") from error
    return [part.strip() for part in text.split("<|endoftext|>") if part.strip()]
