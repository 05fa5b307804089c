"""A model whose decoder blocks stay on disk: one block at a time is in memory, and pruned blocks go back to disk."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phoenix_sparse.checkpoint import INDEX, SINGLE, Checkpoint, reading
from phoenix_sparse.errors import PhoenixError, first_line
from phoenix_sparse.files import atomic_path, write_json
from phoenix_sparse.masks import load_mask, masks_sha256, save_mask
from phoenix_sparse.models import LIBRARY_ERRORS, choose_dtype, decoder_blocks, load_config
from phoenix_sparse.pruning.blocks import Blocks
from phoenix_sparse.settings import Dtype

SHARD_BYTES = 5 * 10**9
BLOCK = "phoenix-block"  # the header of a finished block's file


class StreamedBlocks(Blocks):
    """The blocks of a model on disk. Embeddings, the last norm and lm_head are in memory all the time."""

    def __init__(self, model: Any, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(model)
        self.checkpoint, self.dtype, self._place = checkpoint, dtype, device
        self._fill(model, {name: name for name in _own_names(model) if not self.in_block(name)})
        model.tie_weights()
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        model.config.dtype = dtype

    def in_block(self, name: str) -> bool:
        return name.startswith(tuple(f"{block}." for block in self.blocks))

    @contextmanager
    def opened(self, name: str) -> Iterator[nn.Module]:
        block = self.blocks[name]
        if not any(parameter.is_meta for parameter in block.parameters()):
            yield block  # opened around this already
            return
        try:
            self._fill(block, {key: f"{name}.{key}" for key in block.state_dict()})
            yield block
        finally:
            for module in block.modules():
                for key, parameter in module.named_parameters(recurse=False):
                    setattr(module, key, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def _fill(self, module: nn.Module, names: Mapping[str, str]) -> None:
        placed = {
            key: value.to(self._place, self.dtype if value.is_floating_point() else None, copy=True)
            for key, value in self.checkpoint.tensors(names).items()
        }
        module.load_state_dict(placed, strict=False, assign=True)
        module.requires_grad_(False)


def open_streamed(directory: Path, dtype: Dtype, device: torch.device) -> StreamedBlocks | None:
    """Open a model directory for streaming.

    Returns:
        None where the tensors on disk aren't those of the model by name and shape: old files, whose names transformers
        changes as it loads them, and broken ones, which `load_model` refuses with the reason.

    Raises:
        PhoenixError: a file can't be read or is damaged, or a weight outside the blocks isn't finite. (Those inside are
            looked at when their block is opened.)
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config, checkpoint = load_config(directory), Checkpoint(directory)
    chosen = choose_dtype(config, dtype, device)
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=chosen, trust_remote_code=False).eval()
        model.generation_config = _generation_config(directory)
    except LIBRARY_ERRORS as error:
        raise PhoenixError(f"{directory}: no causal language model ({first_line(error)})") from error
    model.tie_weights()
    return StreamedBlocks(model, checkpoint, chosen, device) if _is_plain(model, checkpoint) else None


def _generation_config(directory: Path) -> Any:
    """As transformers finds it when it loads a model: in a file of its own, or among the model's configuration."""
    from transformers import GenerationConfig

    if (directory / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(directory)
    return GenerationConfig.from_pretrained(directory, config_file_name="config.json", _from_model_config=True)


def _is_plain(model: nn.Module, checkpoint: Checkpoint) -> bool:
    """Whether a model's tensors can be taken from the files as they are."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    start = f"{next(iter(decoder_blocks(model))).rsplit('.', 1)[0]}."
    beyond = [n for n in checkpoint.shapes if n.startswith(start) and n.endswith(".weight") and n not in shapes]
    own = _own_names(model)
    needed = {*own, *(name for name in shapes if name.startswith(start))}
    if beyond or any(checkpoint.shapes.get(name) != shapes[name] for name in needed):
        return False
    # A tied tensor that is in the files under both names: transformers ties them only where they are equal.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = {id(parameters[name]): name for name in own if name in parameters}
    for name, parameter in parameters.items():
        source = first[id(parameter)]
        if source != name and name in checkpoint.shapes:
            pair = checkpoint.tensors({"one": source, "other": name})
            if not torch.equal(pair["one"], pair["other"]):
                return False
    return True


def _own_names(model: nn.Module) -> list[str]:
    """Names of what a file must hold: each parameter once, though it may be tied to another name, and saved buffers."""
    saved = set(model.state_dict())
    return [
        name
        for name, _ in (*model.named_parameters(remove_duplicate=True), *model.named_buffers(remove_duplicate=True))
        if name in saved
    ]


class FinishedBlocks:
    """Pruned blocks and their masks in a directory, one file each: what a stopped pruning goes on from."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def has(self, name: str) -> bool:
        return self._weights(name).is_file()

    def save(self, name: str, block: nn.Module, masks: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        masks_digest = save_mask(masks, self.directory / f"{name}.masks.safetensors")
        state = {key: value.detach().cpu().contiguous() for key, value in block.state_dict().items()}
        header = json.dumps({"weights": _digest(state), "masks": masks_digest})
        with atomic_path(self._weights(name)) as temporary:  # last: it says that the block is finished
            save_file(state, temporary, metadata={BLOCK: header})

    def masks(self, name: str) -> dict[str, Tensor]:
        """Boolean (out, in) by linear.

        Raises:
            PhoenixError: a file is damaged, or the masks aren't those of the weights.
        """
        masks = load_mask(self.directory / f"{name}.masks.safetensors")[0]
        with reading(self._weights(name)) as reader:
            self._require(masks_sha256(masks) == _header(reader).get("masks"), name)
        return masks

    def state(self, name: str) -> dict[str, Tensor]:
        """The block's tensors by their names inside it.

        Raises:
            PhoenixError: the file is damaged.
        """
        with reading(self._weights(name)) as reader:
            state = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118
            self._require(_digest(state) == _header(reader).get("weights"), name)
        return state

    def _require(self, intact: bool, name: str) -> None:
        if not intact:
            raise PhoenixError(
                f"{self._weights(name)}: its content or that of its masks isn't what was written; "
                "remove both files, and the block is pruned anew"
            )

    def _weights(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"


def _header(reader: Any) -> dict[str, Any]:
    try:
        header = json.loads((reader.metadata() or {}).get(BLOCK, "{}"))
    except ValueError:
        return {}
    return header if isinstance(header, dict) else {}


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_model(blocks: StreamedBlocks, finished: FinishedBlocks, tokenizer: Any, directory: Path) -> None:
    """Put the finished blocks and the rest of the model together as an ordinary Hugging Face directory.

    One file of weights is in memory at a time (`SHARD_BYTES`, and a block at the least).
    """
    from safetensors.torch import save_file

    model = blocks.model
    with atomic_path(directory) as temporary:
        temporary.mkdir()
        model.config.save_pretrained(temporary)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(temporary)
        groups, total = _grouped(blocks)
        files = [SINGLE] if len(groups) == 1 else _shard_names(len(groups))
        weight_map: dict[str, str] = {}
        for file, group in zip(files, groups, strict=True):
            state = _state(blocks, finished, group)
            save_file(state, temporary / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(state, file)
            del state
        if len(groups) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(temporary / INDEX, index)
        tokenizer.save_pretrained(temporary)


def _shard_names(count: int) -> list[str]:
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _grouped(blocks: StreamedBlocks) -> tuple[list[list[str | None]], int]:
    """Blocks by file, in order, with the rest of the model (None) in the first one, and the bytes of all."""
    everything = blocks.model.state_dict()
    sizes: dict[str | None, int] = {None: 0} | dict.fromkeys(blocks.names, 0)
    for name in _own_names(blocks.model):
        place = next((block for block in blocks.names if name.startswith(f"{block}.")), None)
        value = everything[name]
        width = blocks.dtype.itemsize if value.is_floating_point() else value.element_size()
        sizes[place] += value.numel() * width
    groups: list[list[str | None]] = [[]]
    held = 0
    for place, size in sizes.items():
        if groups[-1] and held + size > SHARD_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(place)
        held += size
    return groups, sum(sizes.values())


def _state(blocks: StreamedBlocks, finished: FinishedBlocks, group: list[str | None]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for place in group:
        if place is None:
            everything = blocks.model.state_dict()
            own = [name for name in _own_names(blocks.model) if not blocks.in_block(name)]
            state |= {name: everything[name].cpu().contiguous() for name in own}
        else:
            state |= {f"{place}.{key}": value for key, value in finished.state(place).items()}
    return state
