"""What every script sets up before it trains: Accelerate, seeds, threads, logging, the run's folder."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DataLoaderConfiguration,
    InitProcessGroupKwargs,
    LoggerType,
    broadcast_object_list,
    set_seed,
)

from distill.config_changes import flatten
from distill.opening import open_run, stages_begun
from distill.processes import PATIENCE, cpus_of_a_process
from distill.runs import RunFolder, saving_of
from distill.tracking import start_trackers
from distill.train_config import RunConfig
from models import compile_kernels


class Session:
    """A started run on this process.

    The run's folder is opened only when everything that can be wrong with the configuration has been looked at, so
    that a mistyped command leaves nothing behind.
    """

    def __init__(
        self, accelerator: Accelerator, config: RunConfig, resume: bool, config_text: str, allow_changed: Sequence[str]
    ) -> None:
        self.accelerator = accelerator
        self.config = config
        self.resume = resume
        self.config_text = config_text
        """The resolved configuration, as YAML."""
        self.allow_changed = allow_changed
        """What may differ from the run that is resumed, as dotted names."""
        self._folder: RunFolder | None = None
        self._locked: RunFolder | None = None
        """The same on the main process, which keeps others from writing there."""

    @property
    def folder(self) -> RunFolder:
        """The run's folder, the same on every process; opened at the first call, which all processes make."""
        if self._folder is None:
            self._folder = self._open()
        return self._folder

    def stages_begun(self) -> set[str]:
        """The stages of which the run that is resumed has a whole checkpoint; none of a new run. Opens no folder."""
        if not self.resume:
            return set()
        return stages_begun(self.config, yaml.safe_load(self.config_text), self.allow_changed)

    def _open(self) -> RunFolder:
        resolved = yaml.safe_load(self.config_text)
        opened: list = [None, None]
        if self.accelerator.is_main_process:
            try:  # the other processes wait for the outcome, whatever it is
                self._locked = open_run(self.config, self.resume, resolved, self.allow_changed)
                opened = [self._locked.path, None]
            except (OSError, ValueError) as error:
                opened = [None, str(error)]
        broadcast_object_list(opened)
        path, refusal = opened
        if refusal is not None:
            raise ValueError(refusal)
        if self.config.trackers:
            configuration = self.accelerator.project_configuration
            configuration.project_dir = configuration.logging_dir = str(path)  # `set_directories` keeps the latter
            start_trackers(self.accelerator, Path(path), flatten(resolved))
        return RunFolder(Path(path), saving_of(self.config, self.allow_changed))


def start(config: RunConfig, resume: bool, config_text: str, allow_changed: Sequence[str] = ()) -> Session:
    """Starts Accelerate, logging, threads and seeds.

    Raises:
        ValueError: for a tracker that is unknown or not installed.
    """
    installed = ["all", *map(str, get_available_trackers())]
    for tracker in config.trackers:
        if tracker not in LoggerType.list():
            raise ValueError(f"run.trackers: {tracker!r} is none of Accelerate's trackers {LoggerType.list()}")
        if tracker not in installed:
            raise ValueError(f"run.trackers: the package of {tracker!r} is not installed")
    accelerator = Accelerator(
        # of several processes without a GPU Accelerate makes as many runs of one, unless it is told
        cpu=int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        log_with=config.trackers or None,
        step_scheduler_with_optimizer=False,  # the loop counts optimizer steps itself
        project_dir=config.dir or "runs",
        # the loaders' memory is pinned: nobody waits for a batch to reach the GPU
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    if not accelerator.is_main_process:  # what all have to say is said once; errors end a process, and are told then
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    for library in ("timm", "accelerate"):
        logging.getLogger(library).setLevel(logging.WARNING)
    _set_threads(accelerator, config.threads)
    compile_kernels(config.compile)
    set_seed(config.seed)
    torch.backends.cudnn.deterministic = True  # of convolutions: other operations of a GPU may still add in any order
    resolved = yaml.safe_load(config_text)
    resolved["run"]["mixed_precision"] = accelerator.mixed_precision  # which may have come from the launcher
    return Session(accelerator, config, resume, yaml.safe_dump(resolved, sort_keys=False), allow_changed)


def _set_threads(accelerator: Accelerator, threads: int | None) -> None:
    """All cores for a run on the CPU: `accelerate launch` allows one where nobody told it otherwise."""
    if accelerator.device.type != "cpu":
        return
    torch.set_num_threads(threads or cpus_of_a_process(accelerator.num_processes))
