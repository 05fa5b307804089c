"""What a recipe would need: memory, disk and time, from the configuration and a short measurement, running nothing."""

import time
from pathlib import Path
from typing import Any

import torch

from phoenix_sparse.evaluation.flops import count_training_flops
from phoenix_sparse.finetuning.adapter import target_linears
from phoenix_sparse.finetuning.batching import PackRows
from phoenix_sparse.finetuning.elastic import is_fixed, largest, spaces
from phoenix_sparse.models import (
    decoder_blocks,
    empty_model,
    find_device,
    linears,
    load_config,
    load_tokenizer,
    prunable_linears,
)
from phoenix_sparse.pruning.settings import CHOOSING
from phoenix_sparse.recipe import Recipe
from phoenix_sparse.tasks import Task

BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
SAMPLED_EXAMPLES = 2000


def estimate(recipe: Recipe, directory: Path, task: Task) -> dict[str, Any]:
    """Estimate a run's needs.

    Memory counts weights, masks, the adapter with its gradient and Adam's two moments (with method=full the weights
    that train, all of them in float32), one buffer of the largest linear, and the activations that training keeps.
    Validation needs less than a step does. Time counts the FLOPs of training at the rate that a matrix
    product of this model's size reaches here and now. What lies between the products (norms, activations, launches)
    isn't counted, which makes small models slower than that, and neither is evaluation.

    Returns:
        `model`, `task`, `training`, `evaluation`, `pruning_bytes`, `memory_bytes` and `search_bytes` (memory of
        pruning, of training and of the search), `disk_bytes` and `seconds`, each a mapping of names to figures.
    """
    config, device = load_config(directory), find_device(recipe.device)
    model = empty_model(config)
    width = _width(config, recipe, device)
    layers = prunable_linears(model)
    adapted = target_linears(model, recipe.finetune.targets)
    distill = recipe.finetune.distill
    baselines = {*recipe.evaluate.baselines} | ({"dense_lora"} & {distill.teacher if distill is not None else ""})
    full, with_baseline = recipe.finetune.method == "full", "dense_lora" in baselines
    # Trained weights have no ranks, but the baseline beside them does.
    space = spaces(adapted, recipe.finetune.ranks) if with_baseline or not full else {}
    ranks = largest(space)
    prunable = sum(layer.weight.numel() for layer in layers.values())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    replaced = sum(layer.weight.numel() for layer in adapted.values()) if full else 0
    adapter = replaced or sum(ranks[name] * (layer.in_features + layer.out_features) for name, layer in adapted.items())
    lengths = _lengths(task, directory, recipe)
    tokens, at_once = round(sum(lengths) / len(lengths)), _tokens_at_once(recipe, lengths)
    weights = parameters * width
    memory = {
        "weights": weights - width * replaced,
        "masks": prunable,
        "trained weights, gradient and optimizer" if full else "adapter, gradient and optimizer": 16 * adapter,
        "weight buffer": 2 * width * max(layer.weight.numel() for layer in layers.values()),
        "activations": _activations(config, recipe, at_once, width),
    }
    if distill is not None:
        states = width * config.hidden_size * config.num_hidden_layers if distill.hidden else 0
        memory["teacher"] = weights + at_once * (states + (width + 12) * config.vocab_size)
    if recipe.finetune.evolve is not None:  # bits, and the sum of a step's gradients where it has several parts
        moving = sum(layer.weight.numel() for layer in adapted.values())
        parts = recipe.finetune.passes * recipe.finetune.batch_size // recipe.finetune.micro_batch
        memory["evolving masks"] = moving // 8 + (width * moving if parts > 1 else 0)
    memory["in all"] = sum(memory.values())
    # Two checkpoints, the best weights of each of their validation curves, and of the present one.
    checkpoints = 2 * 12 * adapter + (3 * 4 * adapter if recipe.finetune.validate_every else 0)
    models = 2 + with_baseline
    disk = {
        "models": models * weights,
        "masks": prunable // 8,
        "adapters and checkpoints": 2 * (width if full else 4) * adapter + checkpoints,
        "while pruning": width * prunable + (4 * prunable if recipe.sparsify.reads_gradients else 0),
    }
    disk["in all"] = sum(disk.values())
    size = {"sequence_length": tokens, "sequences_per_step": recipe.finetune.batch_size}
    counted = count_training_flops(model, dict.fromkeys(adapted, 1) if full else ranks, **size)
    step = recipe.finetune.passes * (counted["total"] - (counted["adapter_products"] if full else 0))
    if distill is not None:  # the teacher's forward pass beside each of the student's
        step += recipe.finetune.passes * counted["total"] / 3
    # The baseline's ranks are fixed, and its steps one pass each.
    beside = count_training_flops(model, ranks, **size)["total"] if with_baseline else 0
    steps = recipe.finetune.count_steps(len(task.train))
    trainings = 1 + with_baseline
    every = recipe.finetune.validate_every
    validations = -(-steps // every) if every else 0
    # A forward pass is a third of a step; both trainings validate.
    forward = counted["total"] / 3 / recipe.finetune.batch_size * len(task.validation) * validations * trainings
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
            "FLOPs of a step": step,
            "FLOP/s measured here": rate,
        },
        "evaluation": {
            "models on the test split": 1 + len(baselines),
            "sub-adapters on the validation split": 1
            if full or is_fixed(space)
            else 1 + 2 * search.bounds + search.hill_climb + search.nsga2,
        }
        | ({"validations of each training": validations} if every else {}),
        "pruning_bytes": _pruning(config, model, recipe, width),
        "memory_bytes": memory,
        "search_bytes": {"weights and masks": weights + prunable}
        if full
        else {"weights, masks, weights written out": weights + prunable + width * prunable},
        "disk_bytes": disk,
        "seconds": {"training, at that rate": steps * (step + beside) / rate}
        | ({"validation, at that rate": forward / rate} if every else {}),
    }


def _pruning(config: Any, model: Any, recipe: Recipe, width: int) -> dict[str, int]:
    """Memory of pruning, GPU and CPU together: blocks come from the disk one at a time where the method allows it.

    Scores of all linears have to lie side by side for a global threshold (at its peak 24 bytes a weight), for
    structured pruning and for the evolutionary search, which also needs the whole model and a copy of its linears.
    """
    settings, hidden, blocks = recipe.sparsify, config.hidden_size, decoder_blocks(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    of_block = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks.values()]
    prunable = sum(layer.weight.numel() for layer in prunable_linears(model).values())
    searches, tokens = settings.allocation == "evolutionary", settings.calibration.samples * settings.calibration.length
    one = width * (parameters - sum(of_block) + max(of_block))
    needs = {"weights": width * parameters} if searches else {"weights, a block at a time": one}
    if settings.reads_tokens:
        needs["calibration states"] = width * tokens * hidden
    if settings.reads_gradients:
        needs["states before each block"] = width * tokens * hidden * (len(blocks) + 1)
    if settings.update in CHOOSING:
        grams = [sum(4 * layer.in_features**2 for layer in linears(block).values()) for block in blocks.values()]
        needs["second moments of a block's inputs"] = max(grams)
    if settings.comparison_group == "global":
        needs["scores of all linears, sorted"] = 24 * prunable
    elif settings.parsed_pattern.kind == "structured" or searches:
        needs["scores of all linears"] = 4 * prunable
    if searches:
        needs["copy of the linears"] = width * prunable
        if settings.evolution.fitness == "kl":
            judged = min(settings.evolution.sequences[-1], settings.calibration.samples) * settings.calibration.length
            needs["dense log-probabilities, at most"] = 2 * judged * config.vocab_size
    needs["masks"] = prunable
    needs["in all"] = sum(needs.values())
    return needs


def _width(config: Any, recipe: Recipe, device: torch.device) -> int:
    if recipe.dtype != "auto":
        return {"float32": 4, "bfloat16": 2}[recipe.dtype]
    stored = getattr(config, "dtype", None) or torch.float32
    return 4 if stored == torch.float16 and device.type == "cpu" else BYTES.get(stored, 4)


def _lengths(task: Task, directory: Path, recipe: Recipe) -> list[int]:
    """Lengths of the first training examples in tokens, as they are trained on."""
    tokenizer, limit = load_tokenizer(directory), recipe.finetune.max_length
    sample = task.train[:SAMPLED_EXAMPLES]
    return [min(len(tokenizer(example.prompt + example.completion).input_ids) + 1, limit) for example in sample]


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
    return tokens * (blocks + (2 * width + 12) * config.vocab_size)


def _tokens_at_once(recipe: Recipe, lengths: list[int]) -> int:
    """Tokens of the largest micro-batch, padding included; packed ones are packed as they stand in the data."""
    examples = recipe.finetune.micro_batch
    if recipe.finetune.batching != "packed":
        return examples * max(lengths)
    collate = PackRows(0, recipe.finetune.max_length)
    rows = [{"input_ids": [0] * length, "labels": [0] * length} for length in lengths]
    return max(collate(rows[n : n + examples])["input_ids"].numel() for n in range(0, len(rows), examples))


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
