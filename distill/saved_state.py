"""A training's state in its checkpoints: saved on all processes, found again, loaded under a configuration."""

from __future__ import annotations

import json
import logging
import secrets
from pathlib import Path
from pickle import UnpicklingError  # only the error: nothing here unpickles
from typing import Any

from accelerate import Accelerator
from torch.utils.data import Dataset

from distill.checkpoints import UNFINISHED, Checkpoint, CheckpointError, Checkpoints, IncompleteCheckpointError
from distill.config_changes import PROCESSES
from distill.data import ImageSet
from distill.ema import WeightAverage
from distill.meters import Progress
from distill.processes import Agreement
from distill.train_config import TrainConfig

log = logging.getLogger(__name__)

AVERAGE = "average.safetensors"
SKIPPED = "skipped_images"
"""In a process's progress: names of the training images that it could not read."""


class SavedState:
    """Everything that a training would miss: Accelerate's state (network, optimizer, scheduler, scaler, random numbers
    of each process), each process's progress and what it has skipped, and the average of the weights.

    Args:
        optimizer, scheduler: prepared; nothing of the configuration is taken from a checkpoint.
        average: of the weights, or None.
        images: what is trained on; skipped images are known of an `ImageSet`.
        allow_changed: what the user allows to differ (see `distill.runs.Saving`).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        checkpoints: Checkpoints,
        agreement: Agreement,
        optimizer: Any,
        scheduler: Any,
        average: WeightAverage | None,
        config: TrainConfig,
        images: Dataset,
        allow_changed: tuple[str, ...] = (),
    ) -> None:
        self.checkpoints = checkpoints
        self._accelerator = accelerator
        self._agreement = agreement
        self._optimizer, self._scheduler, self._average = optimizer, scheduler, average
        self._images = images if isinstance(images, ImageSet) else None
        self._allow_changed = allow_changed
        self._division = {
            "processes": accelerator.num_processes,
            "batch_size": config.batch_size,
            "accumulate": config.accumulate,
        }
        """How an epoch is divided, without which a place in it means nothing."""
        self._kind = config.optimizer

    def save(self, progress: Progress, score: float | None) -> str:
        """Writes a checkpoint. Where that fails, the older ones stay and a warning is given. Returns what to say of it.

        Args:
            score: by which the best is chosen, or None.

        Raises:
            ValueError: if the main process does not see what another one has written: it never will.
        """
        accelerator = self._accelerator

        def write(path: Path) -> None:
            accelerator.save_state(str(path))
            values = progress.plain() | {SKIPPED: [] if self._images is None else list(self._images.skipped)}
            (path / _progress_file(accelerator.process_index)).write_text(json.dumps(values))
            if self._average is not None and accelerator.is_main_process:
                self._average.save(path / AVERAGE)

        def everywhere(error: BaseException | None) -> None:
            if (text := self._agreement.first_error(error)) is None:
                return
            incomplete = any(self._agreement.any_of(isinstance(error, IncompleteCheckpointError)))
            raise IncompleteCheckpointError(text) if incomplete else CheckpointError(text)

        facts = {**self._division, "optimizer": self._kind, "score": score}
        aside = self._agreement.gather(f"{UNFINISHED}_{secrets.token_hex(4)}")[0]
        needed = [name for rank in range(accelerator.num_processes) for name in _own_files(rank)]
        try:
            self.checkpoints.save(
                progress.epochs, progress.batches, write, everywhere, accelerator.is_main_process, facts, aside, needed
            )
        except IncompleteCheckpointError as error:
            raise ValueError(f"no checkpoint can be written ({error}); {self.kept()}") from error
        except CheckpointError as error:
            text = f"no checkpoint could be written ({error}); {self.kept()}"
            log.info("warning: %s", text)
            return text
        return f"a checkpoint is in {self.checkpoints.path}"

    def kept(self) -> str:
        """What a run that ends now can go on from, for people."""
        last = self.checkpoints.newest(say=False)
        return "no checkpoint was written before" if last is None else f"the last good checkpoint is {last.path}"

    def load(self, steps_per_epoch: int) -> Progress:
        """Loads the newest whole checkpoint; a fresh progress where there is none.

        Args:
            steps_per_epoch: of the optimizer.

        Raises:
            ValueError: if it is of another number of processes and that is not allowed, or of epochs that are divided
                in another way, none of whose ends is kept; if a process does not see it, or its own part of one that
                lies within an epoch.
        """
        accelerator = self._accelerator
        found = self._agreement.gather(self._find() if accelerator.is_main_process else None)[0]
        if isinstance(found, str):
            raise ValueError(found)
        if accelerator.is_main_process:
            self.checkpoints.drop_newer(found)
        accelerator.wait_for_everyone()
        if found is None:
            return Progress()
        self._check_seen(found)
        wanted = [dict(group) for group in self._optimizer.param_groups]
        try:
            accelerator.load_state(str(found.path))
        except (ValueError, KeyError, RuntimeError, UnpicklingError) as error:
            raise ValueError(
                f"the checkpoint {found.path} does not fit what is trained now: {error}. Another network or optimizer, "
                "or weight decay from or to 0, cannot be continued: start a new run"
            ) from error
        first, own = (found.path / _progress_file(rank) for rank in (0, accelerator.process_index))
        of_first = Progress.of_plain(_progress_in(first)[0])
        # a process that was not there when it was written starts between two epochs, where nothing else counts
        progress = Progress.of_plain(_progress_in(own)[0]) if own.exists() else Progress(found.epochs)
        progress.averaged = of_first.averaged
        progress.skipped_in_a_row = of_first.skipped_in_a_row  # all processes decide by them together
        progress.overflowed_in_a_row = of_first.overflowed_in_a_row
        accelerator.step = progress.batches  # where a step ends: Accelerate's own may be of another division
        if self._images is not None:
            recall_skipped(found.path, self._images)
        self._scheduler.scheduler.last_epoch = (
            progress.epochs * steps_per_epoch + progress.batches // self._division["accumulate"]
        )
        self._configure(wanted)
        if self._average is not None and (found.path / AVERAGE).exists():
            self._average.load(found.path / AVERAGE, progress.averaged)
        return progress

    def _check_seen(self, found: Checkpoint) -> None:
        """Within an epoch each process must go on from its own place: with another it would wait for the others."""
        rank = self._accelerator.process_index
        needed = [found.path / name for name in _own_files(rank)] if found.batches else []
        unseen = next((str(path) for path in (found.path, *needed) if not path.exists()), None)
        for number, path in enumerate(self._agreement.gather(unseen)):
            if path is not None:
                raise ValueError(
                    f"process {number} of {self._accelerator.num_processes} does not find {path}: all machines must "
                    "see the same run.dir. Where it was never written, delete the checkpoint: the one before is used"
                )

    def _configure(self, wanted: list[dict[str, Any]]) -> None:
        """Learning rate, weight decay and momentum as the configuration has them: it may have changed since."""
        scheduler = self._scheduler.scheduler
        scheduler.base_lrs = [group["initial_lr"] for group in wanted]
        for group, values in zip(self._optimizer.param_groups, wanted, strict=True):
            for name in ("initial_lr", "weight_decay", "momentum"):
                if name in values:
                    group[name] = values[name]
            group["lr"] = group["initial_lr"] * scheduler.lr_lambdas[0](scheduler.last_epoch)

    def _find(self) -> Checkpoint | str | None:
        """The checkpoint to go on from, or what is wrong with it."""
        found = self.checkpoints.newest()
        if found is None:
            return None
        facts = self.checkpoints.facts(found)
        if facts.get("optimizer") != self._kind:
            return f"the checkpoint {found.path} is of the optimizer {facts.get('optimizer')!r}: start a new run"
        if all(facts.get(name) == value for name, value in self._division.items()):
            return found
        processes, now = facts.get("processes"), self._division["processes"]
        if processes != now and PROCESSES not in self._allow_changed:
            return (
                f"the checkpoint {found.path} is of {processes} process(es), now there are {now}, which changes the "
                f"batches: start as many, or say --allow-changed {PROCESSES} (it continues at the last end of an epoch)"
            )
        end = self.checkpoints.newest(say=False, epoch_ends=True)
        changed = ", ".join(f"{n} {facts.get(n)} -> {v}" for n, v in self._division.items() if facts.get(n) != v)
        if end is None:
            return (
                f"the checkpoint {found.path} lies within the first epoch, whose batches are others now ({changed}): "
                "continue as it was started, at least to the end of the epoch, or start a new run"
            )
        log.info(
            "epochs are divided in another way (%s): the training continues at the end of epoch %d, %s",
            changed,
            end.epochs,
            end.path,
        )
        return end


def _progress_file(rank: int) -> str:
    return f"progress_{rank}.json"


def _own_files(rank: int) -> tuple[str, str]:
    """What each process keeps for itself: its progress, and what Accelerate writes of its random numbers."""
    return _progress_file(rank), f"random_states_{rank}.pkl"


def recall_skipped(checkpoint: Path, images: ImageSet) -> None:
    """Leaves out the images that any process had skipped when a checkpoint was written."""
    for path in sorted(checkpoint.glob("progress_*.json")):
        images.leave_out(_progress_in(path)[1])


def _progress_in(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A process's progress, in JSON types, and the images that it had skipped."""
    values = json.loads(path.read_text())
    return values, values.pop(SKIPPED, [])  # a checkpoint of an older version names none
