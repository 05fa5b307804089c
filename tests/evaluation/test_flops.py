"""FLOPs against torch's own counter, which watches every matrix product that really runs."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
)

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.evaluation.flops import count_flops, count_training_flops, measure_densities
from phoenix_sparse.models import linears, prunable_linears

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 67,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2),
    "llama-tied-wide-heads": LlamaConfig(**SIZES, intermediate_size=48, head_dim=12, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, intermediate_size=48, num_key_value_heads=1, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES, intermediate_size=48, num_key_value_heads=2),
    "qwen2-sliding": Qwen2Config(
        **SIZES,
        intermediate_size=48,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    ),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "opt-projected": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").eval()


def watched(counter: FlopCounterMode) -> int:
    """The counter's total without the rotary angles, which some versions of transformers make by a product."""
    counts = counter.get_flop_counts()
    angles = sum(sum(ops.values()) for name, ops in counts.items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - angles


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_and_decode_equal_torchs_counter(name: str) -> None:
    model, prompt, context = build(name), 9, 12
    counted = count_flops(CONFIGS[name], None, prompt_length=prompt, context_length=context)
    tokens = torch.randint(3, 60, (1, context))
    with torch.no_grad():
        with FlopCounterMode(display=False) as prefill:
            model(tokens[:, :prompt])
        with FlopCounterMode(display=False) as last:
            model(tokens[:, :prompt], logits_to_keep=1)
        cache = model(tokens[:, : context - 1], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as decode:
            model(tokens[:, context - 1 :], past_key_values=cache, use_cache=True)
    assert counted["prefill"]["total"]["dense"] == watched(prefill)
    assert counted["prefill"]["total_last_position"]["dense"] == watched(last)
    assert counted["decode"]["total"]["dense"] == watched(decode)


@pytest.mark.parametrize("name", ["llama", "opt-projected"])
def test_every_linear_and_block_equals_torchs_counter(name: str) -> None:
    model = build(name)
    counted = count_flops(model, None, prompt_length=7, context_length=7)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randint(3, 60, (1, 7)))
    # The counter names modules from the class of the root on.
    seen = {key.removeprefix(f"{type(model).__name__}."): sum(ops.values()) for key, ops in counter.flop_counts.items()}
    for linear, entry in counted["linears"].items():
        assert 7 * entry["flops_per_token"]["dense"] == seen[linear]
    for block, entry in counted["blocks"].items():
        assert entry["prefill"]["dense"] == seen[block]


@given(density=st.floats(0, 1), prompt=st.integers(1, 40), context=st.integers(1, 40))
@settings(deadline=None, max_examples=25)
def test_sparse_counts_are_those_of_the_nonzeros(density: float, prompt: int, context: int) -> None:
    config = CONFIGS["llama"]
    chosen = {"model.layers.0.self_attn.q_proj": density, "model.layers.1.mlp.down_proj": density}
    counted = count_flops(config, chosen, prompt_length=prompt, context_length=context)
    saved = 2 * sum(entry["shape"][0] * entry["shape"][1] - entry["nnz"] for name, entry in counted["linears"].items())
    for part, tokens in (("prefill", prompt), ("decode", 1)):
        total = counted[part]["total"]
        assert total["dense"] - total["sparse"] == saved * tokens
        assert counted[part]["linears"]["dense"] - counted[part]["linears"]["sparse"] == saved * tokens
    assert counted["parameters"]["total"] - counted["parameters"]["nnz"] == saved // 2
    for name, entry in counted["linears"].items():
        assert abs(entry["density"] - chosen.get(name, 1.0)) <= 0.5 / (entry["shape"][0] * entry["shape"][1])


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2-sliding"])
@pytest.mark.parametrize("length", [1, 3, 11])
def test_causal_attention_counts_the_pairs_of_the_mask(name: str, length: int) -> None:
    config = CONFIGS[name]
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * 2
    pairs = 0
    for kind in kinds:
        window = (config.sliding_window if kind == "sliding_attention" else None) if name != "llama" else None
        pairs += sum(1 for q in range(length) for k in range(q + 1) if window is None or q - k < window)
    counted = count_flops(config, None, prompt_length=length, context_length=1)["prefill"]
    assert counted["attention_causal"] == pairs * 4 * 32
    assert counted["total"]["dense"] - counted["total_causal"]["dense"] == (2 * length**2 - pairs) * 4 * 32


def test_parts_add_up() -> None:
    counted = count_flops(CONFIGS["llama"], {"lm_head": 0.5}, prompt_length=6, context_length=8)
    for kind in ("dense", "sparse"):
        for part in ("prefill", "decode"):
            parts = counted[part]
            assert parts["total"][kind] == parts["linears"][kind] + parts["lm_head"][kind] + parts["attention"]
            blocks = sum(block[part][kind] for block in counted["blocks"].values())
            assert blocks == parts["linears"][kind] + parts["attention"]
        assert counted["prefill"]["per_token"][kind] * 6 == counted["prefill"]["total"][kind]
    assert counted["decode"]["lm_head"]["reduction"] == 2


def test_llama_3_8b_needs_no_memory() -> None:
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
    )
    counted = count_flops(config, None, prompt_length=2048, context_length=2048)
    assert counted["parameters"]["total"] == 8_030_261_248  # as the model's card says
    # 2 FLOPs for each parameter that multiplies (all but the embeddings and the norms), and attention.
    weights = 8_030_261_248 - 128256 * 4096 - 65 * 4096
    assert counted["decode"]["total"]["dense"] == 2 * weights + 32 * 4 * 4096 * 2048
    assert counted["bytes"]["dense"] == 2 * 8_030_261_248
    assert counted["bytes"]["kv_cache"] == 2 * 32 * 8 * 128 * 2048 * 2


def test_bytes_and_measured_densities() -> None:
    model = build("llama-tied-wide-heads")
    assert set(measure_densities(model).values()) == {1.0}
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[:, ::2] = 0
    densities = measure_densities(model)
    assert densities["model.layers.0.mlp.up_proj"] == 0.5
    counted = count_flops(model, densities, prompt_length=1, context_length=1)
    stored = sum(parameter.numel() for parameter in model.parameters())
    assert counted["parameters"]["total"] == stored
    assert counted["parameters"]["nnz"] == sum(
        int(torch.count_nonzero(p)) for p in linears(model).values() for p in [p.weight]
    ) + sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert counted["bytes"]["dense"] == 4 * stored
    assert counted["bytes"]["nonzero_values"] == 4 * counted["parameters"]["nnz"]
    assert counted["bytes"]["nonzero_values_and_bitmask"] == 4 * counted["parameters"]["nnz"] + weight.numel() // 8


class Masked(nn.Module):
    """W + M * (B A), by autograd's own rules."""

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]))
        self.b = nn.Parameter(torch.randn(weight.shape[0], rank))
        self.register_buffer("mask", torch.rand_like(weight) > 0.5)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.mask * (self.b @ self.a)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_training_equals_torchs_counter(name: str) -> None:
    model = build(name).requires_grad_(False)
    ranks = {linear: 3 + index % 2 for index, linear in enumerate(prunable_linears(model)) if index != 2}
    counted = count_training_flops(model, ranks, sequence_length=7, sequences_per_step=2)
    for linear, rank in ranks.items():
        layer = model.get_submodule(linear)
        parametrize.register_parametrization(layer, "weight", Masked(layer.weight, rank))
    model.enable_input_require_grads()
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(3, 60, (2, 7))).logits.sum().backward()
    # Autograd keeps W + M * BA, where the adapter builds BA a second time: one product of the rank in four.
    rebuilt = counted["adapter_products"] // 4
    assert counted["total"] - rebuilt == watched(counter)
    assert counted["per_token"] == counted["total"] / 14
    parts = ("frozen", "adapted", "adapter_products", "attention")
    assert counted["total"] == sum(counted[part] for part in parts)


@pytest.mark.parametrize(
    ("densities", "lengths", "message"),
    [
        ({"model.layers.9.mlp.up_proj": 0.5}, (4, 4), "no linear named 'model.layers.9.mlp.up_proj'"),
        ({"model.layers.0.mlp.up_proj": 1.5}, (4, 4), "between 0 and 1"),
        ({"model.layers.0.mlp.up_proj": float("nan")}, (4, 4), "between 0 and 1"),
        (None, (0, 4), "prompt_length: 0"),
        (None, (4, 0), "context_length: 0"),
    ],
)
def test_bad_input(densities: Any, lengths: tuple[int, int], message: str) -> None:
    with pytest.raises(PhoenixError, match=message):
        count_flops(CONFIGS["llama"], densities, prompt_length=lengths[0], context_length=lengths[1])


def test_models_with_other_matrices_are_refused() -> None:
    with pytest.raises(PhoenixError, match="can't be counted"):
        count_flops(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32), None, prompt_length=4, context_length=4)


@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_of_a_mixture_the_chosen_experts_count(chosen: int) -> None:
    """As many multiplications as a dense model has whose MLP is as wide as the chosen experts together."""
    mixture = MixtralConfig(
        **SIZES, num_key_value_heads=2, intermediate_size=48, num_local_experts=4, num_experts_per_tok=chosen
    )
    dense = LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=48 * chosen)
    found, wide = (count_flops(one, None, prompt_length=6, context_length=9) for one in (mixture, dense))
    routers = 2 * 2 * 4 * 32  # operations, blocks, experts, width
    assert found["decode"]["total"]["dense"] == wide["decode"]["total"]["dense"] + routers
    assert found["prefill"]["total"]["dense"] == wide["prefill"]["total"]["dense"] + 6 * routers
    halved = {"model.layers.0.mlp.experts.down_proj": 0.5}
    less = count_flops(mixture, halved, prompt_length=6, context_length=9)["decode"]["total"]
    assert less["dense"] - less["sparse"] == chosen * 48 * 32


def test_a_rank_for_an_unknown_linear_is_refused() -> None:
    with pytest.raises(PhoenixError, match="ranks: the model has no linear"):
        count_training_flops(CONFIGS["llama"], {"q_proj": 4}, sequence_length=4, sequences_per_step=1)
