"""What a recipe would need: memory, disk and time, from the configuration and a short measurement, running nothing."""

import math
import time
from pathlib import Path
from typing import Any

import torch

from phoenix_sparse.evaluation.flops import count_training_flops
from phoenix_sparse.finetuning.adapter import target_names
from phoenix_sparse.models import empty_model, find_device, load_config, load_tokenizer, prunable_linears
from phoenix_sparse.recipe import Recipe
from phoenix_sparse.tasks import Task

BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
SAMPLED_EXAMPLES = 2000


def estimate(recipe: Recipe, directory: Path, task: Task) -> dict[str, Any]:
    """Estimate a run's needs.

    Memory counts weights, masks, the adapter with its gradient and Adam's two moments, one buffer of the largest
    linear, and the activations that training keeps. Time counts the FLOPs of training at the rate that a matrix
    product of this model's size reaches here and now. What lies between the products (norms, activations, launches)
    isn't counted, which makes small models slower than that, and neither is evaluation.

    Returns:
        `model`, `task`, `training`, `evaluation`, `memory_bytes` (of training), `search_bytes` (memory of the
        search), `disk_bytes` and `seconds`, each a mapping of names
        to figures.
    """
    config, device = load_config(directory), find_device(recipe.device)
    model = empty_model(config)
    width = _width(config, recipe, device)
    layers = prunable_linears(model)
    targets = target_names(model, recipe.finetune.targets)
    adapted = {name: layer for name, layer in layers.items() if name.rsplit(".", 1)[-1] in targets}
    prunable = sum(layer.weight.numel() for layer in layers.values())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    adapter = recipe.finetune.ranks[0] * sum(layer.in_features + layer.out_features for layer in adapted.values())
    tokens, longest = _lengths(task, directory, recipe)
    examples = math.ceil(recipe.finetune.epochs * len(task.train))
    if recipe.finetune.max_steps is not None:
        examples = recipe.finetune.max_steps * recipe.finetune.batch_size
    weights = parameters * width
    memory = {
        "weights": weights,
        "masks": prunable,
        "adapter, gradient and optimizer": 16 * adapter,
        "weight buffer": 2 * width * max(layer.weight.numel() for layer in layers.values()),
        "activations": _activations(config, recipe, longest, width),
    }
    memory["in all"] = sum(memory.values())
    checkpoints = 2 * 12 * adapter
    models = 2 + ("dense_lora" in recipe.evaluate.baselines)
    disk = {
        "models": models * weights,
        "masks": prunable // 8,
        "adapters and checkpoints": 2 * 4 * adapter + checkpoints,
    }
    disk["in all"] = sum(disk.values())
    step = count_training_flops(
        model,
        dict.fromkeys(adapted, recipe.finetune.ranks[0]),
        sequence_length=tokens,
        sequences_per_step=recipe.finetune.batch_size,
    )
    steps = math.ceil(examples / recipe.finetune.batch_size)
    trainings = 1 + ("dense_lora" in recipe.evaluate.baselines)
    rate = _rate(config, recipe, device, width, tokens)
    search = recipe.search
    return {
        "model": {"parameters": parameters, "prunable": prunable, "layers": len(layers), "adapter": adapter},
        "task": {
            "train": len(task.train),
            "validation": len(task.validation),
            "test": task.test_size,
            "tokens per example": tokens,
        },
        "training": {
            "trainings": trainings,
            "steps of each": steps,
            "FLOPs of a step": step["total"],
            "FLOP/s measured here": rate,
        },
        "evaluation": {
            "models on the test split": 1 + len(recipe.evaluate.baselines),
            "sub-adapters on the validation split": 1
            if len(recipe.finetune.ranks) == 1
            else 1 + 2 * search.bounds + search.hill_climb + search.nsga2,
        },
        "memory_bytes": memory,
        "search_bytes": {"weights, masks, weights written out": weights + prunable + width * prunable},
        "disk_bytes": disk,
        "seconds": {"training, at that rate": trainings * steps * step["total"] / rate},
    }


def _width(config: Any, recipe: Recipe, device: torch.device) -> int:
    if recipe.dtype != "auto":
        return {"float32": 4, "bfloat16": 2}[recipe.dtype]
    stored = getattr(config, "dtype", None) or torch.float32
    return 4 if stored == torch.float16 and device.type == "cpu" else BYTES.get(stored, 4)


def _lengths(task: Task, directory: Path, recipe: Recipe) -> tuple[int, int]:
    """Mean and greatest length of a training example in tokens, from the first ones."""
    tokenizer = load_tokenizer(directory)
    sample = task.train[:SAMPLED_EXAMPLES]
    lengths = [len(tokenizer(example.prompt + example.completion).input_ids) + 1 for example in sample]
    limit = recipe.finetune.max_length
    return min(round(sum(lengths) / len(lengths)), limit), min(max(lengths), limit)


def _activations(config: Any, recipe: Recipe, tokens: int, width: int) -> int:
    """What training keeps in its largest batch.

    About 16 hidden and 4 intermediate vectors a token and block; and the logits with their gradient in the model's
    dtype, and in float32 with their logarithm and its gradient.
    """
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", 4 * hidden)
    block = width * (16 * hidden + 4 * inner)
    blocks = (
        block + width * hidden * config.num_hidden_layers
        if recipe.finetune.gradient_checkpointing
        else (block * config.num_hidden_layers)
    )
    return recipe.finetune.micro_batch * tokens * (blocks + (2 * width + 12) * config.vocab_size)


def _rate(config: Any, recipe: Recipe, device: torch.device, width: int, tokens: int) -> float:
    """FLOP/s of a product of a micro-batch with a (hidden, hidden) weight, the best of some (others may be at work)."""
    rows, size = recipe.finetune.micro_batch * tokens, config.hidden_size
    dtype = torch.float32 if width == 4 else torch.bfloat16
    one, two = torch.randn(rows, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(12):
        started = time.perf_counter()
        one @ two
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * rows * size * size / min(seconds)
