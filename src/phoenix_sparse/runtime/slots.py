"""What a decoding step needs of transformers: a cache of fixed size whose position is a tensor, and attention over it.

Imported where a model is decoded, since it imports transformers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from phoenix_sparse.runtime.decodable import STEPPING


class Slots(Cache):
    """Keys and values of all layers, for sequences of one length; allocated when they first come.

    transformers' own static cache counts in Python beside the tensors, and rolls the windows of sliding layers: neither
    can be replayed from a graph. Here every layer has room for every position, and masks say what is looked at.
    """

    def __init__(self, layers: int, length: int, position: Tensor) -> None:
        """An empty cache.

        Args:
            layers: of the model.
            length: positions.
            position: int64 (1,), where a step writes; it is read on the device alone.
        """
        self.phase = _Phase()
        super().__init__(layers=[_Layer(self.phase, length, position) for _ in range(layers)])

    @contextmanager
    def being_filled(self) -> Iterator[None]:
        """While a prompt goes through the model."""
        self.phase.filling = True
        try:
            yield
        finally:
            self.phase.filling = False


class _Phase:
    """What layers know of the whole: whether a prompt comes, or a step; and how many positions a step looks at."""

    filling = False
    room = 0


class _Layer(StaticLayer):
    is_compileable = False  # else transformers would insist on a mask for prompts of one token

    def __init__(self, phase: _Phase, length: int, position: Tensor) -> None:
        super().__init__(max_cache_len=length)
        self.phase, self.position = phase, position

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep the states; give all that there is to attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys: Any = self.keys
        values: Any = self.values
        if self.phase.filling:
            keys[:, :, : key_states.shape[2]].copy_(key_states)
            values[:, :, : value_states.shape[2]].copy_(value_states)
            return key_states, value_states
        keys.index_copy_(2, self.position, key_states)
        values.index_copy_(2, self.position, value_states)
        room = self.phase.room
        return keys[:, :, :room], values[:, :, :room]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # asked for prompts alone: steps bring their masks

    def get_seq_length(self) -> int:
        return 0


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' attention through torch's `scaled_dot_product_attention`, without copies of keys for each query.

    For one token the query heads that share keys (batch, heads, 1, width) are taken as so many queries of one head,
    where transformers may repeat the whole cache for each of them.

    Returns:
        (batch, 1, heads, width), and None.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    shared = attention_mask is not None and attention_mask.shape[1] == 1 and attention_mask.shape[2] == 1
    if query.shape[2] != 1 or groups == 1 or not shared or rest.get("position_bias") is not None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
        return output, None
    batch, heads, _, width = query.shape
    found = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(batch, heads // groups, groups, width),
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
    )
    return found.reshape(batch, 1, heads, value.shape[-1]), None


AttentionInterface.register(STEPPING, attend)
# Steps bring their masks; another thread may ask for one meanwhile, for a prompt.
AttentionMaskInterface.register(STEPPING, sdpa_mask)


@contextmanager
def attending(config: Any) -> Iterator[None]:
    """While a step runs (or is recorded): `attend` in place of transformers' sdpa, in a decoder's configuration."""
    before = config._attn_implementation
    if before != "sdpa":
        yield
        return
    config._attn_implementation = STEPPING
    try:
        yield
    finally:
        config._attn_implementation = before
