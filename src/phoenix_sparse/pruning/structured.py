"""Structured pruning: whole channels of an MLP and whole key-value groups of attention, so that a model gets smaller.

A channel is a row of gate_proj and up_proj (OPT: fc1) with the column of down_proj (fc2) that reads it. A group is one
key-value head with the query heads that share it: their rows of q_proj, k_proj and v_proj, and the columns of o_proj
that read them. Nothing else in a block sees what a dropped unit computes, so masking it and leaving it out are the
same. Every block keeps as many channels and groups as the others: an ordinary configuration has one number for all.

OPT's attention stays dense: its configuration has no head_dim and takes hidden_size / heads, so that a model with
fewer heads of the same width can't be written down.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.masks import Masks, check_fit
from phoenix_sparse.models import LIBRARY_ERRORS, decoder_blocks, empty_model, linears, prunable_linears

WRITERS_AND_READERS = ((("gate_proj", "up_proj"), "down_proj"), (("fc1",), "fc2"))
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Units:
    """The `count` units of one kind in one block, each of `weights` weights.

    A unit owns `rows[name]` neighbouring output rows, or `columns[name]` neighbouring input columns, of the linears
    that are named there.
    """

    count: int
    weights: int
    rows: dict[str, int]
    columns: dict[str, int]


def structured_masks(
    model: nn.Module, scores: Mapping[str, Tensor], sparsity: float, *, attention: bool = True
) -> dict[str, Tensor]:
    """Choose the channels and groups to keep by the mean score of a unit's weights.

    Args:
        model: a Llama-, Mistral-, Qwen2- or OPT-like causal language model; it isn't changed.
        scores: (out, in) by layer name, higher is kept, for every linear of a unit.
        sparsity: share of the weights of all prunable linears to drop. Groups are coarse, so their number is rounded
            down, to one that the configuration can express (Llama: the number of heads must divide the hidden
            size), and channels make up the rest: the sparsity is met to within half a channel a block. (Where MLPs
            are tiny beside attention, it may lie between two numbers of groups; then the nearer one is taken.)
        attention: False prunes MLPs alone.

    Returns:
        Boolean (out, in) on the CPU by layer name, for every prunable linear. Masks of a higher sparsity may keep
        channels that those of a lower one drop, where they drop another group instead.

    Raises:
        PhoenixError: the blocks have no such units, the scores don't fit, or the sparsity can't be reached with one
            channel and one group left in every block.
    """
    return structured_levels(model, scores, [sparsity], attention=attention)[sparsity]


def structured_levels(
    model: nn.Module, scores: Mapping[str, Tensor], sparsities: Iterable[float], *, attention: bool = True
) -> dict[float, dict[str, Tensor]]:
    """`structured_masks` for several sparsities; each layer's score is looked up once, so a mapping may be lazy."""
    layers = prunable_linears(model)
    blocks = find_units(model, attention=attention)
    values = [{kind: _unit_scores(units, scores, layers) for kind, units in block.items()} for block in blocks]
    weights = sum(layer.weight.numel() for layer in layers.values())
    levels = {}
    for sparsity in sparsities:
        drop = _how_many(model, blocks, weights, sparsity)
        masks = {name: torch.ones(layer.weight.shape, dtype=torch.bool) for name, layer in layers.items()}
        for block, value in zip(blocks, values, strict=True):
            for kind, units in block.items():
                dropped = torch.sort(value[kind], stable=True).indices[: drop[kind]]
                for name, width in units.rows.items():
                    masks[name].unflatten(0, (units.count, width))[dropped] = False
                for name, width in units.columns.items():
                    masks[name].unflatten(1, (units.count, width))[:, dropped] = False
        levels[sparsity] = masks
    return levels


def require_reachable(model: Any, sparsity: float) -> None:
    """Refuse a sparsity that structured pruning can't give this model, from its shapes alone.

    Raises:
        PhoenixError: as `structured_masks` for scores that fit.
    """
    _how_many(
        model, find_units(model), sum(layer.weight.numel() for layer in prunable_linears(model).values()), sparsity
    )


def find_units(model: Any, *, attention: bool = True) -> list[dict[str, Units]]:
    """The units of every decoder block: `mlp`, and `attention` where it is asked for and its form is known.

    Raises:
        PhoenixError: a block has no MLP of channels, or not the same as the first one.
    """
    found: list[dict[str, Units]] = []
    for name, block in decoder_blocks(model).items():
        by_leaf: dict[str, list[str]] = {}
        layers = linears(block, name)
        for full in layers:
            by_leaf.setdefault(full.rpartition(".")[2], []).append(full)
        units = {"mlp": _mlp_units(name, by_leaf, layers)}
        groups = _attention_units(by_leaf, layers, model.config) if attention else None
        if groups is not None:
            units["attention"] = groups
        found.append(units)
        if _sizes(units) != _sizes(found[0]):
            raise PhoenixError(f"structured: {name} is of another shape than the first block; all must be alike")
    return found


def _mlp_units(block: str, by_leaf: dict[str, list[str]], layers: dict[str, nn.Linear]) -> Units:
    for writers, reader in WRITERS_AND_READERS:
        if all(len(by_leaf.get(leaf, ())) == 1 for leaf in (*writers, reader)):
            rows, column = [by_leaf[leaf][0] for leaf in writers], by_leaf[reader][0]
            count = layers[column].in_features
            if all(layers[row].out_features == count for row in rows):
                return _units(count, dict.fromkeys(rows, 1), {column: 1}, layers)
    raise PhoenixError(
        f"structured: {block} has not one gate_proj, up_proj and down_proj, nor one fc1 and fc2; use another pattern"
    )


def _attention_units(by_leaf: dict[str, list[str]], layers: dict[str, nn.Linear], config: Any) -> Units | None:
    """The key-value groups, or None where the linears and the configuration don't show them."""
    heads, count = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if not count or heads % count or any(len(by_leaf.get(leaf, ())) != 1 for leaf in ATTENTION):
        return None
    query, key, value, output = (by_leaf[leaf][0] for leaf in ATTENTION)
    width = layers[key].out_features // count
    sizes = layers[key].out_features, layers[value].out_features, layers[query].out_features, layers[output].in_features
    if sizes != (width * count, width * count, width * heads, width * heads):
        return None
    wide = width * heads // count
    return _units(count, {query: wide, key: width, value: width}, {output: wide}, layers)


def _units(count: int, rows: dict[str, int], columns: dict[str, int], layers: dict[str, nn.Linear]) -> Units:
    weights = sum(width * layers[name].in_features for name, width in rows.items())
    weights += sum(width * layers[name].out_features for name, width in columns.items())
    return Units(count, weights, rows, columns)


def _sizes(block: dict[str, Units]) -> dict[str, tuple[int, int]]:
    return {kind: (units.count, units.weights) for kind, units in block.items()}


def _unit_scores(units: Units, scores: Mapping[str, Tensor], layers: dict[str, nn.Linear]) -> Tensor:
    """(count,) float64 on the CPU: the mean score of each unit's weights. In float64, so that the order of summing,
    which differs between devices, doesn't decide."""
    total = torch.zeros(units.count, dtype=torch.float64)
    for widths, inner in ((units.rows, 1), (units.columns, 0)):
        for name, width in widths.items():
            score = scores.get(name)
            if score is None or score.shape != layers[name].weight.shape:
                raise PhoenixError(f"structured: there is no score of the weight's shape for {name}")
            total += score.sum(inner, dtype=torch.float64).cpu().reshape(units.count, width).sum(1)
    if total.isnan().any():
        raise PhoenixError(f"structured: a score of {next(iter(units.rows))} or a layer beside it is NaN")
    return total / units.weights


def _how_many(model: Any, blocks: list[dict[str, Units]], weights: int, sparsity: float) -> dict[str, int]:
    """How many units of each kind every block drops."""
    if not 0 <= sparsity < 1:
        raise PhoenixError(f"sparsity: {sparsity} is not in [0, 1); 0.5 drops half of the weights")
    mlp, attention = blocks[0]["mlp"], blocks[0].get("attention")
    target = sparsity * weights / len(blocks)
    choices = [0]
    if attention is not None:
        fewer = range(1, attention.count)
        choices += [n for n in fewer if _is_valid(_smaller_config(model.config, groups=attention.count - n))]
    group = attention.weights if attention else 0
    most = attention.count * sparsity if attention else 0
    first = max(n for n in choices if n <= most)

    def rest(groups: int) -> int:
        return min(max(round((target - groups * group) / mlp.weights), 0), mlp.count - 1)

    def miss(groups: int) -> float:
        return abs(target - groups * group - rest(groups) * mlp.weights)

    # The first number of groups, from the rounded one up, whose rest the channels can make up.
    for groups in choices[choices.index(first) :]:
        if miss(groups) <= mlp.weights / 2:
            return {"mlp": rest(groups), "attention": groups}
    largest = choices[-1] * group + (mlp.count - 1) * mlp.weights
    if target > largest:
        left = "one group in every attention" if attention else "attention dense"
        raise PhoenixError(
            f"structured: a sparsity of {sparsity:g} can't be reached; with one channel left in every MLP and {left} "
            f"it is {largest * len(blocks) / weights:.4f}"
        )
    groups = min(choices, key=miss)
    return {"mlp": rest(groups), "attention": groups}


@torch.no_grad()
def shrink(model: Any, masks: Masks) -> Any:
    """Leave out what structured masks drop.

    Args:
        model: the model that the masks are for; its weights off the masks may still be there. It isn't changed.
        masks: for every prunable linear, as `structured_masks` gives them.

    Returns:
        A model of the same class with fewer channels and heads, on the same device and of the same dtype, which
        shares no memory with the first. It gives the masked model's logits but for the order of summing, and is
        saved and loaded like any other: its configuration names the new intermediate_size (OPT: ffn_dim),
        num_attention_heads and num_key_value_heads, and the old head_dim.

    Raises:
        PhoenixError: a mask is of another model or not structured, or blocks keep different numbers.
    """
    check_fit(masks, prunable_linears(model))
    blocks = find_units(model)
    kept = [{kind: _kept_units(units, masks) for kind, units in block.items()} for block in blocks]
    _check_rest(masks, blocks)
    numbers = {kind: int(keep.sum()) for kind, keep in kept[0].items()}
    for index, block in enumerate(kept):
        for kind, keep in block.items():
            if not 0 < int(keep.sum()) == numbers[kind]:
                raise PhoenixError(
                    f"structured: block {index} keeps {int(keep.sum())} units of its {kind} and block 0 "
                    f"{numbers[kind]}; all must keep the same number, and at least one"
                )
    config = _smaller_config(
        model.config,
        channels=None if bool(kept[0]["mlp"].all()) else numbers["mlp"],
        groups=None if "attention" not in numbers or bool(kept[0]["attention"].all()) else numbers["attention"],
    )
    if not _is_valid(config):
        raise PhoenixError(
            f"structured: {type(config).__name__} can't express {config.num_attention_heads} attention heads at a "
            f"hidden size of {config.hidden_size}; keep a number of heads that divides it"
        )
    return _rebuild(model, config, _sliced(model, blocks, kept))


def _kept_units(units: Units, masks: Masks) -> Tensor:
    """(count,) boolean: which units a block keeps."""
    kept: Tensor | None = None
    for widths, turned in ((units.rows, False), (units.columns, True)):
        for name in widths:
            parts = (masks[name].t() if turned else masks[name]).reshape(units.count, -1)
            whole = parts.all(1)
            if bool((parts.any(1) & ~whole).any()) or (kept is not None and not torch.equal(whole.cpu(), kept)):
                raise PhoenixError(
                    f"structured: the mask of {name} doesn't keep or drop whole channels or groups; give masks of "
                    "pattern=structured"
                )
            kept = whole.cpu()
    assert kept is not None
    return kept


def _check_rest(masks: Masks, blocks: list[dict[str, Units]]) -> None:
    """A linear that belongs to no unit can't be made smaller."""
    owned = {name for block in blocks for units in block.values() for name in (*units.rows, *units.columns)}
    for name, mask in masks.items():
        if name not in owned and not bool(mask.all()):
            raise PhoenixError(f"structured: {name} is pruned, and this model's configuration can't make it smaller")


def _sliced(model: Any, blocks: list[dict[str, Units]], kept: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The model's state without the dropped units."""
    old = model.state_dict()
    state = {}
    for block, keeps in zip(blocks, kept, strict=True):
        for kind, units in block.items():
            for name, width in (units.rows | units.columns).items():
                weight, bias = old[f"{name}.weight"], old.get(f"{name}.bias")
                places = keeps[kind].repeat_interleave(width).nonzero().flatten().to(weight.device)
                state[f"{name}.weight"] = weight.index_select(0 if name in units.rows else 1, places)
                if name in units.rows and bias is not None:
                    state[f"{name}.bias"] = bias.index_select(0, places)
    return {name: state[name] if name in state else tensor.clone() for name, tensor in old.items()}


def _rebuild(model: Any, config: Any, state: dict[str, Tensor]) -> Any:
    small = empty_model(config)
    for name, empty in small.state_dict().items():
        if name not in state or state[name].shape != empty.shape:  # a norm over all heads, for one
            raise PhoenixError(f"structured: {name} hangs on the number of units, and Phoenix can't make it smaller")
    small.load_state_dict(state, strict=True, assign=True)
    small.tie_weights()
    # Buffers that no file holds (rotary frequencies) depend on head_dim alone, which stays.
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(small.get_submodule(owner), leaf, buffer.clone())
    small.generation_config = copy.deepcopy(model.generation_config)
    return small.train(model.training)


def _smaller_config(config: Any, *, channels: int | None = None, groups: int | None = None) -> Any:
    small = copy.deepcopy(config)
    if channels is not None:
        setattr(small, "ffn_dim" if hasattr(config, "ffn_dim") else "intermediate_size", channels)
    if groups is not None:
        heads = config.num_attention_heads
        # Written out, for without it the width of a head would follow from the new number of heads.
        small.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        small.num_attention_heads = heads // config.num_key_value_heads * groups
        small.num_key_value_heads = groups
    return small


def _is_valid(config: Any) -> bool:
    """Whether a configuration can be read back: classes have rules of their own."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        type(config).from_dict(config.to_dict())
    except (*LIBRARY_ERRORS, StrictDataclassError):
        return False
    return True
