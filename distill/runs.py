"""The folder of a run: what is written where, a name of its own, and how an interrupted run is found again.

config.yaml     the resolved configuration        checkpoints/   what --resume continues from (distill.checkpoints)
metrics.jsonl   one JSON object an epoch          teacher/       a teacher trained on the spot
summary.json    the results                       student/       the spiking network
hybrids/        a network for each tap            bad_steps/     the images of each step whose loss was no number
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import platform
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.train_config import RunConfig, save_every
from models.io import replace_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

CONFIG, METRICS, SUMMARY, BAD_STEPS, LOCK = "config.yaml", "metrics.jsonl", "summary.json", "bad_steps", ".lock"


@dataclass(frozen=True)
class Saving:
    """When checkpoints are written, besides at the end of each epoch, and which are kept."""

    keep: int = 2
    """Of the newest ones; the best is kept besides."""
    minutes: float | None = None
    """Between two of them."""
    steps: int | None = None
    """Of the optimizer, between two of them."""
    allow_changed: tuple[str, ...] = ()
    """Dotted names of the configuration that may differ from those of the run that is resumed."""

    def due(self, steps: int, seconds: float) -> bool:
        """Whether it is time to, after so many steps of the stage and seconds since the last one."""
        if self.minutes is not None and seconds >= 60 * self.minutes:
            return True
        return self.steps is not None and steps % self.steps == 0


class LockedError(ValueError):
    """Another process writes to a run."""


class RunFolder:
    """One run's folder. Only the main process writes to it."""

    def __init__(self, path: Path, saving: Saving | None = None) -> None:
        self.path = path
        self.saving = saving or Saving()

    def lock(self) -> RunFolder:
        """Keeps others from writing here, until this object or its process is gone; does nothing where no system helps.

        The lock says which machine has taken it, for `ended_here`.

        Raises:
            LockedError: if another process writes here.
        """
        if fcntl is None:
            return self
        lock = os.open(self.path / LOCK, os.O_WRONLY | os.O_CREAT, 0o644)
        weakref.finalize(self, os.close, lock)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise LockedError(
                    f"another process is writing to the run in {self.path}: end it, or give this run another folder"
                ) from error
            log.warning("warning: %s cannot be locked (%s): start no second run in it", self.path, error.strerror)
        else:
            _LOCKED.add(self)
            with contextlib.suppress(OSError):  # a full disk
                os.ftruncate(lock, 0)
                os.write(lock, platform.node().encode())
        return self

    @property
    def locked(self) -> bool:
        """Whether no other process of this machine can write here."""
        return self in _LOCKED

    def ended_here(self) -> bool:
        """Whether nobody writes here any more if it can be locked: the last who did was a process of this machine.

        Where machines share a disk but not its locks (BeeGFS and Lustre may be set up so), that of another is not seen.
        """
        # the system drops the locks of a process on a file as soon as it closes that file, whichever way it was opened
        if any(held.path.resolve() == self.path.resolve() for held in _LOCKED):
            return False
        try:
            machine = (self.path / LOCK).read_text()
        except (OSError, UnicodeDecodeError):
            return False
        return machine != "" and machine == platform.node()

    @property
    def checkpoints(self) -> Path:
        """A folder for each stage is in it."""
        return self.path / "checkpoints"

    def append_metrics(self, values: dict[str, Any]) -> None:
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines written so far; a last one that a crash tore apart is none."""
        path, lines = self.path / METRICS, []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
        return lines

    def drop_metrics(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drops the lines of epochs that no checkpoint holds: they are trained again."""
        lines = [json.dumps(line) + "\n" for line in self.metrics() if keep(line)]
        replace_text(self.path / METRICS, "".join(lines))

    def bad_step(self, stage: str, step: int) -> Path:
        """The file about a step, counted from 1, whose loss or gradient was no number."""
        return self.path / BAD_STEPS / f"{stage}_{step}.json"

    def write_bad_step(self, stage: str, step: int, values: dict[str, Any]) -> None:
        path = self.bad_step(stage, step)
        path.parent.mkdir(exist_ok=True)
        replace_text(path, json.dumps(values, indent=2) + "\n")

    def write_summary(self, values: dict[str, Any]) -> None:
        replace_text(self.path / SUMMARY, json.dumps(values, indent=2) + "\n")


_LOCKED: weakref.WeakSet[RunFolder] = weakref.WeakSet()
"""Folders that this process has locked."""


def saving_of(config: RunConfig, allow_changed: Sequence[str] = ()) -> Saving:
    """What the configuration says of checkpoints."""
    every = save_every(config.save_every) if config.save_every is not None else {}
    return Saving(config.keep_checkpoints, every.get("minutes"), every.get("steps"), tuple(allow_changed))  # type: ignore[arg-type]
