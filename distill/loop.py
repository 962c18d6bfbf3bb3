"""The training loop, the same for every network: steps, epochs, checkpoints, metrics, faults.

A step is one update of the optimizer. Losses are means over images.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from distill.backward import Backward
from distill.checkpoints import Checkpoints
from distill.config import TrainConfig
from distill.data import ImageSet
from distill.data.loaders import prepare_loader, sample_indices, skip_batches
from distill.ema import WeightAverage
from distill.interruption import INTERRUPTION, Preempted
from distill.meters import Progress, recorded_rates
from distill.mixing import Mixing
from distill.optimizers import make_optimizer, warmup_cosine
from distill.processes import Agreement
from distill.random_numbers import repeatable
from distill.report import rate_warnings
from distill.runs import RunFolder
from distill.saved_state import SavedState
from distill.steps import NonFiniteLossError, StepGuard
from models import synchronised_batch_norm

log = logging.getLogger(__name__)

SHOWN_IMAGES = 64
"""Of a bad step, in the log; its file has them all."""

CHECK_EVERY = 25
"""Forward passes between two looks at loss and firing rates, which wait for the device."""

LONG = 60.0
"""Seconds since the last checkpoint after which one is written before an evaluation, which a cluster may not await."""


@dataclass(frozen=True)
class FitResult:
    """A trained model and what its training cost, the epochs before an interruption included."""

    model: nn.Module
    """The wrapped model, still prepared, in evaluation mode; with averaged weights where they are averaged."""
    evaluation: Mapping[str, float]
    """What `evaluate` said after the last epoch."""
    seconds: float
    """Of training steps; on the main process."""
    images: int
    """That were trained on in that time, all processes together; on the main process."""


def fit(
    *,
    stage: str,
    accelerator: Accelerator,
    model: nn.Module,
    backward: Backward,
    loader: DataLoader,
    evaluate: Callable[[nn.Module], Mapping[str, float]],
    config: TrainConfig,
    folder: RunFolder,
    resume: bool,
    mixing: Mixing | None = None,
    epochs_before: int = 0,
    lr_epochs: int | None = None,
    unused_parameters: bool = False,
    score: str | None = None,
    norms_of: nn.Module | None = None,
) -> FitResult:
    """Trains a model, from the newest whole checkpoint of the stage if `resume` finds one.

    Batches that do not fill a last step are left out of the epoch: each step has `config.accumulate` of them, so that
    the learning rate does not depend on how a step's images are divided.

    Args:
        stage: names the checkpoints and the metrics: "teacher", "student", ...
        backward: the forward and backward passes of one batch; returns scalars by name, "total" for the loss.
        loader: training batches (images, labels), not prepared.
        evaluate: called with the wrapped model in evaluation mode after each epoch; its numbers are logged. The random
            numbers that it draws are the same each time and leave those of the training as they are.
        mixing: mixes images and labels of each batch.
        epochs_before: epochs of earlier trainings on the same data: order, augmentation, mixing and the number of the
            step go on from there.
        lr_epochs: epochs of the trainings that share one learning rate curve, those before included; None for a curve
            of this training's own.
        unused_parameters: whether there are steps in which some parameters have no part, which DDP must be told.
        score: the entry of what `evaluate` returns by which the best checkpoint is chosen; None: none is.
        norms_of: the part of the model whose batch norms `config.freeze_norms` means; None for all of it.

    Raises:
        ValueError: for fewer images than the processes need for one step, or a checkpoint of another number of
            processes.
        NonFiniteLossError: after more than `config.max_skipped_steps` bad steps in a row; names the parts of the loss
            and the images. A checkpoint is written.
        Preempted: at SIGTERM, after a checkpoint was written within the step.
    """
    return _Fit(
        stage, accelerator, model, backward, loader, evaluate, config, folder, mixing, epochs_before, lr_epochs,
        unused_parameters, score, norms_of,
    ).run(resume)  # fmt: skip


def unwrap(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The network that was prepared, without what Accelerate put around it; its `forward` is its class's again."""
    network = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    vars(network).pop("forward", None)  # Accelerate leaves the bound method on the instance
    return network


def channels_last(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in the memory format that convolutions are fastest in; with a time axis as they are."""
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


class _Fit:
    """One training: what `fit` was given, and how far it is."""

    def __init__(
        self,
        stage: str,
        accelerator: Accelerator,
        model: nn.Module,
        backward: Backward,
        loader: DataLoader,
        evaluate: Callable[[nn.Module], Mapping[str, float]],
        config: TrainConfig,
        folder: RunFolder,
        mixing: Mixing | None,
        epochs_before: int,
        lr_epochs: int | None,
        unused_parameters: bool,
        score: str | None,
        norms_of: nn.Module | None,
    ) -> None:
        self.stage, self.accelerator, self.backward, self.evaluate = stage, accelerator, backward, evaluate
        self.config, self.folder, self.mixing = config, folder, mixing
        self.epochs_before, self.score = epochs_before, score
        self.indices_of = loader
        self.norms = [m for m in (norms_of or model).modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        optimizer = make_optimizer(model, config)
        accelerator.gradient_accumulation_steps = config.accumulate
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)
        self.network = model
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.loader = prepare_loader(accelerator, loader)
        self.steps_per_epoch = len(self.loader) // config.accumulate
        if self.steps_per_epoch == 0:
            passes = f" x accumulate {config.accumulate}" if config.accumulate > 1 else ""
            raise ValueError(
                "there are fewer training images than one step of all processes together takes "
                f"({accelerator.num_processes} x batch_size {config.batch_size}{passes})"
            )
        self.batches = self.steps_per_epoch * config.accumulate
        factor = warmup_cosine(config, (lr_epochs or config.epochs) * self.steps_per_epoch)
        before = (epochs_before if lr_epochs is not None else 0) * self.steps_per_epoch
        self.scheduler = accelerator.prepare(LambdaLR(optimizer, lambda step: factor(step + before)))
        self.agreement = Agreement(accelerator)
        self.average = None if config.ema is None else WeightAverage(model, config.ema)
        self.state = SavedState(
            accelerator, Checkpoints(folder.checkpoints / stage, folder.saving.keep), self.agreement, self.optimizer,
            self.scheduler, self.average, config, loader.dataset, folder.saving.allow_changed,
        )  # fmt: skip
        self.guard = StepGuard(accelerator, self.model)
        self.progress = Progress()
        self.saved = time.monotonic()

    def run(self, resume: bool) -> FitResult:
        if resume:
            self._resume()
        evaluation = None
        with INTERRUPTION.listening():
            while self.progress.epochs < self.config.epochs:
                evaluation = self._epoch()
                INTERRUPTION.leave_if_asked(
                    self.accelerator, f"the {self.stage}: a checkpoint is in {self.state.checkpoints.path}"
                )
            if evaluation is None:  # a resumed training had no epoch left
                evaluation = self._evaluation()
        if self.average is not None:
            self.average.give()
        lines = [line for line in self.folder.metrics() if line["stage"] == self.stage]
        seconds, images = (sum(line[name] for line in lines) for name in ("train_seconds", "images"))
        return FitResult(self.model.eval(), evaluation, seconds, images)

    def _epoch(self) -> Mapping[str, float]:
        """The rest of the epoch that runs, its evaluation, its line of metrics, its checkpoint."""
        started, progress = time.perf_counter(), self.progress
        before = progress.seconds
        first_lr = self._lr(progress.epochs * self.steps_per_epoch)
        self._train(started - before)
        long_ago = self.accelerator.is_main_process and time.monotonic() - self.saved > LONG
        if any(self.agreement.any_of(long_ago)):  # an evaluation may be killed, too
            self._save(None)
        try:
            evaluation = self._evaluation()
        except Preempted:
            self._stop()
        images = self.accelerator.reduce(torch.tensor(float(progress.images), device=self.accelerator.device), "sum")
        rates = {n.removeprefix("student."): r for n, r in progress.rates.over_all(self.accelerator).items()}
        metrics = {
            "stage": self.stage,
            "epoch": progress.epochs + 1,
            "steps": (progress.epochs + 1) * self.steps_per_epoch,
            "lr": first_lr,
            **{f"loss/{name}": value for name, value in progress.losses.over_all(self.accelerator).items()},
            **evaluation,
            **{f"firing_rate/{name}": value for name, value in rates.items()},
            **({"skipped_steps": progress.skipped} if progress.skipped else {}),
            "images": int(images.item()),
            "train_seconds": progress.seconds,
            "images_per_second": images.item() / max(progress.seconds, 1e-9),
            "seconds": before + time.perf_counter() - started,
        }
        for line in rate_warnings(rates):
            log.info("warning: in epoch %d %s", progress.epochs + 1, line)
        if self.accelerator.is_main_process:
            self._write_metrics(metrics)
        numbers = {f"{self.stage}/{name}": value for name, value in metrics.items() if name not in ("stage", "epoch")}
        # trackers want steps that rise over all stages: the lines of the metrics so far; the main process alone tracks
        self._track(numbers)
        self.progress = progress.next_epoch()
        self._save(evaluation)
        return evaluation

    def _train(self, started: float) -> None:
        """The steps that are left of the epoch.

        Args:
            started: `time.perf_counter()` of its beginning, less the time that an interruption took.
        """
        progress, config, accelerator = self.progress, self.config, self.accelerator
        past = self.epochs_before + progress.epochs
        self.loader.set_epoch(past)  # Accelerate's loader
        self.model.train()
        if self.config.freeze_norms:
            for norm in self.norms:
                norm.training = False
        title = f"{self.stage} {progress.epochs + 1}/{config.epochs}"
        batches = skip_batches(self.loader, progress.batches) if progress.batches else self.loader
        bar = tqdm(
            batches, title, total=self.batches, initial=progress.batches,
            disable=not accelerator.is_main_process, leave=False, mininterval=1.0,
        )  # fmt: skip
        for images, labels in bar:
            if progress.batches == self.batches:  # the rest fills no step; read, because Accelerate counts the end
                continue
            if config.channels_last:
                images = channels_last(images)
            progress.images += len(labels)
            number = past * len(self.loader) + progress.batches
            if self.mixing is not None and self.mixing.enabled:
                images, labels = self.mixing(images, labels, number, accelerator.process_index)
            looked_at = progress.batches % CHECK_EVERY == 0
            step = past * self.steps_per_epoch + progress.batches // config.accumulate
            progress.batches += 1
            self._pass(images, labels, step, looked_at)
            progress.seconds = time.perf_counter() - started
            if accelerator.sync_gradients:
                self._between_steps()
            if looked_at:
                means = progress.losses.over_all(accelerator)  # none where no step has ended yet
                shown = {"loss": f"{means['total']:.3f}"} if means else {}
                bar.set_postfix(shown | {"lr": f"{self.scheduler.get_last_lr()[0]:.2g}"})

    def _pass(self, images: Tensor, labels: Tensor, step: int, looked_at: bool) -> None:
        """Forward and backward of one batch and, behind the last of a step, the optimizer's move."""
        accelerator, guard, progress = self.accelerator, self.guard, self.progress
        recording: contextlib.AbstractContextManager[dict[str, Tensor]] = (
            recorded_rates(self.network) if looked_at else contextlib.nullcontext({})
        )
        with (
            accelerator.accumulate(self.model),
            synchronised_batch_norm(self.config.sync_bn),
            recording as rates,
        ):
            guard.before_pass()
            parts = self.backward(accelerator, self.model, images, labels, step)
            guard.after_pass(parts, len(labels), rates)
            if accelerator.sync_gradients:
                norm = None
                if self.config.clip is not None:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip)
                good = self.agreement.any_of(not guard.finite(norm)) == [False]
                if good or accelerator.scaler is not None:  # the scaler skips by itself, and wants to know
                    self.optimizer.step()
                if good:
                    guard.keep(progress)
                    if self.average is not None:
                        self.average.update()
                        progress.averaged = self.average.steps
                else:
                    guard.skip(progress)
                with warnings.catch_warnings():  # torch warns where the very first step was skipped
                    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                    self.scheduler.step()
            self.optimizer.zero_grad()
        if accelerator.sync_gradients and progress.skipped_in_a_row:
            self._after_a_bad_step(step)

    def _after_a_bad_step(self, step: int) -> None:
        """Keeps which images it had, of all processes; ends the training after too many."""
        progress, config = self.progress, self.config
        found = f"in step {step + 1} (epoch {progress.epochs + 1}) of the {self.stage} ({self.guard.parts()})"
        processes = self.agreement.gather({"loss": self.guard.parts(), **self._samples()})
        if self.accelerator.is_main_process:
            values = {"stage": self.stage, "epoch": progress.epochs + 1, "step": step + 1, "processes": processes}
            self.folder.write_bad_step(self.stage, step + 1, values)
        shown = [number for process in processes for number in process["images"]]
        samples = (
            f"images {shown[:SHOWN_IMAGES]}{' ...' if len(shown) > SHOWN_IMAGES else ''} "
            f"({self.folder.bad_step(self.stage, step + 1)} has all {len(shown)}, and their names where they have any)"
        )
        if progress.skipped_in_a_row <= config.max_skipped_steps:
            log.info("warning: the loss or its gradient is no finite number %s: step skipped; %s", found, samples)
            return
        kept = self._save(None)
        raise NonFiniteLossError(
            f"the loss or its gradient is no finite number {found}, {progress.skipped_in_a_row} times in a row; "
            f"{samples}. {kept}; lower train.lr ({config.lr}) or set train.clip (now {config.clip}), and continue "
            "with --resume --allow-changed train.lr"
        )

    def _samples(self) -> dict[str, list]:
        """This process's images of the step behind us: their places in the training set, and names where it has any."""
        epoch, accelerator = self.epochs_before + self.progress.epochs, self.accelerator
        first = self.progress.batches - self.config.accumulate
        rank, processes = accelerator.process_index, accelerator.num_processes
        batches = range(first, self.progress.batches)
        images = [n for batch in batches for n in sample_indices(self.indices_of, epoch, batch, rank, processes)]
        dataset = self.indices_of.dataset
        return {"images": images, "names": dataset.names_of(images) if isinstance(dataset, ImageSet) else []}

    def _between_steps(self) -> None:
        """Saves where it is time to; ends where it was asked for."""
        steps = self.progress.epochs * self.steps_per_epoch + self.progress.batches // self.config.accumulate
        due = self.accelerator.is_main_process and self.folder.saving.due(steps, time.monotonic() - self.saved)
        due, asked = self.agreement.any_of(due, INTERRUPTION.asked)
        if asked:
            self._stop()
        if due:
            self._save(None)

    def _write_metrics(self, metrics: dict[str, Any]) -> None:
        try:
            self.folder.append_metrics(metrics)
        except OSError as error:
            newest = self.state.checkpoints.newest(say=False)
            kept = (
                "no checkpoint was written before" if newest is None else f"the last good checkpoint is {newest.path}"
            )
            raise OSError(
                f"the epoch's metrics could not be written: {error}; {kept}; continue with --resume"
            ) from error

    def _track(self, numbers: dict[str, Any]) -> None:
        """What trackers show is in the metrics, too: one that fails is left out, and the training goes on."""
        try:
            self.accelerator.log(numbers, step=len(self.folder.metrics()))
        except OSError as error:
            log.info("warning: a tracker could not write (%s): nothing more is tracked in this run", error)
            self.accelerator.trackers.clear()

    def _evaluation(self) -> Mapping[str, float]:
        averaged = contextlib.nullcontext() if self.average is None else self.average.in_use()
        with repeatable(self.accelerator.device), averaged:
            return self.evaluate(self.model.eval())

    def _stop(self) -> NoReturn:
        kept = self._save(None)
        raise Preempted(f"asked to stop (SIGTERM) in epoch {self.progress.epochs + 1} of the {self.stage}: {kept}")

    def _lr(self, step: int) -> float:
        """The learning rate of a step of this training."""
        return self.config.lr * self.scheduler.scheduler.lr_lambdas[0](step)

    def _save(self, evaluation: Mapping[str, float] | None) -> str:
        """Writes a checkpoint; returns what to say of it."""
        self.saved = time.monotonic()
        score = None if evaluation is None or self.score is None else evaluation.get(self.score)
        return self.state.save(self.progress, score)

    def _resume(self) -> None:
        """Goes on from the newest whole checkpoint; epochs that none holds are trained, and logged, again."""
        self.progress = self.state.load(self.steps_per_epoch)
        epochs = self.progress.epochs
        if self.accelerator.is_main_process:
            self.folder.drop_metrics(lambda line: line["stage"] != self.stage or line["epoch"] <= epochs)
        self.accelerator.wait_for_everyone()
