"""The decoder blocks of a model, opened one after the other, with the arguments that each is called with."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from phoenix_sparse.models import decoder_blocks

Act = Callable[[int, Tensor, dict[str, Any]], Tensor]


class Blocks:
    """The blocks of a model in memory. (`streaming.StreamedBlocks` reads each from disk when it is opened.)

    The model's own forward pass embeds the tokens and prepares each block's arguments (positions, masks) while the
    blocks themselves are passed over, so nothing here depends on an architecture.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks = decoder_blocks(model)
        self._calls: dict[int, list[dict[str, Any]]] = {}

    @property
    def names(self) -> list[str]:
        return list(self.blocks)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @contextmanager
    def opened(self, name: str) -> Iterator[nn.Module]:
        """The block, with its weights in memory while the `with` lasts."""
        yield self.blocks[name]

    def embed(self, ids: Tensor) -> Tensor:
        """The first block's input. (1, tokens) int64 -> (1, tokens, hidden)."""
        self.calls(ids.shape[1])  # now, so that making them is never observed as calibration
        return self._first_call(ids)[0]

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """One opened block on one sequence. (1, tokens, hidden) -> the same shape."""
        output = block(hidden, **self.calls(hidden.shape[1])[index])
        return output[0] if isinstance(output, tuple) else output

    def top(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """What follows the last block. (1, tokens), (1, tokens, hidden) -> logits (1, tokens, vocabulary)."""
        with self._instead(lambda _index, _hidden, _kwargs: hidden, self._gives_tuple):
            return self.model(input_ids=ids.to(self.device), use_cache=False).logits

    def calls(self, tokens: int) -> list[dict[str, Any]]:
        """The keyword arguments of each block for sequences of a length, made once per length.

        Blocks can differ in theirs: sliding and full attention masks.
        """
        if tokens not in self._calls:
            found: list[dict[str, Any]] = []

            def note(_index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
                found.append(_arguments(kwargs))
                if len(found) == len(self.blocks):
                    raise _Stop
                return hidden

            self._until_stopped(torch.zeros(1, tokens, dtype=torch.int64), note, self._gives_tuple)
            self._calls[tokens] = found
        return self._calls[tokens]

    @cached_property
    def _gives_tuple(self) -> bool:
        """Some architectures' blocks give a tuple, others a tensor: the first one tells."""
        hidden, kwargs = self._first_call(torch.zeros(1, 8, dtype=torch.int64))
        with torch.no_grad(), self.opened(self.names[0]) as block:
            return isinstance(block(hidden, **kwargs), tuple)

    def _first_call(self, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """What the first block is called with."""
        caught: list[tuple[Tensor, dict[str, Any]]] = []

        def catch(_index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
            caught.append((hidden, _arguments(kwargs)))
            raise _Stop

        self._until_stopped(ids, catch, False)
        return caught[0]

    def _until_stopped(self, ids: Tensor, act: Act, gives_tuple: bool) -> None:
        try:
            with self._instead(act, gives_tuple):
                self.model(input_ids=ids.to(self.device), use_cache=False)
        except _Stop:
            return

    @contextmanager
    def _instead(self, act: Act, gives_tuple: bool) -> Iterator[None]:
        """While the `with` lasts, `act(index, hidden, kwargs)` stands for every block's forward."""

        def stand_in(index: int, block: nn.Module) -> Callable[..., Any]:
            first, *others = inspect.signature(block.forward).parameters

            def forward(*args: Any, **kwargs: Any) -> Any:
                # All by name, also what the model gives by position.
                kwargs |= dict(zip((first, *others), args, strict=False))
                hidden = act(index, kwargs.pop(first if args else "hidden_states"), kwargs)
                return (hidden,) if gives_tuple else hidden

            return forward

        blocks = list(self.blocks.values())
        # A forward of the block's own (accelerate sets some) comes back afterwards; else the class's is seen again.
        before = [block.__dict__.get("forward") for block in blocks]
        stand_ins = [stand_in(index, block) for index, block in enumerate(blocks)]
        for block, instead in zip(blocks, stand_ins, strict=True):
            block.forward = instead
        try:
            yield
        finally:
            for block, own in zip(blocks, before, strict=True):
                del block.forward
                if own is not None:
                    block.forward = own


class _Stop(Exception):
    """Ends a forward pass once all is known."""


def _arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != "past_key_values"}
