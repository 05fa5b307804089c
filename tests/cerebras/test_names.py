"""Names and rotary layout, against rotation itself."""

import pytest
import torch

from phoenix_sparse.cerebras.names import cerebras_masks, cerebras_name, interleave
from phoenix_sparse.errors import PhoenixError


def halves(x, angles):
    """Hugging Face's rotation, in float64: dimension i with i + d/2."""
    left, right = x.chunk(2, -1)
    return torch.cat((left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()), -1)


def pairs(x, angles):
    """ModelZoo's: dimension 2i with 2i + 1."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack(
        (even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()), -1
    ).flatten(-2)


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 8), (4, 6)])
def test_attention_scores_are_the_same_in_both_layouts(heads, size):
    torch.manual_seed(heads)
    x = torch.randn(5, 7, dtype=torch.float64)
    query, key = (torch.randn(heads * size, 7, dtype=torch.float64) for _ in range(2))
    angles = torch.arange(5.0, dtype=torch.float64)[:, None, None] * torch.rand(size // 2, dtype=torch.float64)

    def scores(rotate, layout):
        q, k = (rotate((x @ layout(w).T).view(5, heads, size), angles) for w in (query, key))
        return torch.einsum("ihd,jhd->hij", q, k)

    other = scores(pairs, lambda weight: interleave(weight, heads))
    assert torch.allclose(scores(halves, lambda weight: weight), other, atol=1e-12)
    assert not torch.allclose(scores(halves, lambda weight: weight), scores(pairs, lambda weight: weight)) or size == 2


def test_only_q_and_k_change_their_rows():
    masks = {
        f"model.layers.3.{name}": torch.rand(8, 4) > 0.5
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    }
    laid_out = cerebras_masks(masks, 2, 1)
    assert torch.equal(
        laid_out["transformer_decoder.layers.3.self_attn.proj_q_dense_layer.weight"],
        masks["model.layers.3.self_attn.q_proj"][[0, 2, 1, 3, 4, 6, 5, 7]],
    )
    assert torch.equal(
        laid_out["transformer_decoder.layers.3.self_attn.proj_k_dense_layer.weight"],
        masks["model.layers.3.self_attn.k_proj"][[0, 4, 1, 5, 2, 6, 3, 7]],
    )
    assert torch.equal(
        laid_out["transformer_decoder.layers.3.ffn.ffn.0.linear_layer.weight"], masks["model.layers.3.mlp.up_proj"]
    )


def test_names_of_other_models_are_refused():
    for name in ("model.decoder.layers.0.fc1", "lm_head", "model.layers.0.mlp.experts.gate_up_proj"):
        with pytest.raises(PhoenixError, match="no counterpart"):
            cerebras_name(name)


def test_rows_that_heads_do_not_divide_are_refused():
    with pytest.raises(PhoenixError, match="3 heads"):
        cerebras_masks({"model.layers.0.self_attn.q_proj": torch.ones(8, 4, dtype=torch.bool)}, 3, 1)
