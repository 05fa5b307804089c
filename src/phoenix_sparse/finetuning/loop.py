"""The Hugging Face Trainer as Phoenix runs it: sub-adapters, micro-batches that fit, validation, whole checkpoints."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import read_json, write_json
from phoenix_sparse.finetuning.adapter import set_ranks
from phoenix_sparse.finetuning.batching import Batch, Collate, Row, rows_of
from phoenix_sparse.finetuning.distill import Apart, Teacher
from phoenix_sparse.finetuning.elastic import Ranks
from phoenix_sparse.finetuning.evolve import Evolution
from phoenix_sparse.finetuning.memory import AtOnce, is_full
from phoenix_sparse.finetuning.sharding import save_states
from phoenix_sparse.finetuning.stopping import Best, validation_loss
from phoenix_sparse.finetuning.trained import read_tensors, trained_tensors, write_tensors
from phoenix_sparse.progress import Progress

COMPLETE = "complete.json"
TRAINED = "trained.safetensors"


class StepTrainer(Trainer):
    """Runs a step's sub-adapters on each of its micro-batches and averages their gradients.

    It reads the dataset in its order, which is already the shuffled one: a resumed run only has to skip. Checkpoints
    hold the parameters that train, and nothing of the rest.
    """

    adapted: PeftModel | None  # None where the weights themselves train
    draws: Callable[[int], list[Ranks]]  # the sub-adapters of an optimizer step, `passes` of them
    passes: int
    collate: Collate
    at_once: AtOnce
    apart: Apart
    teacher: Teacher | None = None
    evolution: Evolution | None = None
    _step = -1
    _inputs: list[Batch]

    @property
    def trained_model(self) -> nn.Module:
        """The model, within what several processes wrap around it."""
        model = self.model
        assert isinstance(model, nn.Module)
        return model

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(train_dataset or self.train_dataset)  # type: ignore[arg-type]

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """Add a micro-batch's gradient, in as many parts as the memory needs.

        Where it turns out to be full, the gradient of the step is begun anew, with smaller parts: the mean is over the
        scored tokens of the whole step, so it comes out the same.
        """
        if self._step != self.state.global_step:
            self._step, self._inputs = self.state.global_step, []
        self._inputs.append(inputs)
        pending = [inputs]
        while True:
            full = False
            try:
                losses = [self._passes(model, one, num_items_in_batch, one is pending[-1]) for one in pending]
                self.apart.keep(self._step)  # the others of a step that is begun anew were kept before
                return losses[-1]
            except RuntimeError as error:
                if not is_full(error):
                    raise
                full = True
            if full:  # outside of the handler, which holds on to what the failed pass had computed
                model.zero_grad(set_to_none=True)
                if self.evolution is not None:
                    self.evolution.forget()
                longest = max(len(row["input_ids"]) for one in self._inputs for row in rows_of(one))
                self.at_once.halve(self._step, longest, self.accelerator.num_processes)
                pending = self._inputs

    def _passes(self, model: Any, inputs: Batch, items: Any, newest: bool) -> Tensor:
        """All parts and all sub-adapters; a backward pass, which may recompute the forward, ends before the ranks
        change. Gives the sum of the losses, which are shares of the step's."""
        self.apart.begin()
        work = [(ranks, part) for ranks in self.draws(self._step) for part in self._parts(inputs)]
        losses: list[Tensor] = []
        for ranks, part in work:
            if self.adapted is not None:
                set_ranks(self.adapted, ranks)
            if self.evolution is not None:
                last = newest and len(losses) == len(work) - 1
                last = last and len(self._inputs) == self.args.gradient_accumulation_steps
                self.evolution.watch(self._step + 1, last=last and self.accelerator.num_processes == 1)
            # Processes exchange their gradients once, after the last pass.
            with nullcontext() if len(losses) == len(work) - 1 else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part, items))
        return torch.stack(losses).sum()

    def _parts(self, inputs: Batch) -> list[Batch]:
        size = self.at_once.examples
        if not self.at_once.halvings:
            return [inputs]
        rows = rows_of(inputs)
        return [self.collate(rows[start : start + size]) for start in range(0, len(rows), size)]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        assert not return_outputs, "validation is ours, and nothing else asks for outputs"
        loss: Any
        if self.teacher is None:
            loss = super().compute_loss(model, {**inputs, "use_cache": False}, False, num_items_in_batch)
        else:
            asked = {**inputs, **self.teacher.asks, "use_cache": False}
            loss, outputs = super().compute_loss(model, asked, True, num_items_in_batch)
            # As the Trainer's own loss: a share of the mean over all processes, whose gradients are averaged.
            share = self.accelerator.num_processes / num_items_in_batch
            parts = {"task": loss} | {name: one * share for name, one in self.teacher.losses(outputs, inputs).items()}
            self.apart.add({name: part / self.passes for name, part in parts.items()})
            loss = self.teacher.weighted(parts)
        return loss if self.passes == 1 else loss / self.passes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Put what the loss is made of beside it, each before its weight; trackers are told the same."""
        if "loss" in logs and self.teacher is not None:
            found = self.apart.take(lambda total: self.accelerator.reduce(total, "mean"))
            logs.update({f"loss_{name}": value for name, value in found.items()})
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        tensors = trained_tensors(self.trained_model)
        if self.args.should_save:
            write_tensors(tensors, Path(str(output_dir)) / TRAINED)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            save_states(self, Path(output_dir))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        read_tensors(model or self.trained_model, Path(resume_from_checkpoint) / TRAINED)


class MarkComplete(TrainerCallback):
    """The Trainer writes checkpoints file by file; the last file, written by us, says that all are there.

    It also holds what a training that goes on from there has to know: halved micro-batches, the validation curve.
    """

    def __init__(self, at_once: AtOnce, best: Best, evolution: Evolution | None) -> None:
        self.at_once, self.best, self.evolution = at_once, best, evolution

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        work = Path(args.output_dir)
        record = {"step": state.global_step, "halvings": self.at_once.halvings, "validation": self.best.curve}
        if self.evolution is not None:
            record["changes"] = self.evolution.changes
        write_json(work / f"checkpoint-{state.global_step}" / COMPLETE, record)
        self.best.forget_others(read_json(path)["validation"] for path in work.glob(f"checkpoint-*/{COMPLETE}"))


class Evolve(TrainerCallback):
    """Choose the next mask before the optimizer's step, by the weights that the gradient belongs to, and put it in
    place after it; before the checkpoint of that step, and before its validation."""

    def __init__(self, trainer: StepTrainer, evolution: Evolution) -> None:
        self.trainer, self.evolution = trainer, evolution

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        accelerator = self.trainer.accelerator
        self.evolution.choose(lambda gradient: accelerator.reduce(gradient, "sum"))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self.evolution.change(state.global_step, self.trainer.optimizer)


class Validate(TrainerCallback):
    """Measure the validation loss every so many steps, keep the best weights, and stop when there are none to come."""

    def __init__(self, trainer: StepTrainer, rows: Sequence[Row], every: int, ranks: Ranks, best: Best) -> None:
        self.trainer, self.rows, self.every, self.ranks, self.best = trainer, rows, every, ranks, best

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        trainer, here = self.trainer, PartialState()
        if trainer.adapted is not None:
            set_ranks(trainer.adapted, self.ranks)
        loss = validation_loss(
            trainer.trained_model,
            self.rows,
            trainer.collate,
            trainer.at_once,
            step=state.global_step,
            share=(here.process_index, here.num_processes),
            together=lambda total: trainer.accelerator.reduce(total, "sum"),
        )
        if not math.isfinite(loss):
            raise lost(f"the validation loss is {loss} at step {state.global_step}", args.learning_rate)
        if self.best.note(state.global_step, loss):
            tensors = trained_tensors(trainer.trained_model)
            if state.is_world_process_zero:
                write_tensors(tensors, self.best.path)
        due = control.should_log
        trainer.log({"eval_loss": loss})
        control.should_log = due  # an entry of ours does not stand for the training's
        control.should_training_stop = control.should_training_stop or self.best.exhausted


class Watch(TrainerCallback):
    """Report progress, and end a training whose loss is lost."""

    def __init__(self, progress: Progress | None, steps: int) -> None:
        self.progress, self.steps = progress, steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if self.progress is not None and state.is_world_process_zero:
            self.progress("training step", state.global_step, self.steps)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        for name in ("loss", "grad_norm"):
            if not math.isfinite(kwargs["logs"].get(name, 0.0)):
                raise lost(f"the {name} is {kwargs['logs'][name]} at step {state.global_step}", args.learning_rate)


def lost(what: str, learning_rate: float) -> PhoenixError:
    return PhoenixError(f"finetune: {what}; lower finetune.learning_rate ({learning_rate}) or raise finetune.warmup")
