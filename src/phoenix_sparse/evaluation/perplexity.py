"""Perplexity of a causal language model on a text, by the protocol of the pruning literature.

The text is tokenised as one, cut into windows of the context length that don't overlap (a rest shorter than a window
is left out), and every token of a window but its first is predicted: exp(mean negative log-likelihood). SparseGPT
(Frantar & Alistarh, 2023), GPTQ and Wanda measure WikiText-2 and C4 so; figures compare only at equal context length.
"""

import hashlib
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from phoenix_sparse.errors import PhoenixError

CHUNK_ELEMENTS = 2**25  # logits taken to float32 at a time: 128 MiB


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    context_length: int,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 1,
    label: str | None = None,
) -> dict[str, Any]:
    """Measure a model's perplexity on a text.

    Args:
        model: a causal language model, on any device and in any dtype; the logits are taken to float32.
        tokenizer: its tokenizer; special tokens as it adds them to one text.
        text: the text, for WikiText-2 its lines joined by blank lines.
        context_length: tokens of a window.
        stride: tokens between the starts of two windows, the context length when None. With a smaller one, windows
            overlap and each predicts only the tokens that the one before didn't reach, with more context.
        max_tokens: use only this many tokens from the text's start.
        batch_size: windows in one forward pass.
        label: what the text is, for the report; its length and hash when None.

    Returns:
        {"perplexity", "context_length", "stride", "windows", "tokens": predicted tokens, "text": the label}.

    Raises:
        PhoenixError: the text is shorter than a window, the window longer than the model can read, a number is out
            of range, or the model's loss is not finite.
    """
    stride = context_length if stride is None else stride
    _check(model, context_length, stride, batch_size)
    if max_tokens is not None and max_tokens < 1:
        raise PhoenixError(f"perplexity: max_tokens is {max_tokens}; it must be 1 or more")
    tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0][:max_tokens]
    if tokens.numel() < context_length:
        raise PhoenixError(
            f"perplexity: {tokens.numel()} tokens of text are less than one window of {context_length}; "
            "give a longer text, a larger max_tokens or a smaller context_length"
        )
    windows = tokens.unfold(0, context_length, stride)
    total, count, training = 0.0, 0, model.training
    model.eval()
    try:
        for start in range(0, len(windows), batch_size):
            losses = _losses(model, windows[start : start + batch_size])
            for row, window_losses in enumerate(losses):
                fresh = window_losses if start + row == 0 else window_losses[-stride:]
                total += fresh.double().sum().item()
                count += fresh.numel()
    finally:
        model.train(training)
    # Above e^709 a float64 overflows, and JSON has no infinity.
    if not math.isfinite(total) or total / count > 700:
        raise PhoenixError(
            f"perplexity: the mean loss over {count} tokens is {total / count}, which is no language model's"
        )
    return {
        "perplexity": math.exp(total / count),
        "context_length": context_length,
        "stride": stride,
        "windows": len(windows),
        "tokens": count,
        "text": label or f"{len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}",
    }


def _check(model: Any, context_length: int, stride: int, batch_size: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if context_length < 2 or (limit is not None and context_length > limit):
        raise PhoenixError(
            f"perplexity: context_length is {context_length}; it must be between 2 and the model's {limit}"
        )
    if not 1 <= stride <= context_length:
        raise PhoenixError(f"perplexity: stride is {stride}; it must be between 1 and context_length {context_length}")
    if batch_size < 1:
        raise PhoenixError(f"perplexity: batch_size is {batch_size}; it must be 1 or more")


@torch.no_grad()
def _losses(model: Any, windows: Tensor) -> Tensor:
    """Negative log-likelihoods, float32 on the CPU: windows [batch, length] to [batch, length - 1]."""
    device = model.get_input_embeddings().weight.device
    windows = windows.to(device)
    logits = model(input_ids=windows, use_cache=False).logits
    # Only a part of the logits exists in float32 at a time: at a vocabulary of 128,000 they outweigh a small model.
    step = max(1, CHUNK_ELEMENTS // (logits.shape[0] * logits.shape[2]))
    parts = []
    for start in range(0, windows.shape[1] - 1, step):
        end = min(start + step, windows.shape[1] - 1)
        targets = windows[:, start + 1 : end + 1].to(logits.device)
        parts.append(F.cross_entropy(logits[:, start:end].float().transpose(1, 2), targets, reduction="none").cpu())
    return torch.cat(parts, dim=1)
