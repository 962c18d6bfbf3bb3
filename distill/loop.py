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

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from distill.backward import Backward
from distill.bad_steps import BadSteps
from distill.checkpoints import Checkpoints
from distill.cuda_graphs import graphs_for
from distill.data.loaders import skip_batches
from distill.ema import WeightAverage
from distill.epoch_log import EpochLog
from distill.interruption import INTERRUPTION, Preempted
from distill.meters import BackwardFigures, Progress, recorded_rates
from distill.mixing import Mixing
from distill.optimizers import warmup_cosine
from distill.preparation import channels_last, freeze_norms, prepare_training, share_norms
from distill.processes import Agreement
from distill.random_numbers import draw_apart, repeatable
from distill.runs import RunFolder
from distill.saved_state import SavedState
from distill.steps import StepGuard
from distill.train_config import TrainConfig
from models import FeedbackLoop, NonContractingLoopError, synchronised_batch_norm

log = logging.getLogger(__name__)

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
    same_kernels: bool = False,
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
        same_kernels: whether `backward` calls the model once, for the same kernels each time: CUDA graphs serve then.

    Raises:
        ValueError: for fewer images than the processes need for one step, a checkpoint of another number of
            processes, or machines that do not see one folder.
        NonFiniteLossError: after more than `config.max_skipped_steps` bad steps in a row; names the parts of the loss
            and the images. A checkpoint is written. Or after more than `MOST_OVERFLOWS` steps in a row that the scaler
            of float16's gradients has skipped.
        NonContractingLoopError: names the step; the checkpoints are those written before it.
        Preempted: at SIGTERM, after a checkpoint was written within the step.
    """
    return _Fit(
        stage, accelerator, model, backward, loader, evaluate, config, folder, mixing, epochs_before, lr_epochs,
        unused_parameters, score, norms_of, same_kernels,
    ).run(resume)  # fmt: skip


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
        same_kernels: bool,
    ) -> None:
        self.stage, self.accelerator, self.backward, self.evaluate = stage, accelerator, backward, evaluate
        self.config, self.folder, self.mixing = config, folder, mixing
        self.epochs_before, self.score = epochs_before, score
        self.norms_of = norms_of or model
        prepared = prepare_training(accelerator, model, loader, config, unused_parameters)
        self.network, self.model, self.optimizer, self.loader, self.steps_per_epoch = prepared
        self.batches = self.steps_per_epoch * config.accumulate
        factor = warmup_cosine(config, (lr_epochs or config.epochs) * self.steps_per_epoch)
        before = (epochs_before if lr_epochs is not None else 0) * self.steps_per_epoch
        curve = LambdaLR(self.optimizer.optimizer, lambda step: factor(step + before))
        self.scheduler = accelerator.prepare(curve)
        self.agreement = Agreement(accelerator)
        self.graphs = graphs_for(accelerator, self.model, self.network, config, same_kernels, loader.num_workers)
        self.average = None if config.ema is None else WeightAverage(model, config.ema)
        self.state = SavedState(
            accelerator, Checkpoints(folder.checkpoints / stage, folder.saving.keep), self.agreement, self.optimizer,
            self.scheduler, self.average, config, loader.dataset, folder.saving.allow_changed,
        )  # fmt: skip
        self.guard = StepGuard(accelerator, self.model)
        self.backward_figures = BackwardFigures(self.network)
        self.bad_steps = BadSteps(
            stage, accelerator, self.agreement, folder, loader, config, self.guard, self.state, epochs_before
        )
        self.epoch_log = EpochLog(stage, accelerator, folder, self.state, self.steps_per_epoch)
        self.progress = Progress()
        self.saved = time.monotonic()

    def run(self, resume: bool) -> FitResult:
        draw_apart(self.stage, self.accelerator.process_index)  # the networks are the same by now
        if resume:
            self._resume()
        evaluation = None
        # behind it the graphs' memory is free for what follows the training
        graphs = contextlib.nullcontext() if self.graphs is None else contextlib.closing(self.graphs)
        with INTERRUPTION.listening(), graphs:
            while self.progress.epochs < self.config.epochs:
                evaluation = self._epoch()
                INTERRUPTION.leave_if_asked(
                    self.accelerator, f"the {self.stage}: a checkpoint is in {self.state.checkpoints.path}"
                )
            if evaluation is None:  # a resumed training had no epoch left
                evaluation = self._evaluation()
        if self.average is not None:
            self.average.give()
            share_norms(self.network)  # no forward pass of DDP does it any more
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
        self.epoch_log.write(progress, first_lr, evaluation, before + time.perf_counter() - started)
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
            freeze_norms(self.norms_of)
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
        bad = overflowed = False
        model: Any = self.model
        recording: contextlib.AbstractContextManager[Mapping[str, Tensor]] = contextlib.nullcontext({})
        if self.graphs is not None:
            model, self.graphs.recording = self.graphs, looked_at
        elif looked_at:
            recording = recorded_rates(self.network)
        with (
            accelerator.accumulate(self.model),
            synchronised_batch_norm(self.config.sync_bn),
            recording as rates,
        ):
            guard.before_pass()
            try:
                parts = self.backward(accelerator, model, images, labels, step)
            except NonContractingLoopError as error:
                raise self.bad_steps.without_equilibrium(error, step, progress) from error
            found = rates if self.graphs is None else self.graphs.rates
            guard.after_pass(parts, len(labels), found, self.backward_figures.take())
            if accelerator.sync_gradients:
                norm = None
                if self.config.clip is not None:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip)
                scaled = accelerator.scaler is not None
                if scaled:  # it skips by itself, and wants to know
                    self.optimizer.step()
                skipped = scaled and self.optimizer.step_was_skipped
                bad, overflowed = self.agreement.any_of(not guard.finite(norm), skipped)
                if not (bad or overflowed):
                    if not scaled:
                        self.optimizer.step()
                    guard.keep(progress)
                    if self.average is not None:
                        self.average.update()
                        progress.averaged = self.average.steps
                else:
                    guard.skip(progress, overflowed=not bad)
                # the rate is that of the place in the data, by which a resumed run finds it, whatever was skipped
                with warnings.catch_warnings():  # torch warns where the very first step was skipped, or is a scaler's
                    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step|Seems like `optimizer.step")
                    self.scheduler.step()
            self.optimizer.zero_grad()
        if bad:
            self.bad_steps.not_finite(step, progress, lambda: self._save(None))
        elif overflowed:
            self.bad_steps.overflowed(step, progress)

    def _between_steps(self) -> None:
        """Saves where it is time to; ends where it was asked for."""
        steps = self.progress.epochs * self.steps_per_epoch + self.progress.batches // self.config.accumulate
        due = self.accelerator.is_main_process and self.folder.saving.due(steps, time.monotonic() - self.saved)
        due, asked = self.agreement.any_of(due, INTERRUPTION.asked)
        if asked:
            self._stop()
        overflows = (
            self.progress.overflowed_in_a_row > 0
        )  # while the scaler looks for a scale it has none to go on with
        if due and not overflows:
            self._save(None)

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
        for module in self.network.modules():
            if isinstance(module, FeedbackLoop):  # the main process writes for all
                module.share_excess()
        score = None if evaluation is None or self.score is None else evaluation.get(self.score)
        return self.state.save(self.progress, score)

    def _resume(self) -> None:
        """Goes on from the newest whole checkpoint; epochs that none holds are trained, and logged, again."""
        self.progress = self.state.load(self.steps_per_epoch)
        epochs = self.progress.epochs
        if self.accelerator.is_main_process:
            self.folder.drop_metrics(lambda line: line["stage"] != self.stage or line["epoch"] <= epochs)
        self.accelerator.wait_for_everyone()
