"""Which examples make a step, in which order, and how they lie side by side on the device.

All three ways train on the same examples in every epoch. An optimizer step has `batch_size` of them, cut into
micro-batches; the loss is a mean over the scored tokens of the whole step, however it is cut. `padded` and `packed`
steps have the same examples, so their gradients differ by rounding only.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.finetuning.examples import IGNORED, PadRight
from phoenix_sparse.finetuning.settings import FinetuneSettings

Row = dict[str, list[int]]
Batch = dict[str, Tensor]
# Batches whose examples are sorted by length together: enough for like lengths, few enough to keep the order random.
WINDOW = 50


def training_order(lengths: Sequence[int], settings: FinetuneSettings, seed: int) -> list[int]:
    """The examples' order over all epochs, each a permutation of its own; a part of an epoch is a part of one.

    Args:
        lengths: tokens of each example.
        settings: of the recipe.
        seed: for the permutations.
    """
    count, batch = len(lengths), settings.batch_size
    total = settings.count_examples(count)
    generator, order = torch.Generator().manual_seed(seed), list[int]()
    while len(order) < total:
        epoch = torch.randperm(count, generator=generator).tolist()
        if settings.batching == "grouped":
            epoch = _grouped(epoch, lengths, batch, -len(order) % batch, generator)
        order += epoch
    return order[:total]


def _grouped(epoch: list[int], lengths: Sequence[int], batch: int, first: int, generator: torch.Generator) -> list[int]:
    """An epoch whose batches have like lengths, in random order.

    The `first` examples fill up a batch that the epoch before began, and what is left over begins one of the next.
    """
    head, rest = epoch[:first], epoch[first:]
    whole = len(rest) - len(rest) % batch
    batches = list[list[int]]()
    for start in range(0, whole, WINDOW * batch):
        window = sorted(rest[start : min(start + WINDOW * batch, whole)], key=lambda index: lengths[index])
        batches += [window[place : place + batch] for place in range(0, len(window), batch)]
    shuffled = [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
    return head + [index for one in shuffled for index in one] + rest[whole:]


def micro_batches(
    rows: Sequence[Row], order: Sequence[int], settings: FinetuneSettings, processes: int
) -> tuple[list[list[Row]], int]:
    """Cut the training into micro-batches.

    Args:
        rows: tokenized examples.
        order: of the whole training (`training_order`).
        settings: of the recipe.
        processes: that share a step; each takes every `processes`-th micro-batch.

    Returns:
        The micro-batches, and how many of them make a process's share of a step. Those of a last, smaller step are
        filled up to a multiple of `processes` with an example that isn't scored.

    Raises:
        PhoenixError: the processes can't share a step evenly.
    """
    size, parts = shares(settings, processes)
    result = list[list[Row]]()
    for start in range(0, len(order), settings.batch_size):
        step = [rows[index] for index in order[start : start + settings.batch_size]]
        if settings.batching == "grouped":
            step.sort(key=lambda row: len(row["input_ids"]))
        result += [step[place : place + size] for place in range(0, len(step), size)]
    result += [[_silent(rows[order[0]])] for _ in range(-len(result) % processes)]
    return result, parts


def shares(settings: FinetuneSettings, processes: int) -> tuple[int, int]:
    """Examples that a process has on its device at once, and how many such parts make its share of a batch.

    Raises:
        PhoenixError: they don't come out even.
    """
    share, rest = divmod(settings.batch_size, processes)
    micro_batch = settings.micro_batch_size or share
    if rest or not share or share % micro_batch:
        raise PhoenixError(
            f"finetune.batch_size: {processes} processes with {micro_batch} examples each at once do not share "
            f"{settings.batch_size} evenly; give a multiple of {processes * max(micro_batch, 1)}"
        )
    return micro_batch, share // micro_batch


def _silent(row: Row) -> Row:
    return {"input_ids": row["input_ids"], "labels": [IGNORED] * len(row["labels"])}


class PackRows:
    """Collate examples one after the other into rows of at most `width` tokens; the rest of a row is padding.

    `position_ids` begin at 0 with every example. Without an attention mask, transformers takes that for the sign to
    keep the examples of a row from seeing each other. Most models follow it, OPT doesn't: `require_separate` looks.
    """

    def __init__(self, pad: int, width: int) -> None:
        self.pad, self.width = pad, width

    def __call__(self, rows: list[Row]) -> Batch:
        """Pack rows.

        Returns:
            `input_ids`, `labels` and `position_ids`, (packed rows, tokens of the longest of them), int64.
        """
        packed = list(first_fit(rows, self.width))
        longest = max(sum(len(row["input_ids"]) for row in one) for one in packed)
        columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
        for one in packed:
            ids = [token for row in one for token in row["input_ids"]]
            # Nothing comes before an example's first token that it could be predicted from.
            labels = [label for row in one for label in [IGNORED, *row["labels"][1:]]]
            places = [place for row in one for place in range(len(row["input_ids"]))]
            empty = longest - len(ids)
            columns["input_ids"].append(ids + [self.pad] * empty)
            columns["labels"].append(labels + [IGNORED] * empty)
            columns["position_ids"].append(places + list(range(empty)))
        return {key: torch.tensor(value) for key, value in columns.items()}


def first_fit(rows: Sequence[Row], width: int) -> Iterator[list[Row]]:
    """Put examples, the longest first, each into the first row that has room for it (Johnson, 1974)."""
    packed, room = list[list[Row]](), list[int]()
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        length = len(row["input_ids"])
        place = next((index for index, left in enumerate(room) if length <= left), None)
        if place is None:
            packed.append([])
            room.append(width)
            place = len(room) - 1
        packed[place].append(row)
        room[place] -= length
    yield from packed


Collate = PadRight | PackRows


def collator(settings: FinetuneSettings, pad: int) -> Collate:
    return PackRows(pad, settings.max_length) if settings.batching == "packed" else PadRight(pad)


def rows_of(batch: Batch) -> list[Row]:
    """The examples that a batch was made of, without padding; those that aren't scored only if there is no other."""
    rows = list[Row]()
    for index, ids in enumerate(batch["input_ids"].tolist()):
        labels = batch["labels"][index].tolist()
        if "position_ids" in batch:
            places = batch["position_ids"][index].tolist()
            starts = [*(place for place, number in enumerate(places) if number == 0), len(ids)]
        else:
            starts = [0, int(batch["attention_mask"][index].sum())]
        for start, end in pairwise(starts):
            rows.append({"input_ids": ids[start:end], "labels": labels[start:end]})
    scored = [row for row in rows if any(label != IGNORED for label in row["labels"][1:])]
    return scored or rows[:1]


@torch.no_grad()
def require_separate(model: Any, pad: int) -> None:
    """Refuse a model whose attention looks across the examples of a packed row, by computing one.

    Raises:
        PhoenixError: the logits of an example are others in company than alone.
    """
    device = next(model.parameters()).device
    one, two = ({"input_ids": ids, "labels": ids} for ids in ([pad, 1, 2, 3], [2, 0, 1, 3, 1]))

    def logits(rows: list[Row]) -> Tensor:
        batch = {key: value.to(device) for key, value in PackRows(pad, 16)(rows).items() if key != "labels"}
        return model(**batch, use_cache=False).logits.float()[0]

    training = model.training
    model.eval()
    together, alone = logits([one, two]), torch.cat([logits([two]), logits([one])])
    model.train(training)
    spread = float((alone - alone.mean()).abs().max())
    rounding = 0.05 if next(model.parameters()).dtype == torch.bfloat16 else 1e-3
    if float((together - alone).abs().max()) > rounding * spread:
        raise PhoenixError(
            "finetune.batching: this model's attention looks across the examples of a packed row; use grouped or padded"
        )
