"""Which folder a command gets: that of a new run, which takes no other's place, or of the one that --resume means."""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distill.checkpoints import Checkpoints
from distill.config_changes import changed_fields, check_names, check_same, flatten
from distill.runs import CONFIG, LOCK, SUMMARY, LockedError, RunFolder
from distill.tracking import FOLDER as TRACKING
from distill.train_config import RunConfig
from models.io import replace_text

log = logging.getLogger(__name__)


def open_run(config: RunConfig, resume: bool, resolved: dict[str, Any], allow_changed: Sequence[str] = ()) -> RunFolder:
    """Makes the folder of a new run, or finds the one to resume. Call it on the main process only.

    Which run is resumed of several, in the folder of that name and its siblings with a suffix, says `_to_resume`.

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
    if resume and (path := _to_resume(wanted, resolved, allow_changed)) is not None:
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
        _name_others(path, wanted)
        return folder
    if resume:
        log.info("nothing to resume in %s: the run starts from the beginning", wanted)
    for number in itertools.count(1):
        path = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        path.mkdir(parents=True, exist_ok=True)
        if (claimed := _claimed(path, text)) is not None:
            if path != wanted:
                log.info("%s holds a run already: this one is kept in %s", wanted, path)
            return claimed
    raise AssertionError("unreachable")


def _claimed(path: Path, text: str) -> RunFolder | None:
    """The folder, locked, with the configuration of a new run; None where it holds a run or another process has it."""
    folder = RunFolder(path)
    if (path / CONFIG).exists():
        return folder if _taken_over(folder, text) else None
    try:
        folder.lock()
        with (path / CONFIG).open("x") as file:  # without locks, too, one of several that start at once gets the name
            file.write(text)
    except (LockedError, FileExistsError):
        return None
    return folder


def _taken_over(folder: RunFolder, text: str) -> bool:
    """Locks the folder of a run that ended before it had saved anything, for a new one; False where it is none."""
    if not (_only_begun(folder.path) and folder.ended_here()):
        return False
    try:
        folder.lock()
    except (LockedError, PermissionError):  # it has not ended; it is another user's
        return False
    if not (folder.locked and _only_begun(folder.path)):
        return False
    log.info("the run in %s ended before it had saved anything: the new one takes its place", folder.path)
    shutil.rmtree(folder.path / TRACKING, ignore_errors=True)  # trackers would go on in that run
    replace_text(folder.path / CONFIG, text)
    return True


def _only_begun(path: Path) -> bool:
    """Whether there is nothing but what each run makes before it trains."""
    return {entry.name for entry in path.iterdir()} <= {CONFIG, LOCK, TRACKING}


def stages_begun(config: RunConfig, resolved: dict[str, Any], allow_changed: Sequence[str] = ()) -> set[str]:
    """The stages of which the run that --resume would continue has a whole checkpoint; looks, and makes nothing."""
    path = _to_resume(_wanted(config), resolved, allow_changed)
    stages = [] if path is None else [found for found in RunFolder(path).checkpoints.glob("*") if found.is_dir()]
    return {found.name for found in stages if Checkpoints(found).newest(say=False) is not None}


def _wanted(config: RunConfig) -> Path:
    return Path(config.dir) if config.dir is not None else Path("runs") / config.name


def _runs(wanted: Path) -> list[Path]:
    """The folder of that name and its siblings with a suffix, as far as there are runs in them."""
    siblings = [p for p in wanted.parent.glob(f"{wanted.name}-*") if p.name[len(wanted.name) + 1 :].isdigit()]
    return [path for path in (wanted, *siblings) if (path / CONFIG).exists()]


def _to_resume(wanted: Path, resolved: dict[str, Any], allow_changed: Sequence[str]) -> Path | None:
    """An unfinished run before a finished one, one of this configuration before others, one that has saved something
    before one that has not, and of those the newest.

    It is the run that this command has worked on, whatever number its folder got: a job that a cluster starts again
    knows the name alone. One that has saved nothing counts where it alone has this configuration, because the others
    could not be resumed with it.
    """

    def rank(path: Path) -> tuple[bool, bool, bool, float]:
        return not _finished(path), _fits(path, resolved, allow_changed), _saved_anything(path), _last_saved(path)

    return max(_runs(wanted), key=rank, default=None)


def _name_others(path: Path, wanted: Path) -> None:
    """Warns of runs that --resume could have meant, too."""
    others = [run for run in _runs(wanted) if run != path and not _finished(run) and _saved_anything(run)]
    if others:
        log.warning(
            "warning: more than one run of that name is unfinished. The one in %s is taken, the newest of this "
            "configuration; to resume another, give its folder to --run.dir: %s",
            path,
            ", ".join(f"{run} (under another name)" if run == wanted else str(run) for run in others),
        )


def _finished(path: Path) -> bool:
    return (path / SUMMARY).exists()


def _fits(path: Path, resolved: dict[str, Any], allow_changed: Sequence[str]) -> bool:
    """Whether a run can be resumed with this configuration."""
    try:
        return not changed_fields(_read_config(path), resolved, allow_changed)
    except ValueError:  # it is said where that run is the one to resume
        return False


def _saved(path: Path) -> list[Path]:
    """What a run has left besides its configuration."""
    left = [path / SUMMARY, path / "teacher", *RunFolder(path).checkpoints.glob("*/epoch_*")]
    return [found for found in left if found.exists()]


def _saved_anything(path: Path) -> bool:
    return bool(_saved(path))


def _last_saved(path: Path) -> float:
    """When, in seconds; of a run that has saved nothing when it began."""
    times = []
    for found in _saved(path) or [path / CONFIG]:
        with contextlib.suppress(FileNotFoundError):  # another process may prune its checkpoints now
            times.append(found.stat().st_mtime)
    return max(times, default=0.0)


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
