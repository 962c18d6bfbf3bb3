"""Which folder a command gets: that of a new run, which takes no other's place, or of the one that --resume means."""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distill.checkpoints import Checkpoints
from distill.config import RunConfig
from distill.config_changes import check_names, check_same, flatten
from distill.runs import CONFIG, SUMMARY, RunFolder
from models.io import replace_text

log = logging.getLogger(__name__)


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
    check_names(allow_changed, resolved, resume)
    wanted = _wanted(config)
    text = yaml.safe_dump(resolved, sort_keys=False)
    if resume and (path := _to_resume(wanted)) is not None:
        folder = RunFolder(path).lock()
        if _saved_anything(path):
            saved = _read_config(path)
            check_same(saved, resolved, path, allow_changed)
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
