"""Train an adapter, or the kept weights themselves, so that a killed training goes on to the same weights."""

import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PrinterCallback, TrainerState, TrainingArguments

from phoenix_sparse.determinism import sound_gradients
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_json
from phoenix_sparse.finetuning.adapter import adapter_parameters, elastic_layers, set_ranks
from phoenix_sparse.finetuning.batching import Row, collator, micro_batches, require_separate, training_order
from phoenix_sparse.finetuning.distill import Apart, Teacher
from phoenix_sparse.finetuning.elastic import draw, largest, middle, sandwich, spaces
from phoenix_sparse.finetuning.evolve import Evolution, require_change
from phoenix_sparse.finetuning.examples import require_rows
from phoenix_sparse.finetuning.full import trained_linears
from phoenix_sparse.finetuning.loop import COMPLETE, Evolve, MarkComplete, StepTrainer, Validate, Watch, lost
from phoenix_sparse.finetuning.masked_linear import effective_weight
from phoenix_sparse.finetuning.memory import AtOnce
from phoenix_sparse.finetuning.settings import FinetuneSettings
from phoenix_sparse.finetuning.sharding import require_shareable
from phoenix_sparse.finetuning.stopping import Best
from phoenix_sparse.finetuning.trackers import choose_trackers, writing_to
from phoenix_sparse.finetuning.trained import make_whole, read_tensors, whole
from phoenix_sparse.progress import Progress


def train(
    model: Any,
    rows: Sequence[Row],
    settings: FinetuneSettings,
    *,
    pad: int,
    seed: int,
    work: Path,
    validation: Sequence[Row] = (),
    teacher: Any = None,
    logs: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train in place and give the record of the training.

    Under `accelerate launch`, every process trains on its share of each batch and ends with the same weights: a step
    has `batch_size` examples, however many processes there are.

    Args:
        model: a PEFT model with its adapter on, or a model whose kept weights train (`full.train_weights`), on the
            device to train on.
        rows: tokenized examples (`examples.tokenize`).
        settings: of the recipe.
        pad: the padding token.
        seed: for the order of the examples and the draws of ranks.
        work: where checkpoints go; a complete one that lies there is gone on from.
        validation: tokenized examples, for `validate_every`; an elastic adapter has its middle ranks then.
        teacher: the dense model to learn from, on the same device, for `distill`.
        logs: where trackers write their files.
        progress: called with (what, step, steps).

    Returns:
        `log` (step, epoch, loss, learning_rate, grad_norm; with `distill` also what the loss is made of, each before
        its weight: loss_task, loss_logits, loss_hidden), `steps` (done), `steps_planned`, `examples`, `tokens`,
        `seconds` (of this attempt), `resumed_from`, `peak_memory_bytes` (None on a CPU), `trainable_parameters`,
        `trackers`, `processes`, `micro_batch_size` (at the end), `out_of_memory` (the steps at which it was halved),
        `validation` (None, or `curve`, `best_step`, `stopped_early` and `examples`), `distill` (its settings or None),
        `changes` of a mask that evolves (step, share, replaced; or None), and what was trained: `method`, `batching`,
        `sampling`, `scale` and `scale_rule` (None where the weights themselves train).

    Raises:
        PhoenixError: there are no examples to train or validate with, the processes can't share a batch evenly, ranks
            are given to layers that there are not, a tracker isn't installed, `distill` has no teacher, a mask that
            evolves follows a pattern or is shared out over processes, FSDP is asked for in a way that
            `sharding.require_shareable` refuses, the memory is full with one example at a time,
            or the loss is no longer finite.
    """
    require_rows(rows)
    if settings.validate_every is not None and not validation:
        raise PhoenixError("finetune.validate_every: no example to validate with; set task.validation above 0")
    if settings.distill is not None and teacher is None:
        raise PhoenixError("finetune.distill: no teacher; give its model")
    device = next(model.parameters()).device
    processes = PartialState(cpu=device.type == "cpu").num_processes
    lengths = [len(row["input_ids"]) for row in rows]
    order = training_order(lengths, settings, seed)
    batches, parts = micro_batches(rows, order, settings, processes)
    steps = settings.count_steps(len(rows))
    adapted = model if isinstance(model, PeftModel) else None
    space = spaces(elastic_layers(adapted), settings.ranks) if adapted is not None else {}
    trackers = choose_trackers(settings.trackers)
    arguments = _arguments(settings, steps, parts, seed, work, device, trackers)
    collate = collator(settings, pad)
    if settings.batching == "packed":
        require_separate(model, pad)
    with arguments.main_process_first(local=False):  # the others find no half checkpoints left to remove
        checkpoint = latest_checkpoint(work)
    known = read_json(checkpoint / COMPLETE) if checkpoint else {}
    at_once = AtOnce(max(len(batch) for batch in batches), known.get("halvings"))
    best = Best(work, settings.patience, known.get("validation"))
    learner = adapted.get_base_model() if adapted is not None else model
    evolution = None
    if settings.evolve is not None:
        require_change(settings.evolve, steps)
        evolution = Evolution(learner, settings.evolve, steps, known.get("changes"))
    with writing_to(logs, trackers):
        trainer = StepTrainer(
            # The Trainer has ideas of its own about PEFT models: what it saves of them, and how it shards them.
            model=learner,
            args=arguments,
            train_dataset=batches,  # type: ignore[arg-type]
            data_collator=lambda items: collate(items[0]),
        )
        trainer.adapted, trainer.passes = adapted, settings.passes
        trainer.collate, trainer.at_once, trainer.evolution = collate, at_once, evolution
        trainer.apart = Apart()
        if settings.distill is not None:
            trainer.teacher = Teacher(teacher, settings.distill)
        if trainer.is_fsdp_enabled:
            require_shareable(trainer.accelerator.state.fsdp_plugin, evolution is not None)
        if evolution is not None:
            trainer.add_callback(Evolve(trainer, evolution))
        if adapted is None:
            trainer.draws = lambda _step: [{}]
        elif settings.sampling == "sandwich":
            trainer.draws = lambda step: sandwich(space, seed, step)
        else:
            trainer.draws = lambda step: [draw(space, seed, step)]
        trainer.remove_callback(PrinterCallback)
        if settings.validate_every is not None:
            trainer.add_callback(Validate(trainer, validation, settings.validate_every, middle(space), best))
        trainer.add_callback(MarkComplete(at_once, best, evolution))
        trainer.add_callback(Watch(progress, steps))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        if checkpoint is not None and best.exhausted:  # it had stopped, and was killed before its end
            trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        else:
            with sound_gradients(device):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    done = trainer.state.global_step
    if best.step is not None:
        PartialState().wait_for_everyone()  # the main process has written it
        read_tensors(trainer.trained_model, best.path)
    make_whole(model)
    _require_finite(model, settings)
    if adapted is not None:
        set_ranks(adapted, largest(space))
    model.eval()
    per_epoch = len(rows) / settings.batch_size
    trained = order[: done * settings.batch_size]
    record: dict[str, Any] = {
        "log": [
            {
                "step": entry["step"],
                "epoch": entry["step"] / per_epoch,
                "loss": entry["loss"],
                "learning_rate": entry["learning_rate"],
                "grad_norm": entry["grad_norm"],
            }
            | {name: value for name, value in entry.items() if name.startswith("loss_")}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
        "steps": done,
        "steps_planned": steps,
        "examples": len(trained),
        "tokens": sum(lengths[index] for index in trained),
        "seconds": time.perf_counter() - started,
        "resumed_from": int(checkpoint.name.rsplit("-", 1)[-1]) if checkpoint else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "trackers": trackers,
        "processes": processes,
        "micro_batch_size": at_once.examples,
        "out_of_memory": at_once.halvings,
        "validation": None,
        "distill": settings.distill.model_dump() if settings.distill is not None else None,
        "changes": evolution.changes if evolution is not None else None,
        "method": settings.method,
        "batching": settings.batching,
    }
    if settings.validate_every is not None:
        record["validation"] = {
            "curve": best.curve,
            "best_step": best.step,
            "stopped_early": best.exhausted and done < steps,
            "examples": len(validation),
        }
    if adapted is None:
        kept = sum(int(layer.mask.sum()) for layer in trained_linears(model).values())
        return record | {"trainable_parameters": kept, "sampling": None, "scale": None, "scale_rule": None}
    return record | {
        "trainable_parameters": adapter_parameters(adapted, largest(space)),
        "sampling": settings.sampling,
        "scale": settings.scale,
        "scale_rule": settings.scale_rule,
    }


def latest_checkpoint(work: Path) -> Path | None:
    """The newest checkpoint that was written to its end; halves that a kill left behind are removed."""
    found = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[-1]))
    for path in [path for path in found if not (path / COMPLETE).is_file()]:
        shutil.rmtree(path)
        found.remove(path)
    return found[-1] if found else None


def _arguments(
    settings: FinetuneSettings,
    steps: int,
    parts: int,
    seed: int,
    work: Path,
    device: torch.device,
    trackers: list[str],
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=1,  # an item of the dataset is a whole micro-batch
        gradient_accumulation_steps=parts,
        num_train_epochs=1,  # the dataset is all epochs in their order, see training_order
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type=settings.schedule,
        # The rate is zero at the first of them: the last step is never one.
        warmup_steps=min(math.ceil(settings.warmup * steps), steps - 1),
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        optim="adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
        logging_steps=min(settings.log_every, steps),
        logging_nan_inf_filter=False,
        save_steps=settings.checkpoint_every,
        save_total_limit=2,
        seed=seed,
        report_to=trackers or "none",
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


def _require_finite(model: Any, settings: FinetuneSettings) -> None:
    """The log looks at a step in `log_every`; the end looks at the weights."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise lost(f"{name} is no longer finite after the last step", settings.learning_rate)
    for name, layer in elastic_layers(model).items() if isinstance(model, PeftModel) else ():
        weight = whole(layer.weight)
        gate = weight if layer.method == "hira" else layer.kept
        a, b = (factor.to(weight.device) for factor in layer.factors())
        if not torch.isfinite(effective_weight(weight, gate, a, b, layer.scale)).all():
            raise lost(f"the effective weight of {name} is no longer finite", settings.learning_rate)
