"""The folder of a run: what is written where, a name of its own, and how an interrupted run is found again.

config.yaml     the resolved configuration        checkpoints/   what --resume continues from
metrics.jsonl   one JSON object an epoch          teacher/       a teacher trained on the spot
summary.json    the results                       student/       the spiking network
hybrids/        a network for each tap
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from distill.config import RunConfig
from models.io import replace_text

log = logging.getLogger(__name__)

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"

MAY_CHANGE = ("run.dir", "run.name", "run.trackers", "run.threads", "data.workers", "data.in_memory")
"""What may differ when a run is resumed: none of it changes a number."""


class RunFolder:
    """One run's folder. Only the main process writes to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

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

    def write_summary(self, values: dict[str, Any]) -> None:
        replace_text(self.path / SUMMARY, json.dumps(values, indent=2) + "\n")


class Checkpoints:
    """The checkpoints of one stage of a run: written aside, moved into place, the older one deleted after that."""

    def __init__(self, folder: RunFolder, stage: str) -> None:
        self.path = folder.path / "checkpoints" / stage

    def latest(self) -> tuple[int, Path] | None:
        """Finished epochs and folder of the newest whole checkpoint."""
        found = [(int(p.name.removeprefix("epoch_")), p) for p in self.path.glob("epoch_*") if p.is_dir()]
        return max(found, default=None)

    def save(self, epochs: int, write: Callable[[Path], None], is_main: bool, wait: Callable[[], None]) -> None:
        """Saves the state after so many finished epochs; `write` is called on every process."""
        temporary, final = self.path / "unfinished", self.path / f"epoch_{epochs:04d}"
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        wait()
        write(temporary)
        wait()
        if is_main:
            older = [p for p in self.path.glob("epoch_*") if p != final]
            temporary.rename(final)
            for path in older:
                shutil.rmtree(path)

    def drop(self) -> None:
        """Deletes them all: a later stage's have taken their place. On the main process only."""
        shutil.rmtree(self.path, ignore_errors=True)


def open_run(config: RunConfig, resume: bool, resolved: dict[str, Any]) -> RunFolder:
    """Makes the folder of a new run, or finds the one to resume. Call it on the main process only.

    A run to resume is the unfinished one in the folder of that name, else the newest unfinished one among its
    siblings with a suffix, else the finished one.

    Args:
        resolved: the whole configuration, in YAML types.

    Raises:
        ValueError: if the run to resume had another configuration; names the fields.
    """
    wanted = _wanted(config)
    text = yaml.safe_dump(resolved, sort_keys=False)
    if resume and (path := _to_resume(wanted)) is not None:
        if _saved_anything(path):
            _check_same(_read_config(path), resolved, path)
            log.info("resuming the run in %s", path)
        else:
            log.info("nothing was saved yet in %s: the run starts from the beginning", path)
            replace_text(path / CONFIG, text)
        return RunFolder(path)
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
        return RunFolder(path)
    raise AssertionError("unreachable")


def stages_begun(config: RunConfig) -> set[str]:
    """The stages of which the run that --resume would continue has a checkpoint; looks, and makes nothing."""
    path = _to_resume(_wanted(config))
    return set() if path is None else {found.parent.name for found in path.glob("checkpoints/*/epoch_*")}


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
    return (path / SUMMARY).exists() or (path / "teacher").exists() or any(path.glob("checkpoints/*/epoch_*"))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        saved = yaml.safe_load((path / CONFIG).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path / CONFIG} is not YAML: {error}") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{path / CONFIG} holds no configuration")
    return saved


def _check_same(saved: dict[str, Any], resolved: dict[str, Any], path: Path) -> None:
    old, new = flatten(saved), flatten(resolved)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and key not in MAY_CHANGE]
    if changed:
        shown = ", ".join(f"{key} (was {old.get(key)!r}, is {new.get(key)!r})" for key in changed[:5])
        raise ValueError(
            f"the run in {path} cannot be resumed with another configuration: {shown}. "
            "Give it the same, or start a new run without --resume"
        )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
