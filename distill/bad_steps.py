"""What follows a step that moved nothing: which images it had, in the log and in a file, and when a training ends."""

from __future__ import annotations

import logging
from collections.abc import Callable

from accelerate import Accelerator
from torch.utils.data import DataLoader

from distill.data import ImageSet
from distill.data.loaders import sample_indices
from distill.meters import Progress
from distill.processes import Agreement
from distill.runs import RunFolder
from distill.saved_state import SavedState
from distill.steps import MOST_OVERFLOWS, NonFiniteLossError, StepGuard
from distill.train_config import TrainConfig
from models import NonContractingLoopError

log = logging.getLogger(__name__)

SHOWN_IMAGES = 64
"""Of a bad step, in the log; its file has them all."""


class BadSteps:
    """Of one training; steps are counted from 0. Every process calls `not_finite` and `overflowed`.

    Args:
        stage: names the training: "teacher", "student", ...
        loader: of the training, not prepared.
        guard: knows the loss of the step.
        state: says which checkpoint is kept.
        epochs_before: epochs of earlier trainings on the same data.
    """

    def __init__(
        self,
        stage: str,
        accelerator: Accelerator,
        agreement: Agreement,
        folder: RunFolder,
        loader: DataLoader,
        config: TrainConfig,
        guard: StepGuard,
        state: SavedState,
        epochs_before: int,
    ) -> None:
        self._stage, self._accelerator, self._agreement, self._folder = stage, accelerator, agreement, folder
        self._loader, self._config, self._guard, self._state = loader, config, guard, state
        self._epochs_before = epochs_before

    def not_finite(self, step: int, progress: Progress, save: Callable[[], str]) -> None:
        """Keeps which images it had; ends the training after too many.

        Args:
            save: writes a checkpoint; returns what to say of it.

        Raises:
            NonFiniteLossError: after more than `max_skipped_steps` in a row.
        """
        found, samples = self._where(step, progress), self._images(step, progress)
        if progress.skipped_in_a_row <= self._config.max_skipped_steps:
            log.info("warning: the loss or its gradient is no finite number %s: step skipped; %s", found, samples)
            return
        kept = save()
        raise NonFiniteLossError(
            f"the loss or its gradient is no finite number {found}, {progress.skipped_in_a_row} times in a row; "
            f"{samples}. {kept}; lower train.lr ({self._config.lr}) or set train.clip (now {self._config.clip}), and "
            "continue with --resume --allow-changed train.lr"
        )

    def overflowed(self, step: int, progress: Progress) -> None:
        """Says so where the scaler begins to look for a scale; ends the training where there is none.

        No checkpoint is written then, nor, but at an epoch's end, on the way there: with its scale a run that goes on
        would lose its gradients at the other end.

        Raises:
            NonFiniteLossError: after more than `MOST_OVERFLOWS` in a row.
        """
        assert self._accelerator.scaler is not None
        number, scale = progress.overflowed_in_a_row, self._accelerator.scaler.get_scale()
        found = self._where(step, progress)
        if number == 1:
            log.info("warning: the gradient overflows float16 %s: skipped, the loss is scaled by %g now", found, scale)
        if number > MOST_OVERFLOWS:
            raise NonFiniteLossError(
                f"the gradient is no finite number {found}, {number} times in a row, also with the loss scaled by "
                f"{scale:g}; {self._images(step, progress)}. {self._state.kept()}; continue with --resume "
                f"--allow-changed and run.mixed_precision (bf16 or no) or a lower train.lr ({self._config.lr})"
            )

    def without_equilibrium(
        self, error: NonContractingLoopError, step: int, progress: Progress
    ) -> NonContractingLoopError:
        """The error with its step. No checkpoint is written: the weights that made it so are no good ones."""
        return NonContractingLoopError(
            f"{error}. It happened in step {step + 1} (epoch {progress.epochs + 1}) of the {self._stage}; "
            f"{self._state.kept()}; continue with --resume --allow-changed and the name of what is changed (train.lr, "
            "student.feedback.bound)"
        )

    def _where(self, step: int, progress: Progress) -> str:
        """Where the step was, and what its loss, for people."""
        return f"in step {step + 1} (epoch {progress.epochs + 1}) of the {self._stage} ({self._guard.parts()})"

    def _images(self, step: int, progress: Progress) -> str:
        """Writes down which images the step behind us had, and says so."""
        found = self._samples(self._epochs_before + progress.epochs, progress.batches)
        processes = self._agreement.gather({"loss": self._guard.parts(), **found})
        if self._accelerator.is_main_process:
            values = {"stage": self._stage, "epoch": progress.epochs + 1, "step": step + 1, "processes": processes}
            self._folder.write_bad_step(self._stage, step + 1, values)
        shown, path = [n for each in processes for n in each["images"]], self._folder.bad_step(self._stage, step + 1)
        return (
            f"images {shown[:SHOWN_IMAGES]}{' ...' if len(shown) > SHOWN_IMAGES else ''} "
            f"({path} has all {len(shown)}, and their names where they have any)"
        )

    def _samples(self, past: int, batches: int) -> dict[str, list]:
        """This process's images of the last step: their places in the training set, and names where it has any.

        Args:
            past: epochs on the same data before this one.
            batches: done in it, on each process.
        """
        rank, processes = self._accelerator.process_index, self._accelerator.num_processes
        of_step = range(batches - self._config.accumulate, batches)
        images = [n for batch in of_step for n in sample_indices(self._loader, past, batch, rank, processes)]
        dataset = self._loader.dataset
        return {"images": images, "names": dataset.names_of(images) if isinstance(dataset, ImageSet) else []}
