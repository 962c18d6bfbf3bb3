"""What an epoch leaves besides its checkpoint: a line of metrics.jsonl, warnings of dead layers, what trackers show."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

from distill.meters import Progress
from distill.report import rate_warnings
from distill.runs import RunFolder
from distill.saved_state import SavedState

log = logging.getLogger(__name__)

BACKWARD = "backward/"
"""How the names begin under which metrics.jsonl has what networks say of their backward passes."""


class EpochLog:
    """Of one training.

    Args:
        stage: names the training in the metrics: "teacher", "student", ...
        state: what is kept of it, to say what a run that ends here can go on from.
        steps_per_epoch: of the optimizer.
    """

    def __init__(
        self, stage: str, accelerator: Accelerator, folder: RunFolder, state: SavedState, steps_per_epoch: int
    ) -> None:
        self._stage, self._accelerator, self._folder, self._state = stage, accelerator, folder, state
        self._steps_per_epoch = steps_per_epoch

    def write(self, progress: Progress, lr: float, evaluation: Mapping[str, float], seconds: float) -> None:
        """Of the epoch that has ended; every process calls it.

        Args:
            lr: learning rate of its first step.
            evaluation: what was said of the model after it.
            seconds: that it took, its evaluation included.

        Raises:
            OSError: if the metrics cannot be written; names the last good checkpoint.
        """
        accelerator, epoch = self._accelerator, progress.epochs + 1
        images = accelerator.reduce(torch.tensor(float(progress.images), device=accelerator.device), "sum")
        rates = {n.removeprefix("student."): r for n, r in progress.rates.over_all(accelerator).items()}
        backward = {n.replace("/student.", "/", 1): v for n, v in progress.backward.over_all(accelerator).items()}
        metrics = {
            "stage": self._stage,
            "epoch": epoch,
            "steps": epoch * self._steps_per_epoch,
            "lr": lr,
            **{f"loss/{name}": value for name, value in progress.losses.over_all(accelerator).items()},
            **evaluation,
            **{f"firing_rate/{name}": value for name, value in rates.items()},
            **{f"{BACKWARD}{name}": value for name, value in backward.items()},
            **({"skipped_steps": progress.skipped} if progress.skipped else {}),
            "images": int(images.item()),
            "train_seconds": progress.seconds,
            "images_per_second": images.item() / max(progress.seconds, 1e-9),
            "seconds": seconds,
        }
        for line in rate_warnings(rates):
            log.info("warning: in epoch %d %s", epoch, line)
        if accelerator.is_main_process:
            self._append(metrics)
        numbers = {f"{self._stage}/{n}": value for n, value in metrics.items() if n not in ("stage", "epoch")}
        if accelerator.trackers:  # of the main process alone
            # they want steps that rise over all stages: the lines of the metrics so far
            accelerator.log(numbers, step=len(self._folder.metrics()))

    def _append(self, metrics: dict[str, Any]) -> None:
        try:
            self._folder.append_metrics(metrics)
        except OSError as error:
            raise OSError(
                f"the epoch's metrics could not be written: {error}; {self._state.kept()}; continue with --resume"
            ) from error
