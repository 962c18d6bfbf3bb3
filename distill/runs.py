"""The folder of a run: what is written where, a name of its own, and how an interrupted run is found again.

config.yaml     the resolved configuration        checkpoints/   what --resume continues from (distill.checkpoints)
metrics.jsonl   one JSON object an epoch          teacher/       a teacher trained on the spot
summary.json    the results                       student/       the spiking network
hybrids/        a network for each tap            bad_steps/     the images of each step whose loss was no number
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import itertools
import json
import logging
import os
import shutil
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distill.checkpoints import Checkpoints
from distill.config import RunConfig, save_every
from models.io import replace_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

CONFIG, METRICS, SUMMARY, BAD_STEPS, LOCK = "config.yaml", "metrics.jsonl", "summary.json", "bad_steps", ".lock"

IN_MEMORY = "data.in_memory"

MAY_CHANGE = (
    "run.dir",
    "run.name",
    "run.trackers",
    "run.threads",
    "run.save_every",
    "run.keep_checkpoints",
    "data.workers",
    IN_MEMORY,
    "data.cache",
)
"""What may differ when a run is resumed: none of it changes a number, unless images are skipped (`_may_change`)."""

PROCESSES = "processes"
"""What --allow-changed calls the number of processes, which is no field of the configuration."""


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


class RunFolder:
    """One run's folder. Only the main process writes to it."""

    def __init__(self, path: Path, saving: Saving | None = None) -> None:
        self.path = path
        self.saving = saving or Saving()

    def lock(self) -> RunFolder:
        """Keeps others from writing here, until this object or its process is gone; does nothing where no system helps.

        Raises:
            ValueError: if another process writes here.
        """
        if fcntl is None:
            return self
        lock = os.open(self.path / LOCK, os.O_WRONLY | os.O_CREAT, 0o644)
        weakref.finalize(self, os.close, lock)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"another process is writing to the run in {self.path}: end it, or give this run another folder"
                ) from error
            log.warning("warning: %s cannot be locked (%s): start no second run in it", self.path, error.strerror)
        return self

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


def saving_of(config: RunConfig, allow_changed: Sequence[str] = ()) -> Saving:
    """What the configuration says of checkpoints."""
    every = save_every(config.save_every) if config.save_every is not None else {}
    return Saving(config.keep_checkpoints, every.get("minutes"), every.get("steps"), tuple(allow_changed))  # type: ignore[arg-type]


def open_run(config: RunConfig, resume: bool, resolved: dict[str, Any], allow_changed: Sequence[str] = ()) -> RunFolder:
    """Makes the folder of a new run, or finds the one to resume. Call it on the main process only.

    A run to resume is the unfinished one in the folder of that name, else the newest unfinished one among its
    siblings with a suffix, else the finished one.

    Args:
        resolved: the whole configuration, in YAML types.
        allow_changed: dotted names of it (or of groups) that may differ from those of the run to resume.

    Raises:
        ValueError: if the run to resume had another configuration; names the fields. Or if another process writes to
            it, or for an unknown name.
    """
    _check_names(allow_changed, resolved, resume)
    wanted = _wanted(config)
    text = yaml.safe_dump(resolved, sort_keys=False)
    if resume and (path := _to_resume(wanted)) is not None:
        folder = RunFolder(path).lock()
        if _saved_anything(path):
            saved = _read_config(path)
            _check_same(saved, resolved, path, allow_changed)
            log.info("resuming the run in %s", path)
            if flatten(saved) != flatten(resolved):
                _keep_old(path)
                replace_text(path / CONFIG, text)
        else:
            log.info("nothing was saved yet in %s: the run starts from the beginning", path)
            replace_text(path / CONFIG, text)
        return folder
    if resume:
        log.info("nothing to resume in %s: the run starts from the beginning", wanted)
    for number in itertools.count(1):
        path = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        path.mkdir(parents=True, exist_ok=True)
        try:
            with (path / CONFIG).open("x") as file:  # of several runs that start at once, one gets the name
                file.write(text)
        except FileExistsError:
            continue
        if path != wanted:
            log.info("%s holds a run already: this one is kept in %s", wanted, path)
        return RunFolder(path).lock()
    raise AssertionError("unreachable")


def stages_begun(config: RunConfig) -> set[str]:
    """The stages of which the run that --resume would continue has a whole checkpoint; looks, and makes nothing."""
    path = _to_resume(_wanted(config))
    stages = [] if path is None else [found for found in RunFolder(path).checkpoints.glob("*") if found.is_dir()]
    return {found.name for found in stages if Checkpoints(found).newest(say=False) is not None}


def _wanted(config: RunConfig) -> Path:
    return Path(config.dir) if config.dir is not None else Path("runs") / config.name


def _to_resume(wanted: Path) -> Path | None:
    siblings = [p for p in wanted.parent.glob(f"{wanted.name}-*") if p.name[len(wanted.name) + 1 :].isdigit()]
    runs = [path for path in (wanted, *siblings) if (path / CONFIG).exists()]
    unfinished = [path for path in runs if not (path / SUMMARY).exists()]
    if wanted in unfinished:
        return wanted
    return max(unfinished or runs, key=lambda path: (path / CONFIG).stat().st_mtime, default=None)


def _saved_anything(path: Path) -> bool:
    """Whether a run left more than its configuration."""
    checkpoints = RunFolder(path).checkpoints.glob("*/epoch_*")
    return (path / SUMMARY).exists() or (path / "teacher").exists() or any(checkpoints)


def _keep_old(path: Path) -> None:
    """Earlier configurations of a run that was resumed with another: config.1.yaml is the first."""
    number = next(n for n in itertools.count(1) if not (path / f"config.{n}.yaml").exists())
    shutil.copyfile(path / CONFIG, path / f"config.{number}.yaml")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        saved = yaml.safe_load((path / CONFIG).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path / CONFIG} is not YAML: {error}") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{path / CONFIG} holds no configuration")
    return saved


def _check_same(saved: dict[str, Any], resolved: dict[str, Any], path: Path, allow_changed: Sequence[str]) -> None:
    old, new = flatten(saved), flatten(resolved)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    changed = [key for key in changed if not _among(key, (*_may_change(old, new), *allow_changed))]
    if changed:
        shown = ", ".join(f"{key} (was {old.get(key)!r}, is {new.get(key)!r})" for key in changed[:5])
        raise ValueError(
            f"the run in {path} cannot be resumed with another configuration: {shown}. Give it the same, start a new "
            f"run without --resume, or say --allow-changed {' '.join(changed[:5])}"
        )


def _may_change(*configurations: dict[str, Any]) -> tuple[str, ...]:
    """What may differ between these flat configurations.

    In memory an image that cannot be read is dropped, streamed another takes its place: where images are skipped, the
    two train on different batches.
    """
    if all(values.get("data.on_corrupt", "error") == "error" for values in configurations):
        return MAY_CHANGE
    return tuple(name for name in MAY_CHANGE if name != IN_MEMORY)


def _check_names(allow_changed: Sequence[str], resolved: dict[str, Any], resume: bool) -> None:
    if allow_changed and not resume:
        raise ValueError("--allow-changed means nothing without --resume")
    known = [*flatten(resolved), PROCESSES]
    for name in allow_changed:
        if name != PROCESSES and not any(_among(key, (name,)) for key in known):
            close = difflib.get_close_matches(name, known, n=3) or list(resolved)
            raise ValueError(f"--allow-changed {name}: there is no such field; allowed: {', '.join(close)}")


def _among(key: str, names: Sequence[str]) -> bool:
    """Whether a dotted name is among some, or in a group that is."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
