"""The environment with cerebras_pytorch where there is one, and runs whose pruning is done."""

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MixtralConfig

from phoenix_sparse.cerebras.environment import find_environment
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.masks import apply_masks, save_mask
from phoenix_sparse.models import prunable_linears, save_model
from tiny import COMMON, SIZES

CONFIGS = {
    # A base frequency of its own, where transformers 5 keeps it: a converter that passes over it is found out.
    "llama": lambda: LlamaConfig(
        **SIZES, **COMMON, num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    ),
    "mistral": lambda: MistralConfig(**SIZES, **COMMON, num_key_value_heads=2, sliding_window=4, dtype=torch.bfloat16),
    "mixtral": lambda: MixtralConfig(
        **SIZES, **COMMON, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    ),
}


@pytest.fixture(scope="session")
def environment():
    try:
        return find_environment()
    except PhoenixError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def with_modelzoo(environment):
    try:
        environment.require_modelzoo("this test")
    except PhoenixError as error:
        pytest.skip(str(error))
    return environment


def masks_of(layers, shares):
    """Keep the largest weights of each linear; the share of zeros differs from block to block."""
    found = {}
    for name, layer in layers.items():
        share = shares[int(name.split(".")[2])]
        ranks = layer.weight.detach().float().abs().flatten().argsort().argsort()
        found[name] = (ranks >= int(share * ranks.numel())).view(layer.weight.shape)
    return found


@pytest.fixture(scope="session")
def run_of(tmp_path_factory, tokenizer, task_directory):
    """Make a run directory as the first step leaves it: recipe, masks and pruned model."""
    made = {}

    def make(kind):
        if kind in made:
            return made[kind]
        torch.manual_seed(0)
        config = CONFIGS[kind]()
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.15)
        model.to(config.dtype or torch.float32)
        layers = prunable_linears(model)
        masks = masks_of(layers, (0.5, 0.75))
        run = tmp_path_factory.mktemp("runs") / kind
        dense = run.parent / f"{kind}-dense"
        save_model(model, tokenizer, dense)
        apply_masks(masks, layers)
        save_model(model, tokenizer, run / "sparse")
        save_mask(masks, run / "masks.safetensors")
        recipe = {
            "name": "tiny",
            "model": str(dense),
            "task": {"name": str(task_directory), "validation": 10},
            "finetune": {"ranks": [4], "learning_rate": 0.01, "batch_size": 4, "max_length": 32},
        }
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        made[kind] = run
        return run

    return make
