"""Gradients of the task's loss, block by block from the last to the first, so that one block's exist at a time."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from phoenix_sparse.checkpoint import reading
from phoenix_sparse.determinism import sound_gradients
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import atomic_path, read_json, write_json
from phoenix_sparse.models import linears
from phoenix_sparse.progress import Progress
from phoenix_sparse.pruning.blocks import Blocks

Row = Mapping[str, Sequence[int]]
COMPLETE = "complete.json"


class GradientFiles(Mapping[str, Tensor]):
    """Gradients by linear in a directory, one file a block (float32: 4 bytes a weight), read when asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file: dict[str, Path] = {}

    @property
    def complete(self) -> bool:
        """Whether an earlier attempt wrote all of them."""
        if not (self.directory / COMPLETE).is_file():
            return False
        for file in sorted(self.directory.glob("*.safetensors")):
            with reading(file) as reader:
                self._file |= dict.fromkeys(reader.keys(), file)
        if read_json(self.directory / COMPLETE) != {"linears": len(self._file)}:
            raise PhoenixError(f"{self.directory}: files are missing; remove it, and the gradients are measured anew")
        return True

    def add(self, block: str, gradients: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        path = self.directory / f"{block}.safetensors"
        with atomic_path(path) as temporary:
            save_file({name: value.cpu() for name, value in gradients.items()}, temporary)
        self._file |= dict.fromkeys(gradients, path)

    def close(self) -> None:
        write_json(self.directory / COMPLETE, {"linears": len(self._file)})

    def __getitem__(self, name: str) -> Tensor:
        with reading(self._file[name]) as reader:
            value: Tensor = reader.get_tensor(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)


def measure_gradients(
    blocks: Blocks, rows: Sequence[Row], *, directory: Path | None = None, progress: Progress | None = None
) -> Mapping[str, Tensor]:
    """Average |∂L/∂W| over samples, L being the mean cross-entropy of a sample's labelled tokens.

    The forward pass keeps what enters each block (in the CPU's memory: samples · tokens · hidden size · blocks values
    of the model's dtype), the backward pass runs each block again. Weights stay as they are.

    Args:
        blocks: of the dense model.
        rows: `input_ids` and `labels` (-100 where a token isn't learned) of each sample.
        directory: where to put them; in memory without it. What an earlier attempt finished there is used again.
        progress: called with (what, done, all) after each block.

    Returns:
        (out, in) float32 on the CPU, by linear.

    Raises:
        PhoenixError: no sample has a labelled token after its first, or a gradient isn't finite.
    """
    files = GradientFiles(directory) if directory else None
    if files is not None and files.complete:
        return files
    samples = [row for row in rows if any(label != -100 for label in row["labels"][1:])]
    if not samples:
        raise PhoenixError("gradients: no example has a completion to learn; look at the task's data")
    found: dict[str, Tensor] = {}
    device = blocks.device
    entering = _forward(blocks, samples, progress)
    with sound_gradients(device):
        upstream = [
            _top_gradient(blocks, row, hidden.to(device)) for row, hidden in zip(samples, entering.pop(), strict=True)
        ]
        for index in reversed(range(len(blocks.names))):
            name = blocks.names[index]
            with blocks.opened(name) as block:
                sums = _backward(blocks, index, block, entering.pop(), upstream)
            for layer, value in sums.items():
                if not torch.isfinite(value).all():
                    raise PhoenixError(f"gradients: those of {layer} are not finite; use dtype=float32")
                value /= len(samples)
            if files is not None:
                files.add(name, sums)
            else:
                found |= {layer: value.cpu() for layer, value in sums.items()}
            if progress is not None:
                progress("gradients of block", len(blocks.names) - index, len(blocks.names))
    if files is None:
        return found
    files.close()
    return files


@torch.no_grad()
def _forward(blocks: Blocks, samples: Sequence[Row], progress: Progress | None) -> list[list[Tensor]]:
    """What enters each block, and what leaves the last, by sample."""
    entering = [[blocks.embed(_ids(row)).cpu() for row in samples]]
    for index, name in enumerate(blocks.names):
        with blocks.opened(name) as block:
            entering.append([blocks.run(index, block, state.to(blocks.device)).cpu() for state in entering[-1]])
        if progress is not None:
            progress("running block", index + 1, len(blocks.names))
    return entering


def _ids(row: Row) -> Tensor:
    return torch.tensor([list(row["input_ids"])])


def _top_gradient(blocks: Blocks, row: Row, hidden: Tensor) -> Tensor:
    hidden.requires_grad_()
    with torch.enable_grad():
        logits = blocks.top(_ids(row), hidden).float()
        labels = torch.tensor([list(row["labels"])], device=logits.device)
        loss = nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)
        return torch.autograd.grad(loss, hidden)[0]


def _backward(
    blocks: Blocks, index: int, block: nn.Module, entering: list[Tensor], upstream: list[Tensor]
) -> dict[str, Tensor]:
    """Sums of |∂L/∂W| over samples for one block; `upstream` becomes what the block before needs."""
    layers = linears(block, blocks.names[index])
    weights = [layer.weight for layer in layers.values()]
    sums = {name: torch.zeros_like(layer.weight, dtype=torch.float32) for name, layer in layers.items()}
    needed = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            for sample, state in enumerate(entering):
                hidden = state.to(blocks.device).requires_grad_()
                output = blocks.run(index, block, hidden)
                # A linear that this sample doesn't pass (an expert, for one) has gradients of zero.
                below, *gradients = torch.autograd.grad(
                    output, [hidden, *weights], upstream[sample], materialize_grads=True
                )
                upstream[sample] = below
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    total += gradient.abs()
    finally:
        for weight, need in zip(weights, needed, strict=True):
            weight.requires_grad_(need)
    return sums
