"""Trackers (Accelerate's, by name). They show what metrics.jsonl has, too: one that fails is left out of the run."""

from __future__ import annotations

import logging
import os
import uuid
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

log = logging.getLogger(__name__)

FOLDER = "tracking"
"""In the run's folder: what trackers write."""

PROJECT = "spikeswap"


class Guarded(GeneralTracker):
    """A tracker whose first error is a warning, after which it is not called any more.

    Args:
        tracker: a started one.
    """

    requires_logging_directory = False

    def __init__(self, tracker: GeneralTracker) -> None:
        self.name = tracker.name
        self._tracker: GeneralTracker | None = tracker
        super().__init__()

    @property
    def tracker(self) -> Any:
        """What it is made of, of the tracker's own package; None for one that has failed."""
        return None if self._tracker is None else self._tracker.tracker

    def log(self, values: dict, step: int | None = None, **kwargs: Any) -> None:
        self._call("log", values, step=step, **kwargs)

    def finish(self) -> None:
        self._call("finish")

    def _call(self, method: str, *args: Any, **kwargs: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*args, **kwargs)
        except Exception as error:  # of packages that write to disks and networks: there is no list of these
            self._tracker = None
            _warn(self.name, error)


def start_trackers(accelerator: Accelerator, folder: Path, configuration: dict[str, Any]) -> None:
    """Starts those that the accelerator was made with; on the main process, where alone there are trackers.

    Args:
        folder: the run's.
        configuration: what they show of it, by dotted names.
    """
    if not accelerator.is_main_process:
        return
    kinds = (int, float, str, bool)
    flat = {key: value if isinstance(value, kinds) else str(value) for key, value in configuration.items()}
    wanted = accelerator.log_with
    started: list[GeneralTracker] = []
    for kind in wanted:
        name = str(kind)
        accelerator.log_with, accelerator.trackers = [kind], []  # one at a time: an error is one tracker's alone
        try:
            options = {name: _wandb_options(folder)} if name == "wandb" else {}
            accelerator.init_trackers(_project(name), flat, options)
        except Exception as error:
            _warn(name, error)
        else:
            started += map(Guarded, accelerator.trackers)
    accelerator.log_with, accelerator.trackers = wanted, started


def _project(name: str) -> str:
    if name == "tensorboard":  # it takes the project for a folder
        return FOLDER
    return os.environ.get("WANDB_PROJECT", PROJECT) if name == "wandb" else PROJECT


def _wandb_options(folder: Path) -> dict[str, Any]:
    """A run that is resumed goes on in its run of wandb: its name there is drawn once, and kept in its folder.

    The folder's path would not do: another run may be in its place one day, or at the same path of another machine.
    """
    kept = folder / FOLDER / "wandb_id"
    kept.parent.mkdir(exist_ok=True)
    if not kept.exists():
        kept.write_text(uuid.uuid4().hex)
    return {"name": folder.name, "id": kept.read_text().strip(), "resume": "allow", "dir": str(kept.parent)}


def _warn(name: str, error: Exception) -> None:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    log.warning("warning: the tracker %s has failed (%s): the run goes on without it", name, text)
