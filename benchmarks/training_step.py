"""A whole training step of a small pruned Llama, trained in different ways: times, memory, and the zeros at the end."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from measuring import (
    LORA,
    RANK,
    SCALE,
    SEED,
    SPARSITY,
    Context,
    mixed,
    peak_bytes,
    saved_bytes,
    summary,
    tensor_bytes,
    time_in_turn,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor

from phoenix_sparse.errors import CheckFailed
from phoenix_sparse.finetuning.adapter import add_adapter, elastic_layers
from phoenix_sparse.masks import apply_masks
from phoenix_sparse.models import prunable_linears

WARMUP = {"cuda": 5, "cpu": 1}


class Training:
    """A model with its optimizer and one batch of random tokens; nothing is checkpointed or clipped."""

    def __init__(self, model: Any, tokens: Tensor, context: Context = nullcontext) -> None:
        self.model, self.tokens, self.context = model.train(), tokens, context
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.trained = sum(parameter.numel() for parameter in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=tokens.device.type == "cuda")

    def loss(self) -> Tensor:
        with self.context():
            return self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss

    def step(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def resident(self) -> list[Tensor]:
        """Weights, masks and the optimizer's moments."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*self.model.parameters(), *self.model.buffers(), *(m for m in moments if isinstance(m, Tensor))]


def make_trainings(device: torch.device, dtype: torch.dtype, tokens: Tensor) -> dict[str, Training]:
    """Four ways to train one pruned Llama of 65 million weights; on a GPU PEFT's counts twice."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=640,
        intermediate_size=1728,
        num_hidden_layers=12,
        num_attention_heads=10,
        num_key_value_heads=5,
        tie_word_embeddings=True,
    )
    torch.manual_seed(SEED)
    model: Any = LlamaForCausalLM(config)
    model.to(device, dtype)
    layers = prunable_linears(model)
    masks = {name: torch.rand(layer.weight.shape, device=device) >= SPARSITY for name, layer in layers.items()}
    apply_masks(masks, layers)
    targets = sorted({name.rsplit(".", 1)[-1] for name in layers})

    def stock() -> Any:
        lora = LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules=targets, task_type="CAUSAL_LM")
        return get_peft_model(copy.deepcopy(model), lora)

    trainings = {LORA: Training(stock(), tokens, mixed(tokens.device))}
    if device.type == "cuda":
        trainings["lora_plain"] = Training(stock(), tokens)
    for name, through in (("ours", masks), ("ours_dense", None)):
        adapted = add_adapter(copy.deepcopy(model), rank=RANK, scale=SCALE, masks=through, seed=SEED)
        trainings[name] = Training(adapted, tokens)
    model.requires_grad_(False)
    for layer in layers.values():
        layer.requires_grad_()
    return trainings | {"full_finetuning": Training(model, tokens)}


def measure_training(
    device: torch.device, dtype: torch.dtype, batch: int, length: int, repeats: int
) -> tuple[int, list[dict[str, Any]]]:
    """A whole training step: non-zeros off the masks at the end, and a row a way of training.

    Raises:
        CheckFailed: a loss is not finite, or a zero was not kept.
    """
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(16384, (batch, length), generator=generator).to(device)
    trainings = make_trainings(device, dtype, tokens)
    steps: dict[str, Callable[[], Tensor]] = {name: training.step for name, training in trainings.items()}
    seconds = time_in_turn(steps, device, repeats, WARMUP[device.type])
    rows = []
    for name, training in trainings.items():
        resident = training.resident()
        on_gpu = device.type == "cuda"
        memory = peak_bytes(training.step) if on_gpu else saved_bytes(training.loss, [*resident, tokens])
        if not torch.isfinite(training.step()):
            raise CheckFailed(f"{name}: the loss is not finite after {repeats} steps")
        figures = summary(seconds[name], {"lora": seconds[LORA]})
        sizes = {"trained": training.trained, "memory_bytes": memory, "resident_bytes": tensor_bytes(resident)}
        rate = {"tokens_per_second": batch * length / figures["seconds"]}
        rows.append({"variant": name, "batch": batch, "length": length} | sizes | figures | rate)
    with torch.no_grad():
        masked: list[Any] = list(elastic_layers(trainings["ours"].model).values())
        stray = sum(int((layer.merged_weight()[~layer.mask] != 0).sum()) for layer in masked)
    if stray:
        raise CheckFailed(f"ours: {stray} non-zeros off the masks after training")
    return stray, rows
