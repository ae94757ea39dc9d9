"""The training loop, on accelerate.

Its invariant: every micro-batch's loss is a sum over its targets, divided by the targets of the whole step over all processes.
Loss and gradient are then the same for every split of a step into processes, micro-batches and accumulation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from peftkit.engine.adapter import trained_parameters
from peftkit.engine.batches import join, layout_of
from peftkit.engine.checkpoint import (
    Progress,
    find_checkpoint,
    list_checkpoints,
    load_best,
    load_checkpoint,
    save_best,
    save_checkpoint,
)
from peftkit.engine.context_parallel import split_batch
from peftkit.engine.coupled import coupled_backward
from peftkit.engine.data import Data
from peftkit.engine.digest import rows_digest
from peftkit.engine.fast import take_fast_paths, without_mask
from peftkit.engine.first_pass import run_largest_pass
from peftkit.engine.guard import memory_told
from peftkit.engine.hardware import WHOLE_MODELS
from peftkit.engine.held_out import evaluate_split
from peftkit.engine.hooks import ExtraState, hook
from peftkit.engine.journal import Journal, Reporter
from peftkit.engine.neftune import noisy_embeddings
from peftkit.engine.optim import build_optimizer, build_scheduler
from peftkit.engine.packing import for_model, way_of
from peftkit.engine.prefetch import Prefetcher, moved, pinned
from peftkit.engine.questions import Question
from peftkit.engine.sharding import backward, clipped_norm, data_share, own_part, place_whole, prepare
from peftkit.engine.signals import StopSignal
from peftkit.engine.spikes import note_spike
from peftkit.engine.step import Step
from peftkit.errors import NonFiniteError
from peftkit.guides import ODD_STEPS
from peftkit.plan import Plan, num_steps, steps_per_epoch
from peftkit.run import Run
from peftkit.stop import stopped
from peftkit.tasks.example import Batch, Example, Runtime
from peftkit.tasks.generations import metrics_of
from peftkit.worker import beat

MAX_SKIPPED_STEPS = 20  # fp16: the loss scale halves at each skip; after 20 of them nothing is left to scale


@dataclass(frozen=True)
class _Prepared:
    """A step, ready to compute: its rows, and this process's micro-batches, as examples and as tensors on the CPU."""

    rows: list[Example]
    chunks: list[list[Example]]
    batches: list[Batch]


@dataclass
class Trainer:
    """One run of training; `fit` goes from the last checkpoint (or the beginning) to the end.

    Attributes:
        plan: what to do.
        model: the model with its adapter.
        runtime: the task on tensors.
        data: encoded rows.
        run: where everything is written.
        accelerator: devices, precision, processes and trackers.
        reporter: who hears of it.
        questions: prompts of each split to answer.
    """

    plan: Plan
    model: nn.Module
    runtime: Runtime
    data: Data
    run: Run
    accelerator: Accelerator
    reporter: Reporter
    questions: Mapping[str, Sequence[Question]] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    last_metrics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.total_steps = num_steps(self.plan, self.data.train.num_rows) if trained_parameters(self.model) else 0
        self.per_epoch = steps_per_epoch(self.plan, self.data.train.num_rows)
        optimizer = build_optimizer(self.model, self.plan)
        place_whole(self.model, self.accelerator)
        self.paths = take_fast_paths(self.plan, self.model, self.runtime, self.data.sample[:3], self.reporter.note)
        self.layout = layout_of(dataclasses.replace(self.plan, rows=self.paths.rows), self.data.encoding.max_length)
        self.packing_way = way_of(self.model) if self.layout.joins else None
        smoothing, precision = self.plan.recipe.training.label_smoothing_factor, self.plan.mixed_precision
        self.step = Step(self.model, self.runtime, self.paths.head, smoothing, precision)
        self.step.splits_rows = self.plan.hardware.cp_size > 1
        prepared = prepare(self.accelerator, self.plan, self.step, optimizer)
        self.wrapped, self.optimizer = prepared.step, prepared.optimizer
        self.share = data_share(self.model, self.plan.hardware.cp_size)
        self.summed = data_share(self.model)  # processes whose losses are parts of a step's loss
        self.scheduler = build_scheduler(prepared.inner, self.plan, self.total_steps)
        self.trained = [parameter for parameter in self.wrapped.parameters() if parameter.requires_grad]
        self.parts: dict[str, Any] = {"optimizer": prepared.state, "scheduler": self.scheduler}
        if hook(self.plan.method, "extra_state"):
            self.parts["adapter"] = ExtraState(self.plan.method, self.model)
        if self.accelerator.scaler is not None:
            self.parts["scaler"] = self.accelerator.scaler
        self.generated = metrics_of(self.plan.recipe.evaluation.generation_metrics)
        self.stop_signal = StopSignal(self.plan.recipe.training.max_seconds)
        self.journal = Journal(self.plan, self.run, self.accelerator, self.reporter, self.total_steps)
        self.skipped_steps = 0
        self.holds_best = False

    @property
    def metric_for_best(self) -> str:
        """The metric that decides which adapter is best."""
        stated = self.plan.recipe.training.metric_for_best_model
        return stated or self.plan.task.default_metric_for(self.data.encoding)

    def fit(self, last_step: int | None = None) -> None:
        """Train to the end, then leave the best (or last) weights in the model; `resume` comes before it.

        Args:
            last_step: end here instead, as `replay` does, and leave the weights as they are.

        Raises:
            NonFiniteError: loss, gradient or weights are not finite.
            Stopped: a signal or `max_seconds` asked for it; a checkpoint was written.
        """
        with noisy_embeddings(self.model, self.plan.recipe.training.neftune_noise_alpha):
            self.wrapped.train()
            run_largest_pass(self)
        training = self.plan.recipe.training
        if training.eval_on_start and self.progress.step == 0 and "validation" in self.data.held_out:
            self._evaluate_and_compare()
        self.reporter.start(self.total_steps, self.progress.step)
        try:
            with (
                self.stop_signal.heard(),
                noisy_embeddings(self.model, self.plan.recipe.training.neftune_noise_alpha),
                self._prepared() as prepared,
            ):
                self.wrapped.train()
                last = self.total_steps if last_step is None else min(last_step, self.total_steps)
                while self.progress.step < last and not self.progress.stopped_early:
                    self._one_step(prepared)
        finally:
            self.reporter.stop()
        if last_step is None and self.plan.keeps_best and self.progress.best_step != self.progress.step:
            load_best(self.run, self.model, self.progress.best_step)
            self.holds_best = True
            self.reporter.note(f"kept the adapter of step {self.progress.best_step}, the best by {self.metric_for_best}")

    def resume(self) -> None:
        """Go on from the newest sound checkpoint, where the run has one."""
        checkpoint = find_checkpoint(self.run, self.reporter.note, needs_best=self.plan.keeps_best)
        if checkpoint is not None:
            process, seed = self.summed[1], self.plan.recipe.training.seed
            self.progress = load_checkpoint(checkpoint, self.model, self.parts, process, seed)
            self.reporter.note(f"resumed after step {self.progress.step} of {self.total_steps}")
        if self.accelerator.is_main_process:
            self.run.truncate_metrics(self.progress.metrics_bytes)
        self.accelerator.wait_for_everyone()
        if checkpoint is not None:
            self.last_metrics = self.run.read_metrics_at(self.progress.step).get("validation", {})

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[Callable[[int], _Prepared]]:
        """What gives each step's rows; where a GPU computes, a thread lays them out meanwhile."""
        if self.accelerator.device.type != "cuda":
            yield self._prepare
            return
        first, last, gpu = self.progress.step, self.total_steps, torch.cuda.current_device()
        with Prefetcher(self._prepare, first, last, gpu=gpu) as prefetcher:
            yield prefetcher.get

    def _prepare(self, step: int) -> _Prepared:
        training = self.plan.recipe.training
        rows = self.data.train.step(step, training.batch_size, training.seed)
        chunks = self.chunks(rows)
        return _Prepared(rows, chunks, [pinned(self.runtime.collate(chunk), self.accelerator.device) for chunk in chunks])

    def _one_step(self, prepared: Callable[[int], _Prepared]) -> None:
        started = time.perf_counter()
        beat(f"step {self.progress.step + 1}")
        learning_rate = self.optimizer.param_groups[0]["lr"]
        ready = prepared(self.progress.step)
        rows = ready.rows
        num_targets = sum(row.num_targets for row in rows)
        with memory_told(f"in step {self.progress.step + 1}", self.plan, ready.chunks):
            loss = self._forward_backward(ready, num_targets)
            grad_norm = self._update(rows)
        progress = self.progress
        progress.step += 1
        progress.target_tokens += sum(row.num_target_tokens for row in rows)
        progress.seconds += time.perf_counter() - started
        progress.loss_sum += loss * num_targets
        progress.loss_targets += num_targets
        progress.rows = rows_digest(rows, progress.rows)
        if odd := note_spike(progress, loss, grad_norm, rows, self.plan.recipe.training.batch_size):
            self.reporter.note(odd)
        self.reporter.advance(progress.step)
        self.journal.step(progress, learning_rate, grad_norm)
        self._evaluate_when_due()
        self.journal.step(progress, learning_rate, grad_norm)  # the last line of a run that has stopped early
        self._save_when_due()

    def _forward_backward(self, ready: _Prepared, num_targets: float) -> float:
        """Mean loss per target of one step over all processes; gradients are left in the parameters."""
        batches = ready.batches
        if self.runtime.couples_rows and (len(batches) > 1 or self.share[0] > 1):
            losses = [coupled_backward(self, [self._on_device(batch) for batch in batches], num_targets)]
        else:
            losses = self._separate_losses(batches, num_targets)
        summed = torch.stack(losses).sum()
        total: float = (self.accelerator.reduce(summed, reduction="sum") if self.summed[0] > 1 else summed).item()
        if not math.isfinite(total):
            each = zip(ready.chunks, losses, strict=True) if len(losses) == len(batches) else []
            bad = [chunk for chunk, loss in each if not torch.isfinite(loss)]
            self._fail("the loss", total, [row for chunk in bad for row in chunk] or ready.rows)
        return total

    def chunks(self, rows: list[Example]) -> list[list[Example]]:
        """This process's micro-batches; where rows are packed, each of their examples is a pack."""
        passes = self.layout.passes([row.length for row in rows], *self.share)
        # More processes than rows are left: take part in the backward pass with a loss of zero.
        idle = [rows[0].without_targets()]
        chosen = [[[rows[place] for place in places] for places in sequences] or [idle] for sequences in passes]
        return [[join(pack) if self.layout.joins else pack[0] for pack in chunk] for chunk in chosen]

    def _separate_losses(self, batches: list[Batch], num_targets: float) -> list[torch.Tensor]:
        """Each micro-batch's share of the loss, with its gradient; a method's own terms are trained on but not reported."""
        accelerator, losses = self.accelerator, []
        for number, collated in enumerate(batches):
            last = number == len(batches) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.wrapped):
                batch = self._on_device(collated)
                loss = self.wrapped(batch) / num_targets
                trained_on = loss + self._method_terms(batch, num_targets, last=last)
                # DDP averages gradients over processes, but a sum of shares is wanted.
                backward(accelerator, self.wrapped, trained_on * self.summed[0], last=last)
            losses.append(loss.detach())
        return losses

    def try_pass(self, chunk: list[Example]) -> None:
        """Run a micro-batch forward and backward as a step does, but share nothing with other processes."""
        batch, alone = self.runtime.collate(chunk), self.accelerator.distributed_type in WHOLE_MODELS
        with self.accelerator.no_sync(self.wrapped) if alone else contextlib.nullcontext():
            if self.runtime.couples_rows:
                self.accelerator.backward(self.wrapped(self._on_device(batch), outputs_only=True).sum())
            else:
                self._separate_losses([batch], max(1, sum(row.num_targets for row in chunk)))

    def take_plan(self, plan: Plan) -> None:
        """Go on with another plan, as large passes ask for it; only between steps."""
        self.plan = self.journal.plan = plan
        self.layout = layout_of(dataclasses.replace(plan, rows=self.paths.rows), self.data.encoding.max_length)

    def loss_sum(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The task's loss, with the recipe's label smoothing, summed over the targets."""
        return self.runtime.loss_sum(outputs, labels, self.plan.recipe.training.label_smoothing_factor)

    def _method_terms(self, batch: Batch, num_targets: float, *, last: bool) -> torch.Tensor | float:
        """Terms that the adapter method adds to the loss (AdaLoRA's orthogonality, Shadow's own loss)."""
        terms: torch.Tensor | float = 0.0
        if batch_penalty := hook(self.plan.method, "batch_penalty"):
            terms = terms + batch_penalty(self.model, batch, self.loss_sum) / num_targets
        if last and (penalty := hook(self.plan.method, "penalty")):
            terms = terms + penalty(self.model) / self.summed[0]
        return terms

    def _on_device(self, batch: Batch) -> Batch:
        """A micro-batch on the device, packed rows in the form that the model takes."""
        batch = moved(without_mask(batch) if self.paths.drops_mask else batch, self.accelerator.device)
        if self.plan.hardware.cp_size > 1:
            return split_batch(batch, self.model, self.plan.hardware.cp_size, self.summed[1] % self.plan.hardware.cp_size)
        return batch if self.packing_way is None else for_model(batch, self.model, self.packing_way)

    def _update(self, rows: list[Example]) -> float:
        """Clip, check, step; returns the gradient norm before clipping."""
        limit = self.plan.recipe.training.max_grad_norm
        grad_norm = clipped_norm(self.accelerator, self.wrapped, self.trained, limit)
        if not math.isfinite(grad_norm):
            self.skipped_steps += 1
            self.progress.skipped_steps += 1
            if self.accelerator.scaler is None or self.skipped_steps > MAX_SKIPPED_STEPS:
                self._fail("the gradient norm", grad_norm, rows)
        else:
            self.skipped_steps = 0
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
            if after_step := hook(self.plan.method, "after_step"):
                after_step(self.model, self.progress.step)
        self.optimizer.zero_grad()
        norms = torch._foreach_norm([own_part(parameter) for parameter in self.trained])
        if not torch.stack([norm.float() for norm in norms]).isfinite().all():  # one wait for the device, not one a parameter
            self._fail("a weight", math.nan, rows)
        return grad_norm

    def _fail(self, what: str, value: float, rows: list[Example]) -> None:
        """Stop the run: a non-finite number never reaches a checkpoint or an adapter."""
        step = self.progress.step + 1
        names = "\n  ".join(row.origin for row in rows[:16])
        checkpoints = list_checkpoints(self.run)
        kept = f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint before it"
        raise NonFiniteError(
            f"step {step}: {what} is {value}. Rows of the batch:\n  {names}\n{kept}. "
            "A lower training.learning_rate, a max_grad_norm, warmup_steps or bf16 instead of fp16 often mends it.",
            guide=ODD_STEPS,
        )

    @property
    def _ends_epoch(self) -> bool:
        return self.progress.step == self.total_steps or self.progress.step % self.per_epoch == 0

    def _evaluate_when_due(self) -> None:
        training, step = self.plan.recipe.training, self.progress.step
        due = step % training.eval_steps == 0 if training.eval_steps else self._ends_epoch
        if "validation" in self.data.held_out and (due or step == self.total_steps):
            self._evaluate_and_compare()

    def _save_when_due(self) -> None:
        """Write a checkpoint where one is due, or the run is asked to stop."""
        training, step = self.plan.recipe.training, self.progress.step
        due = step % training.save_steps == 0 if training.save_steps else self._ends_epoch
        why = self.stop_signal.agreed(self.accelerator)
        if due or why or step == self.total_steps or self.progress.stopped_early:
            save_checkpoint(self.run, self.model, self.parts, self.progress, training.save_total_limit)
            self.journal.write_status(step)
        if why and step < self.total_steps:
            self.accelerator.wait_for_everyone()  # a process that ends has the others ended, rank 0 amid its checkpoint
            raise stopped(why, f"after step {step} of {self.total_steps}, with a full checkpoint")

    def evaluate(self, split: str, *, generates: bool = False) -> dict[str, Any]:
        """Evaluate one split with the weights that are in the model, and write it down; `generates`: answers are wanted too."""
        return evaluate_split(self, split, generates=generates)

    def whole_logits(self, batch: Batch) -> torch.Tensor:
        """What the task's scores are taken from, by way of whole logits, where a model has to be called as it is wrapped."""
        head, self.step.head = self.step.head, None
        try:
            return self.wrapped(batch, outputs_only=True)
        finally:
            self.step.head = head

    @property
    def weights_step(self) -> int:
        """The step whose weights are in the model."""
        return self.progress.best_step if self.holds_best else self.progress.step

    def final_metrics(self, split: str) -> dict[str, Any]:
        """Metrics of the weights that `fit` left in the model; computed anew only if they are not those evaluated last."""
        is_last = split == "validation" and not self.holds_best and self.last_metrics.keys() >= self.generated.keys()
        return self.last_metrics if is_last and self.last_metrics else self.evaluate(split, generates=True)

    def _evaluate_and_compare(self) -> None:
        progress, training = self.progress, self.plan.recipe.training
        metrics = self.evaluate("validation", generates=self.metric_for_best in self.generated)
        self.last_metrics = metrics
        name = self.metric_for_best
        value, sign = metrics[name], 1 if {**self.plan.task.metrics, **self.generated}[name] else -1
        if not math.isfinite(metrics["loss"]):
            self._fail("the validation loss", metrics["loss"], [])
        if progress.step == 0:
            return  # untrained: shown, never kept
        threshold = training.early_stopping_threshold
        if progress.best_value is None or sign * (value - progress.best_value) > threshold:
            progress.best_value, progress.best_step, progress.evaluations_without_best = value, progress.step, 0
            if self.plan.keeps_best:
                save_best(self.run, self.model, progress.step)
            self.accelerator.wait_for_everyone()
            return
        progress.evaluations_without_best += 1
        patience = training.early_stopping_patience
        if patience is not None and progress.evaluations_without_best >= patience:
            progress.stopped_early = True
            self.reporter.note(f"stopped early: no better {name} in {patience} evaluation(s)")
