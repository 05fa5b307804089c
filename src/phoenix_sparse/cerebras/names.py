"""What a Hugging Face weight is called in ModelZoo, and how its rows lie there."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError

BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")
# Of linears inside a decoder block, without `.weight`.
LINEARS = {
    "self_attn.q_proj": "self_attn.proj_q_dense_layer",
    "self_attn.k_proj": "self_attn.proj_k_dense_layer",
    "self_attn.v_proj": "self_attn.proj_v_dense_layer",
    "self_attn.o_proj": "self_attn.proj_output_dense_layer",
    "mlp.up_proj": "ffn.ffn.0.linear_layer",
    "mlp.gate_proj": "ffn.ffn.0.linear_layer_for_glu",
    "mlp.down_proj": "ffn.ffn.1.linear_layer",
}
ROTATED = ("self_attn.q_proj", "self_attn.k_proj")


def cerebras_name(linear: str) -> str:
    """ModelZoo's name of a linear's weight, such as `transformer_decoder.layers.0.ffn.ffn.1.linear_layer.weight`.

    Args:
        linear: its Hugging Face name, `model.layers.0.mlp.down_proj`.

    Raises:
        PhoenixError: a linear of another kind of model.
    """
    found = BLOCK.fullmatch(linear)
    if found is None or found[2] not in LINEARS:
        raise PhoenixError(
            f"cerebras: {linear} has no counterpart in ModelZoo that is known here; Llama, Mistral and Mixtral "
            "(its attention) can be exported"
        )
    return f"transformer_decoder.layers.{found[1]}.{LINEARS[found[2]]}.weight"


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Lay a rotary projection's rows (heads·d, ...) as ModelZoo has them.

    Hugging Face rotates dimension i of a head with i + d/2, ModelZoo 2i with 2i + 1: within each head, the halves
    become pairs.

    Args:
        rows: of a weight or a mask.
        heads: of queries, or of keys and values.
    """
    size = rows.shape[0] // heads
    return rows.unflatten(0, (heads, 2, size // 2)).transpose(1, 2).reshape(rows.shape)


def cerebras_masks(masks: Mapping[str, Tensor], heads: int, key_heads: int) -> dict[str, Tensor]:
    """A mask set by ModelZoo's names and in its layout.

    Args:
        masks: boolean (out, in) by Hugging Face names.
        heads: of queries.
        key_heads: of keys and values.

    Raises:
        PhoenixError: a name that ModelZoo has no counterpart of, or rows that don't divide into heads.
    """
    result = {}
    for name, mask in masks.items():
        new = cerebras_name(name)
        if name.endswith(ROTATED):
            count = heads if name.endswith("q_proj") else key_heads
            if mask.shape[0] % (2 * count):
                raise PhoenixError(f"cerebras: {name} has {mask.shape[0]} rows, which {count} heads don't divide")
            mask = interleave(mask, count)
        result[new] = mask.to(torch.bool)
    return result
