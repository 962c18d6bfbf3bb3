"""The folder of a run: what is written where, a name of its own, and how an interrupted run is found again.

config.yaml     the resolved configuration        checkpoints/   what --resume continues from
metrics.jsonl   one JSON object an epoch          teacher/       a teacher trained on the spot
summary.json    the results                       student/       the spiking network
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from distill.config import RunConfig

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

    def drop_metrics(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drops the lines of epochs that no checkpoint holds: they are trained again."""
        path = self.path / METRICS
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if line and keep(json.loads(line))]
            replace_text(path, "".join(line + "\n" for line in lines))

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


def open_run(config: RunConfig, resume: bool, resolved: dict[str, Any]) -> RunFolder:
    """Makes the folder of a new run, or finds the one to resume. Call it on the main process only.

    Args:
        resolved: the whole configuration, in YAML types.

    Raises:
        ValueError: if the run to resume had another configuration; names the fields.
    """
    wanted = Path(config.dir) if config.dir is not None else Path("runs") / config.name
    taken = [path for path in _with_suffixes(wanted) if (path / CONFIG).exists()]
    if resume and taken:
        path = taken[-1]
        _check_same(yaml.safe_load((path / CONFIG).read_text()), resolved, path)
        log.info("resuming the run in %s", path)
        return RunFolder(path)
    if resume:
        log.info("nothing to resume in %s: the run starts from the beginning", wanted)
    path = wanted
    if taken:
        path = next(p for p in _suffixed(wanted, 2 + len(taken) ** 2) if not (p / CONFIG).exists())
        log.info("%s holds a run already: this one is kept in %s", wanted, path)
    path.mkdir(parents=True, exist_ok=True)
    replace_text(path / CONFIG, yaml.safe_dump(resolved, sort_keys=False))
    return RunFolder(path)


def _with_suffixes(path: Path) -> list[Path]:
    """The folder and those with a suffix, in the order in which runs take them."""
    numbered = [
        (int(n), p) for p in path.parent.glob(f"{path.name}-*") if (n := p.name[len(path.name) + 1 :]).isdigit()
    ]
    return [path, *[p for _, p in sorted(numbered)]]


def _suffixed(path: Path, limit: int) -> list[Path]:
    return [path, *[path.with_name(f"{path.name}-{n}") for n in range(2, limit + 3)]]


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


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one move, so that a crash never leaves half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
