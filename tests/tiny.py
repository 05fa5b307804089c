"""Tiny models, made on the spot."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, OPTConfig, Qwen2Config

from phoenix_sparse.pruning.initialise import prune
from phoenix_sparse.pruning.settings import SparsifySettings

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {
    "vocab_size": 257,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, **COMMON, num_key_value_heads=2),
    "mistral": lambda: MistralConfig(**SIZES, **COMMON, num_key_value_heads=2, sliding_window=16),
    "qwen2": lambda: Qwen2Config(**SIZES, **COMMON, num_key_value_heads=2),
    "opt": lambda: OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32, **COMMON
    ),
}


def make_model(kind: str = "llama", seed: int = 0) -> Any:
    """A randomly initialised model whose weights are spread out enough for logits to differ."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.1)
    return model


def pruned(kind: str = "llama") -> tuple[Any, dict[str, Tensor]]:
    """A model at 60% sparsity, and its masks."""
    model = make_model(kind)
    return model, prune(model, SparsifySettings(importance="magnitude", sparsity=0.6), tokens=None, seed=0)
