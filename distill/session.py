"""What every script sets up before it trains: Accelerate, seeds, threads, logging, the run's folder."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import LoggerType, broadcast_object_list, set_seed

from distill.config import RunConfig
from distill.runs import RunFolder, flatten, open_run
from models import compile_kernels

log = logging.getLogger("distill")


@dataclass(frozen=True)
class Session:
    """A started run on this process."""

    accelerator: Accelerator
    folder: RunFolder
    config_text: str
    """The resolved configuration, as YAML."""


def start(config: RunConfig, resume: bool, config_text: str) -> Session:
    """Starts Accelerate and opens the run's folder.

    Raises:
        ValueError: for an unknown tracker, or a run that cannot be resumed (see `distill.runs.open_run`).
    """
    for tracker in config.trackers:
        if tracker not in LoggerType.list():
            raise ValueError(f"run.trackers: {tracker!r} is none of Accelerate's trackers {LoggerType.list()}")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.trackers or None,
        step_scheduler_with_optimizer=False,  # the loop counts optimizer steps itself
        project_dir=config.dir or "runs",
    )
    level = logging.INFO if accelerator.is_main_process else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", force=True)
    for library in ("timm", "accelerate"):
        logging.getLogger(library).setLevel(logging.WARNING)
    _set_threads(accelerator, config.threads)
    compile_kernels(config.compile)
    set_seed(config.seed)
    torch.backends.cudnn.deterministic = True  # equal seeds, equal weights
    opened: list = [None, None]
    if accelerator.is_main_process:
        try:  # the other processes wait for the outcome, whatever it is
            opened = [open_run(config, resume, yaml.safe_load(config_text)).path, None]
        except ValueError as error:
            opened = [None, str(error)]
    broadcast_object_list(opened)
    path, refusal = opened
    if refusal is not None:
        raise ValueError(refusal)
    folder = RunFolder(Path(path))
    if config.trackers:
        accelerator.project_configuration.set_directories(str(folder.path))
        flat = {key: value if isinstance(value, (int, float, str, bool)) else str(value)
                for key, value in flatten(yaml.safe_load(config_text)).items()}  # fmt: skip
        accelerator.init_trackers("tracking", flat)
    return Session(accelerator, folder, config_text)


def _set_threads(accelerator: Accelerator, threads: int | None) -> None:
    """All cores for a run on the CPU: `accelerate launch` allows one where nobody told it otherwise."""
    if accelerator.device.type != "cpu":
        return
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // local_processes))
