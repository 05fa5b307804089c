"""FLOPs of a decoder-only language model, per token and per layer, counted from shapes and densities.

One multiply-add is 2 FLOPs. Only matrix products are counted, as the literature does and as torch's
FlopCounterMode does: the linears and the two products of attention (scores and values). Embedding look-ups count 0;
norms, activations, rotary angles, biases and the softmax are left out (under 1 % at the sizes of a language model).
"""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import nn

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.evaluation.matrices import Matrix, matrices
from phoenix_sparse.models import decoder_blocks, empty_model, linears

CONVENTION = (
    "One multiply-add is 2 FLOPs. Matrix products only: every linear, lm_head at every position, and attention's "
    "scores and values over the full prompt x prompt matrices; embedding look-ups count 0. Sparse: non-zero weights "
    "only, attention unchanged. Counted from shapes and densities, not timed."
)


def count_flops(
    model_or_config: Any, densities: Mapping[str, float] | None, *, prompt_length: int, context_length: int
) -> dict[str, Any]:
    """Count the FLOPs of reading a prompt (prefill) and of writing one token (decode), for one sequence.

    Args:
        model_or_config: a causal language model, or its configuration (then built on the meta device: no memory).
        densities: share of non-zero weights by the matrix's full name (`matrices`); one not named is dense. None: all
            dense.
        prompt_length: tokens of the prompt, read in one forward pass.
        context_length: positions that the written token attends to, itself included (the cache holds one less).

    Returns:
        flops.json. Every `{"dense", "sparse", "reduction"}` holds FLOPs and dense / sparse (None where sparse is 0).
        - `convention`: what is counted, in words; `model_type`, `layers`, `prompt_length`, `context_length`.
        - `linears`: {name: {"shape": [out, in], "nnz", "density", "experts", "chosen", "flops_per_token": {dense,
          sparse, reduction}}}; a mixture's experts are one of shape [experts, out, in], of which a token visits
          `chosen`.
        - `blocks`: {name: {"prefill": {dense, sparse, reduction}, "decode": {...}}}, attention included.
        - `prefill`: "linears" (all but lm_head), "lm_head", "total" and "per_token", each {dense, sparse, reduction};
          "attention" (full n x n matrices, as eager and SDPA's math compute) and "attention_causal" (only the pairs
          that the mask lets through); "total_causal" with the latter; "total_last_position": the full matrices, and
          lm_head at the last position only, as generation does.
        - `decode`: "linears", "lm_head", "total", each {dense, sparse, reduction}; "attention".
        - `parameters`: {"total", "nnz", "density"}; tied weights once; a parameter outside `densities` counts whole.
        - `bytes`: {"dense", "nonzero_values", "nonzero_values_and_bitmask", "kv_cache", "per_value"}: weights in the
          model's own dtype, dense, without the zeros, and with 1 bit per weight for every linear of density below 1;
          the cache of keys and values at `context_length`; the size of a value.

    Raises:
        PhoenixError: a density names no matrix or is outside 0 to 1, a length is below 1, or the model holds matrices
            of another kind (GPT-2), whose products would be missed.
    """
    for name, length in (("prompt_length", prompt_length), ("context_length", context_length)):
        if length < 1:
            raise PhoenixError(f"{name}: {length} given; it must be 1 or more tokens")
    model = _as_model(model_or_config)
    layers, blocks = matrices(model), decoder_blocks(model)
    nnz = _nonzeros(layers, densities or {})
    head = _head_name(model, layers)
    per_token = {
        name: (2 * layer.visited(layer.weight.numel()), 2 * layer.visited(nnz[name])) for name, layer in layers.items()
    }
    attention = {name: _attention(model.config, index, blocks[name]) for index, name in enumerate(blocks)}

    full = {name: width * prompt_length**2 for name, (width, _) in attention.items()}
    causal = {name: width * _causal_pairs(prompt_length, window) for name, (width, window) in attention.items()}
    cached = {
        name: width * min(context_length, window or context_length) for name, (width, window) in attention.items()
    }
    key_heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    kept = sum(min(context_length, window or context_length) for _, window in attention.values())
    cache = 2 * kept * key_heads * _head_dim(model.config) * next(model.parameters()).element_size()
    body = _sum(per_token[name] for name in layers if name != head)
    top = per_token[head]
    prompt_body, prompt_top = _scale(body, prompt_length), _scale(top, prompt_length)
    total = _sum([prompt_body, prompt_top, _both(full)])

    return {
        "convention": CONVENTION,
        "model_type": model.config.model_type,
        "layers": len(blocks),
        "prompt_length": prompt_length,
        "context_length": context_length,
        "linears": {
            name: {
                "shape": list(layer.weight.shape),
                "nnz": nnz[name],
                "density": nnz[name] / layer.weight.numel(),
                "experts": layer.experts,
                "chosen": layer.chosen,
                "flops_per_token": _entry(per_token[name]),
            }
            for name, layer in layers.items()
        },
        "blocks": {
            name: {
                "prefill": _entry(_sum([_scale(inner, prompt_length), (full[name], full[name])])),
                "decode": _entry(_sum([inner, (cached[name], cached[name])])),
            }
            for name, block in blocks.items()
            for inner in [_sum(per_token[child] for child in layers if child.startswith(f"{name}."))]
        },
        "prefill": {
            "linears": _entry(prompt_body),
            "lm_head": _entry(prompt_top),
            "attention": sum(full.values()),
            "attention_causal": sum(causal.values()),
            "total": _entry(total),
            "per_token": {**_entry(total), "dense": total[0] / prompt_length, "sparse": total[1] / prompt_length},
            "total_causal": _entry(_sum([prompt_body, prompt_top, _both(causal)])),
            "total_last_position": _entry(_sum([prompt_body, top, _both(full)])),
        },
        "decode": {
            "linears": _entry(body),
            "lm_head": _entry(top),
            "attention": sum(cached.values()),
            "total": _entry(_sum([body, top, _both(cached)])),
        },
        **_size(model, layers, nnz, cache),
    }


def count_training_flops(
    model_or_config: Any, ranks: Mapping[str, int], *, sequence_length: int, sequences_per_step: int
) -> dict[str, Any]:
    """Count the FLOPs of one fine-tuning step with single-GEMM masked adapters, y = x (W + M * s B A)^T.

    Training computes dense products, whatever the mask. Per token, a frozen linear takes 2 GEMMs (forward, gradient
    of its input) and an adapted one 3 (the gradient of W + M * s B A as well, from which those of A and B follow).
    Per step, an adapter adds 4 products of its rank: BA for the forward pass, BA again for the backward pass (only
    x, A and B are saved), and the gradients of A and B. Attention takes 3 times its forward pass (full matrices). The
    gradient reaches the embeddings' output, as it does under gradient checkpointing, whose second forward pass isn't
    counted.

    Args:
        model_or_config: as for `count_flops`.
        ranks: the rank of each adapter by the linear's full name.
        sequence_length: tokens of a sequence, padding included.
        sequences_per_step: sequences between two optimizer updates, in one forward pass (each further accumulation
            pass adds the products of the rank once more).

    Returns:
        {"frozen", "adapted", "adapter_products", "attention", "total", "per_token"}: FLOPs of a step by part, and the
        total by token.

    Raises:
        PhoenixError: a rank names no linear or is below 1, or the model can't be counted (see `count_flops`).
    """
    if sequence_length < 1 or sequences_per_step < 1:
        raise PhoenixError("sequence_length, sequences_per_step: both must be 1 or more")
    model = _as_model(model_or_config)
    layers, blocks = matrices(model), decoder_blocks(model)
    _check_names(ranks, layers, "ranks")
    for name, rank in ranks.items():
        if rank < 1:
            raise PhoenixError(f"ranks: {name} has rank {rank}; it must be 1 or more")
    tokens = sequence_length * sequences_per_step
    gemm = {name: 2 * layer.visited(layer.weight.numel()) for name, layer in layers.items()}
    frozen = 2 * tokens * sum(gemm[name] for name in layers if name not in ranks)
    adapted = 3 * tokens * sum(gemm[name] for name in ranks)
    products = 4 * sum(gemm[name] * rank for name, rank in ranks.items())
    widths = [_attention(model.config, index, blocks[name])[0] for index, name in enumerate(blocks)]
    attention = 3 * sequences_per_step * sequence_length**2 * sum(widths)
    total = frozen + adapted + products + attention
    return {
        "frozen": frozen,
        "adapted": adapted,
        "adapter_products": products,
        "attention": attention,
        "total": total,
        "per_token": total / tokens,
    }


def measure_densities(model: nn.Module) -> dict[str, float]:
    """Measure the share of non-zero weights of every linear, for `count_flops`."""
    return {
        name: int(torch.count_nonzero(layer.weight)) / layer.weight.numel() for name, layer in linears(model).items()
    }


Pair = tuple[int, int]  # dense FLOPs, sparse FLOPs


def _as_model(model_or_config: Any) -> Any:
    if isinstance(model_or_config, nn.Module):
        return model_or_config
    from transformers import PretrainedConfig

    if not isinstance(model_or_config, PretrainedConfig):
        raise PhoenixError(f"{type(model_or_config).__name__}: give a model or a transformers configuration")
    return empty_model(model_or_config)


def _check_names(named: Mapping[str, Any], layers: Mapping[str, Matrix], what: str) -> None:
    unknown = sorted(set(named) - set(layers))
    if unknown:
        example = next(iter(layers), "none")
        raise PhoenixError(f"{what}: the model has no linear named {unknown[0]!r}; names are like {example!r}")


def _nonzeros(layers: Mapping[str, Matrix], densities: Mapping[str, float]) -> dict[str, int]:
    _check_names(densities, layers, "densities")
    for name, density in densities.items():
        if not isinstance(density, Real):
            raise PhoenixError(
                f"densities: {name} has {type(density).__name__}; give the share of its weights that are not zero, "
                "such as float(mask.float().mean())"
            )
        if not 0 <= density <= 1:
            raise PhoenixError(f"densities: {name} has density {density}; it must be between 0 and 1")
    return {name: round(densities.get(name, 1.0) * layer.weight.numel()) for name, layer in layers.items()}


def _head_name(model: Any, layers: Mapping[str, Matrix]) -> str:
    head = model.get_output_embeddings()
    for name, layer in layers.items():
        if head is not None and layer.weight is head.weight:
            return name
    raise PhoenixError(f"{type(model).__name__} has no linear lm_head; give a causal language model")


def _attention(config: Any, index: int, block: nn.Module) -> tuple[int, int | None]:
    """FLOPs for each (query, key) pair of one block over all heads, and the block's sliding window if it has one.

    Grouped-query attention repeats keys and values over the query heads, so the query heads are what counts.
    """
    heads, head_dim = config.num_attention_heads, _head_dim(config)
    if not any("attn" in name and layer.in_features == heads * head_dim for name, layer in linears(block).items()):
        raise PhoenixError(
            f"block {index}: no attention output of {heads} heads x {head_dim}; this kind of attention can't be counted"
        )
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[index] not in ("full_attention", "sliding_attention"):
        raise PhoenixError(f"block {index}: {kinds[index]} can't be counted; full and sliding attention can")
    if kinds and kinds[index] == "full_attention":
        window = None
    return 2 * 2 * heads * head_dim, window


def _causal_pairs(length: int, window: int | None) -> int:
    """Pairs (query, key) that a causal mask lets through: 1 + 2 + ... + length, each at most the window."""
    ramp = min(length, window or length)
    return ramp * (ramp + 1) // 2 + (length - ramp) * ramp


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _size(model: nn.Module, layers: Mapping[str, Matrix], nnz: Mapping[str, int], cache: int) -> dict[str, Any]:
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    zeros = {id(layer.weight): layer.weight.numel() - nnz[name] for name, layer in layers.items()}
    total = sum(parameter.numel() for parameter in parameters.values())
    kept = total - sum(zeros.values())
    dense = sum(parameter.nbytes for parameter in parameters.values())
    values = dense - sum(count * parameters[key].element_size() for key, count in zeros.items())
    bitmask = sum(-(-parameters[key].numel() // 8) for key, count in zeros.items() if count)
    return {
        "parameters": {"total": total, "nnz": kept, "density": kept / total},
        "bytes": {
            "dense": dense,
            "nonzero_values": values,
            "nonzero_values_and_bitmask": values + bitmask,
            "kv_cache": cache,
            "per_value": next(model.parameters()).element_size(),
        },
    }


def _entry(pair: Pair) -> dict[str, Any]:
    dense, sparse = pair
    return {"dense": dense, "sparse": sparse, "reduction": dense / sparse if sparse else None}


def _sum(pairs: Any) -> Pair:
    pairs = list(pairs)
    return sum(dense for dense, _ in pairs), sum(sparse for _, sparse in pairs)


def _scale(pair: Pair, factor: int) -> Pair:
    return pair[0] * factor, pair[1] * factor


def _both(attention: Mapping[str, int]) -> Pair:
    """Attention multiplies activations, so a sparse weight doesn't change it."""
    total = sum(attention.values())
    return total, total
