"""Decoding, token by token, with a cache of fixed size; on a GPU the step is recorded once and replayed.

The position, the last tokens and all that was decoded lie in tensors on the device, and a step changes them there. So
one recorded CUDA graph serves every position, and the host need not wait for the GPU.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError, first_line
from phoenix_sparse.models import decoder_blocks
from phoenix_sparse.runtime.decodable import context_of, layer_kinds, refusal, why_one_by_one

CHECK = 16  # tokens between two looks at whether all sequences have ended
ROUND = 16  # positions that attention's kernels like a mask to be a multiple of
FEWEST = 256  # positions that a recorded step looks at; twice as many when they are used up, and so on
OVERLAP = "triton.enable_pdl"
"""Inductor's option, in newer versions of torch, that lets its kernels begin before the ones ahead have ended, as
Phoenix's do: 2 to 7% of a token's time on an H200."""

Choose = Callable[[Tensor], Tensor]
"""Tokens (batch,) for logits (batch, vocabulary), without the host waiting for the device."""


class Decoder:
    """Decodes `batch` sequences of one length at a time with a model, dense or packed.

    Attributes:
        reason: why steps run operation by operation; None where they are recorded.
        logits: (batch, vocabulary) of the last step; the next one overwrites them.
        tokens: int64 (batch, length + 1), the prompts and what was decoded.
    """

    def __init__(self, model: Any, batch: int, length: int, *, compiled: bool = False) -> None:
        """Nothing is allocated or recorded before it is needed.

        A recorded step holds on to the model's weights as they lay then: a model that is changed needs another decoder.

        Args:
            model: a causal language model of transformers, in eval mode.
            batch: sequences at once.
            length: tokens of each at most, prompt and all.
            compiled: put the step through torch.compile first, which takes a minute for a large model.

        Raises:
            PhoenixError: the model's context is shorter, or its layers keep something else than keys and values.
        """
        from phoenix_sparse.runtime.slots import Slots

        wrong, context = refusal(model), context_of(model)
        if wrong is not None:
            raise PhoenixError(f"decode: {wrong}; use the model's own generate")
        if batch < 1 or length < 1:
            raise PhoenixError(f"decode: {batch} sequences of {length} tokens; give 1 or more of each")
        if context is not None and length > context:
            raise PhoenixError(f"decode: {length} tokens are more than the model's context of {context}")
        self.model, self.batch, self.length = model, batch, length
        self.config = model.config.get_text_config(decoder=True)
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.dtype: torch.dtype = model.dtype
        self.slots = -(-length // ROUND) * ROUND
        with torch.inference_mode():
            self.position = torch.zeros(1, dtype=torch.int64, device=self.device)
            self.last = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
            self.tokens = torch.zeros(batch, length + 1, dtype=torch.int64, device=self.device)
            self.places = torch.arange(self.slots, device=self.device)
        self.cache = Slots(len(decoder_blocks(model)), self.slots, self.position)
        self.logits: Tensor | None = None
        self.reason = why_one_by_one(model, self.device)
        self.count = 0  # tokens of each sequence that are known; the last one is yet to go through the model
        self._graphs: dict[int, tuple[Any, Tensor]] = {}
        self._compiled: Callable[[], Tensor] | None = None
        if compiled:
            overlaps = self.device.type == "cuda" and OVERLAP in torch._inductor.list_options()
            options: dict[str, Any] | None = {OVERLAP: True} if overlaps else None
            self._compiled = torch.compile(self._step, dynamic=False, options=options)

    @property
    def captured(self) -> bool:
        """Whether the last step was replayed from a CUDA graph."""
        return self.reason is None and bool(self._graphs)

    def _room(self) -> int:
        """Positions that the next step looks at: all known ones, and few others."""
        if self._compiled is not None:
            return self.slots
        if self.reason is not None:
            # On a CPU no others: it adds up as transformers does, to the last bit, only over as many positions.
            unit = ROUND if self.device.type == "cuda" else 1
            return min(self.slots, -(-self.count // unit) * unit)
        room = FEWEST
        while room < self.count:
            room *= 2
        return min(self.slots, room)

    def _masks(self) -> Any:
        """What the token at `position` attends to: 0 and the lowest number, (1, 1, 1, room); by kind if there are two.

        Added to the scores, so that neither transformers nor torch makes another mask of it in every layer.
        """
        kinds = set(layer_kinds(self.config))
        places, low = self.places[: self.cache.phase.room], torch.finfo(self.dtype).min
        masks: dict[str, Tensor] = {}
        for kind in kinds:
            seen = places <= self.position
            if kind == "sliding_attention":
                seen = seen & (places > self.position - self.config.sliding_window)
            mask = torch.zeros(len(places), dtype=self.dtype, device=self.device).masked_fill_(~seen, low)
            masks[kind] = mask[None, None, None]
        return masks if len(masks) > 1 else masks[kinds.pop()]

    def _step(self) -> Tensor:
        """One token further, all of it on the device."""
        output = self.model(
            input_ids=self.last,
            attention_mask=self._masks(),
            position_ids=self.position[None],
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: Tensor = output.logits[:, -1]
        chosen = logits.argmax(-1, keepdim=True)
        self.last.copy_(chosen)
        self.position.add_(1)
        self.tokens.index_copy_(1, self.position, chosen)
        return logits

    def _run(self) -> Tensor:
        return self._step() if self._compiled is None else self._compiled()

    def _next(self) -> None:
        from phoenix_sparse.runtime.slots import attending

        room = self.cache.phase.room = self._room()
        with attending(self.config):
            if self.reason is None and room not in self._graphs:
                self._record(room)
            if self.reason is not None:
                self.logits = self._run()
                return
        graph, self.logits = self._graphs[room]
        graph.replay()

    def _record(self, room: int) -> None:
        """Record the step, after some that are undone: libraries allocate, load and compile at first use."""
        last, position = self.last.clone(), self.position.clone()
        with torch.cuda.device(self.device):
            # On a stream of their own, as torch asks for.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._run()
                    self.last.copy_(last)
                    self.position.copy_(position)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                # The stream is named since torch leaves its own one current where recording fails.
                with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                    logits = self._run()
            except RuntimeError as error:
                self.reason = f"CUDA can't record them ({first_line(error)})"
                warnings.warn(f"decode: steps run operation by operation, more slowly: {self.reason}", stacklevel=5)
                return
        self._graphs[room] = graph, logits

    @torch.inference_mode()
    def prefill(self, ids: Tensor, choose: Choose | None = None) -> Tensor:
        """Begin anew with prompts, and choose the first token after them.

        Args:
            ids: int64 (batch, prompt): all prompts of one length, without padding.
            choose: the tokens; the likeliest unless given.

        Returns:
            The logits (batch, vocabulary) of that first token.
        """
        if ids.dim() != 2 or ids.shape[0] != self.batch or not 1 <= ids.shape[1] <= self.length:
            raise PhoenixError(
                f"decode: prompts {tuple(ids.shape)}; this decoder takes ({self.batch}, 1 to {self.length}), all "
                "prompts of one length and without padding"
            )
        count = ids.shape[1]
        with self.cache.being_filled():
            output = self.model(
                input_ids=ids,
                position_ids=torch.arange(count, device=self.device)[None],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = output.logits[:, -1]
        chosen = logits.argmax(-1) if choose is None else choose(logits)
        self.tokens[:, :count] = ids
        self.tokens[:, count] = chosen
        self.last.copy_(chosen[:, None])
        self.position.fill_(count)
        self.count = count + 1
        return logits

    @torch.inference_mode()
    def advance(self, steps: int, choose: Choose | None = None) -> None:
        """Decode so many tokens more; the host doesn't wait for them.

        Args:
            steps: tokens.
            choose: as for `prefill`.

        Raises:
            PhoenixError: they would pass the decoder's length, or there was no prompt.
        """
        if not self.count:
            raise PhoenixError("decode: there is nothing to go on from; prefill first")
        if self.count - 1 + steps > self.length:
            raise PhoenixError(f"decode: {steps} steps after {self.count} tokens pass the length of {self.length}")
        for _ in range(steps):
            self._next()
            if choose is not None and self.logits is not None:
                chosen = choose(self.logits)
                self.last.copy_(chosen[:, None])
                self.tokens[:, self.count] = chosen
            self.count += 1

    @torch.inference_mode()
    def rewind(self, count: int) -> None:
        """Go back to where each sequence had `count` tokens, as often as one likes.

        Raises:
            PhoenixError: there are fewer.
        """
        if not 1 <= count <= self.count:
            raise PhoenixError(f"decode: can't go back to {count} tokens; give a number from 1 to {self.count}")
        self.last.copy_(self.tokens[:, count - 1 : count])
        self.position.fill_(count - 1)
        self.count = count

    @torch.inference_mode()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        ends: Sequence[int] | None = None,
        padding: int | None = None,
        choose: Choose | None = None,
    ) -> Tensor:
        """Continue prompts until all have ended, or there are so many tokens, or the length is reached.

        Args:
            ids: int64 (batch, prompt), as for `prefill`.
            max_new_tokens: of each at most; 1 or more.
            ends: tokens that end a sequence; those of the model's generation configuration unless given.
            padding: what follows an end while other sequences go on; the first of `ends` unless given.
            choose: the tokens (see `sampler`); the likeliest unless given.

        Returns:
            int64 (batch, prompt + new): the tokens that transformers' greedy search gives. Where a step looks at more
            positions than that does (on a GPU, compiled, with windows), logits round otherwise, and near equals may
            change places.

        Raises:
            PhoenixError: that is no number of tokens, or the prompts don't fit.
        """
        if max_new_tokens < 1:
            raise PhoenixError(f"decode: {max_new_tokens} new tokens; give 1 or more")
        ends = _ends(self.model) if ends is None else list(ends)
        self.prefill(ids, choose)
        start = ids.shape[1]
        wanted = min(start + max_new_tokens, self.length)
        stop = torch.tensor(ends, dtype=torch.int64, device=self.device)
        while self.count < wanted:
            if ends and bool(torch.isin(self.tokens[:, start : self.count], stop).any(1).all()):
                break
            self.advance(min(CHECK, wanted - self.count), choose)
        tokens = self.tokens[:, : min(self.count, wanted)].clone()
        return _cut(tokens, start, stop, padding if padding is not None or not ends else ends[0])


def _ends(model: Any) -> list[int]:
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def _cut(tokens: Tensor, start: int, stop: Tensor, padding: int | None) -> Tensor:
    """What follows each sequence's end becomes padding, and columns of nothing else are dropped."""
    if padding is None:
        return tokens
    isend = torch.isin(tokens[:, start:], stop).long()
    over = isend.cumsum(1) - isend > 0
    tokens[:, start:].masked_fill_(over, padding)
    return tokens[:, : start + int((~over).any(0).sum())]


def sampler(temperature: float, top_p: float = 1.0, seed: int = 0, device: torch.device | None = None) -> Choose:
    """Tokens drawn from softmax(logits / temperature), from the fewest that together have a probability of `top_p`.

    Raises:
        PhoenixError: the temperature isn't above 0, or top_p isn't above 0 and at most 1.
    """
    if not temperature > 0 or not 0 < top_p <= 1:
        raise PhoenixError(
            f"sample: temperature {temperature} and top_p {top_p}; give one above 0, and one above 0 and up to 1"
        )
    generator = torch.Generator(device or "cpu").manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        shares, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
        shares = shares.masked_fill(shares.cumsum(-1) - shares >= top_p, 0.0)
        return order.gather(1, torch.multinomial(shares, 1, generator=generator))[:, 0]

    return choose
