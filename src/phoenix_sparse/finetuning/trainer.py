"""Train the super-adapter with the Hugging Face Trainer, so that a killed run goes on to the same weights."""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from phoenix_sparse.determinism import sound_gradients
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import write_json
from phoenix_sparse.finetuning.adapter import adapter_parameters, elastic_layers, set_ranks
from phoenix_sparse.finetuning.elastic import Ranks, draw, largest, sandwich, spaces
from phoenix_sparse.finetuning.examples import PadRight
from phoenix_sparse.finetuning.settings import FinetuneSettings
from phoenix_sparse.progress import Progress

Row = dict[str, list[int]]
COMPLETE = "complete.json"


def train(
    model: PeftModel,
    rows: Sequence[Row],
    settings: FinetuneSettings,
    *,
    pad: int,
    seed: int,
    work: Path,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train an adapter in place and give the record of the training.

    Under `accelerate launch`, every process trains on its share of each batch and ends with the same adapter: a step
    has `batch_size` examples, however many processes there are.

    Args:
        model: with its adapter on, on the device to train on.
        rows: tokenized examples (`examples.tokenize`).
        settings: of the recipe.
        pad: the padding token.
        seed: for the order of the examples and the draws of ranks.
        work: where checkpoints go; a complete one that lies there is gone on from.
        progress: called with (what, step, steps).

    Returns:
        `log` (step, epoch, loss, learning_rate, grad_norm), `steps`, `examples`, `tokens`, `seconds` (of this
        attempt), `resumed_from`, `peak_memory_bytes` (None on a CPU), `trainable_parameters`, and what was trained:
        `method`, `sampling`, `scale` and `scale_rule`.

    Raises:
        PhoenixError: there are no examples, the processes can't share a batch evenly, ranks are given to layers that
            there are not, or the loss is no longer finite.
    """
    if not rows:
        raise PhoenixError(
            "finetune: no training example fits finetune.max_length; raise it or look at the task's data"
        )
    device = next(model.parameters()).device
    order = training_order(len(rows), settings, seed)
    steps = math.ceil(len(order) / settings.batch_size)
    space = spaces(elastic_layers(model), settings.ranks)
    arguments = _arguments(settings, steps, seed, work, device)
    trainer = _ElasticTrainer(
        model=model,
        args=arguments,
        train_dataset=[rows[index] for index in order],
        data_collator=PadRight(pad),
        callbacks=[_MarkComplete(), _Watch(progress, steps)],
    )
    trainer.adapted, trainer.passes = model, settings.passes
    if settings.sampling == "sandwich":
        trainer.draws = lambda step: sandwich(space, seed, step)
    else:
        trainer.draws = lambda step: [draw(space, seed, step)]
    trainer.remove_callback(PrinterCallback)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with arguments.main_process_first(local=False):  # the others find no half checkpoints left to remove
        checkpoint = latest_checkpoint(work)
    started = time.perf_counter()
    with sound_gradients(device):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    _require_finite(model, settings)
    set_ranks(model, largest(space))
    model.eval()
    per_epoch = len(rows) / settings.batch_size
    return {
        "log": [
            {
                "step": entry["step"],
                "epoch": entry["step"] / per_epoch,
                "loss": entry["loss"],
                "learning_rate": entry["learning_rate"],
                "grad_norm": entry["grad_norm"],
            }
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
        "steps": steps,
        "examples": len(order),
        "tokens": sum(len(rows[index]["input_ids"]) for index in order),
        "seconds": time.perf_counter() - started,
        "resumed_from": int(checkpoint.name.rsplit("-", 1)[-1]) if checkpoint else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "trainable_parameters": adapter_parameters(model, largest(space)),
        "method": settings.method,
        "sampling": settings.sampling,
        "scale": settings.scale,
        "scale_rule": settings.scale_rule,
    }


def training_order(count: int, settings: FinetuneSettings, seed: int) -> list[int]:
    """The examples' order over all epochs, each a permutation of its own; a part of an epoch is a part of one."""
    total = math.ceil(settings.epochs * count)
    if settings.max_steps is not None:
        total = settings.max_steps * settings.batch_size
    generator, order = torch.Generator().manual_seed(seed), list[int]()
    while len(order) < total:
        order += torch.randperm(count, generator=generator).tolist()
    return order[:total]


def latest_checkpoint(work: Path) -> Path | None:
    """The newest checkpoint that was written to its end; halves that a kill left behind are removed."""
    found = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[-1]))
    for path in [path for path in found if not (path / COMPLETE).is_file()]:
        shutil.rmtree(path)
        found.remove(path)
    return found[-1] if found else None


def _arguments(
    settings: FinetuneSettings, steps: int, seed: int, work: Path, device: torch.device
) -> TrainingArguments:
    micro_batch, parts = _shares(settings, PartialState(cpu=device.type == "cpu").num_processes)
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=parts,
        num_train_epochs=1,  # the dataset is all epochs in their order, see training_order
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type=settings.schedule,
        warmup_steps=math.ceil(settings.warmup * steps),
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        optim="adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        save_steps=settings.checkpoint_every,
        save_total_limit=2,
        seed=seed,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        # Every factor has a gradient in every step, if a zero one beyond the rank; and masks never change.
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    # One process uses one GPU; several are a matter for `accelerate launch`, never for nn.DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _shares(settings: FinetuneSettings, processes: int) -> tuple[int, int]:
    """Examples that a process has on its device at once, and how many such parts make its share of a batch."""
    share, rest = divmod(settings.batch_size, processes)
    micro_batch = settings.micro_batch_size or share
    if rest or not share or share % micro_batch:
        raise PhoenixError(
            f"finetune.batch_size: {processes} processes with {micro_batch} examples each at once do not share "
            f"{settings.batch_size} evenly; give a multiple of {processes * max(micro_batch, 1)}"
        )
    return micro_batch, share // micro_batch


class _ElasticTrainer(Trainer):
    """Runs a step's sub-adapters on each of its micro-batches and averages their gradients.

    It reads the dataset in its order, which is already the shuffled one: a resumed run only has to skip.
    """

    adapted: PeftModel
    draws: Callable[[int], list[Ranks]]  # the sub-adapters of an optimizer step, `passes` of them
    passes: int

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(train_dataset or self.train_dataset)  # type: ignore[arg-type]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The backward pass, which may recompute the forward, ends before the ranks change."""
        losses: list[Tensor] = []
        for ranks in self.draws(self.state.global_step):
            set_ranks(self.adapted, ranks)
            # Processes exchange their gradients once, after the last pass.
            with nullcontext() if len(losses) == self.passes - 1 else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, inputs, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(*args, **kwargs)
        return loss if self.passes == 1 else loss / self.passes


class _MarkComplete(TrainerCallback):
    """The Trainer writes checkpoints file by file; the last file, written by us, says that all are there."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(directory / COMPLETE, {"step": state.global_step})


class _Watch(TrainerCallback):
    """Report progress, and end a training whose loss is lost."""

    def __init__(self, progress: Progress | None, steps: int) -> None:
        self.progress, self.steps = progress, steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if self.progress is not None and state.is_world_process_zero:
            self.progress("training step", state.global_step, self.steps)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        for name in ("loss", "grad_norm"):
            if not math.isfinite(kwargs["logs"].get(name, 0.0)):
                raise _lost(f"the {name} is {kwargs['logs'][name]} at step {state.global_step}", args.learning_rate)


def _require_finite(model: PeftModel, settings: FinetuneSettings) -> None:
    """The log looks at a step in `log_every`; the end looks at the weights."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise _lost(f"{name} is no longer finite after the last step", settings.learning_rate)


def _lost(what: str, learning_rate: float) -> PhoenixError:
    return PhoenixError(f"finetune: {what}; lower finetune.learning_rate ({learning_rate}) or raise finetune.warmup")
