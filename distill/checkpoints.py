"""Checkpoints of a stage: written aside, checked by their hashes, found again, pruned.

Each is a folder `epoch_EEEE` (after so many finished epochs) or `epoch_EEEE_batch_BBBBBBBB` (and so many batches of the
next). Its manifest.json, written last, holds the SHA-256 of each of its files: a checkpoint that was torn by a crash or
a failing disk is recognised, and the one before is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

MANIFEST, UNFINISHED = "manifest.json", "unfinished"


class Checkpoint(NamedTuple):
    """One that is whole; sorted by what was done."""

    epochs: int
    """Finished epochs."""
    batches: int
    """Batches of the epoch that runs, on each process."""
    path: Path


class CheckpointError(OSError):
    """A checkpoint could not be written."""


class IncompleteCheckpointError(CheckpointError):
    """Files that a process has written are not where the main process looks for them."""


class Checkpoints:
    """The checkpoints of one stage of a run.

    Args:
        path: their folder; made at the first save.
        keep: of the newest ones, at least 1; the best and the newest end of an epoch are kept besides.
    """

    def __init__(self, path: Path, keep: int = 2) -> None:
        self.path, self._keep = path, keep
        self._obsolete: list[Path] = []

    def newest(self, say: bool = True, epoch_ends: bool = False) -> Checkpoint | None:
        """The newest whole checkpoint.

        Args:
            say: whether to warn of newer ones that are damaged.
            epoch_ends: whether only those count that were written between two epochs.
        """
        for found in sorted(self._all(), reverse=True):
            if epoch_ends and found.batches:
                continue
            damage = damage_of(found.path)
            if damage is None:
                return found
            if say:
                log.warning("warning: checkpoint %s is damaged (%s): an older one is used", found.path, damage)
        return None

    def save(
        self,
        epochs: int,
        batches: int,
        write: Callable[[Path], None],
        everywhere: Callable[[BaseException | None], None],
        is_main: bool,
        facts: dict[str, Any],
        aside: str,
        needed: Sequence[str],
    ) -> None:
        """Saves the state; every process calls it.

        Args:
            epochs, batches: what is done.
            write: writes this process's files into a folder.
            everywhere: waits for all processes and raises on all if one hands it an error.
            is_main: of this process.
            facts: entries of the manifest; "score" decides which is the best.
            aside: a name that begins with "unfinished", of the folder that is written; the same on all processes and
                another for each save: on network disks a process may still take the last one's name for the checkpoint
                that it has become.
            needed: files that there must be, of all processes.

        Raises:
            CheckpointError: where the disk is full or a file cannot be written; older checkpoints stay as they are.
                What kind of one, `everywhere` decides.
        """
        name = f"epoch_{epochs:04d}" + (f"_batch_{batches:08d}" if batches else "")
        temporary, final = self.path / aside, self.path / name
        steps: list[Callable[[], None]] = [lambda: _make(temporary) if is_main else None, lambda: write(temporary)]
        try:
            for step in steps:
                everywhere(_error_of(step))
            everywhere(_error_of(lambda: self._publish(temporary, final, facts, needed) if is_main else None))
        except CheckpointError:
            if is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _publish(self, temporary: Path, final: Path, facts: dict[str, Any], needed: Sequence[str]) -> None:
        if missing := [name for name in needed if not (temporary / name).is_file()]:
            raise IncompleteCheckpointError(
                f"{', '.join(missing)} is missing in {temporary}: all machines must see the same run.dir"
            )
        # a list of what is in the folder may be older, on network disks, than files of other machines
        files = sorted(
            {path for path in temporary.rglob("*") if path.is_file()} | {temporary / name for name in needed}
        )
        hashes = {str(path.relative_to(temporary)): _sha256(path) for path in files}
        for path in files:
            _flush(path)
        manifest = {**facts, "files": hashes}
        (temporary / MANIFEST).write_text(json.dumps({**manifest, "sha256": _digest(manifest)}, indent=2))
        _flush(temporary / MANIFEST)
        if final.exists():  # a damaged one of that name, or the same state
            shutil.rmtree(final)
        temporary.rename(final)
        _flush(self.path)
        for old in self._obsolete:
            if old != final:
                shutil.rmtree(old)
        self._obsolete.clear()
        self._prune()

    def _prune(self) -> None:
        found = sorted(self._all(), reverse=True)
        scores = {checkpoint: self.facts(checkpoint).get("score") for checkpoint in found}
        # of equal scores the newest
        best = max((c for c in found if scores[c] is not None), key=lambda c: (scores[c], c), default=None)
        # the place where a run goes on whose epochs are divided in another way
        epoch_end = next((c for c in found if not c.batches), None)
        for old in found[self._keep :]:
            if old not in (best, epoch_end):
                shutil.rmtree(old.path)

    def facts(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """What its manifest says; nothing of one that is damaged."""
        try:
            facts = json.loads((checkpoint.path / MANIFEST).read_text())
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}

    def drop_newer(self, used: Checkpoint | None) -> None:
        """Has the next save delete those behind the one that a run goes on from: damaged, or of steps made again.

        Until then nothing is lost where the run is started again as it was.
        """
        self._obsolete = [found.path for found in self._all() if used is None or found > used]

    def drop(self) -> None:
        """Deletes them all: a later stage's have taken their place. On the main process only."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _all(self) -> list[Checkpoint]:
        names = re.compile(r"epoch_(\d+)(?:_batch_(\d+))?")
        found = [(names.fullmatch(path.name), path) for path in self.path.glob("epoch_*") if path.is_dir()]
        return [Checkpoint(int(match[1]), int(match[2] or 0), path) for match, path in found if match]


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint's folder, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        digest, files = manifest.pop("sha256"), manifest["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error!r}"
    if digest != _digest(manifest):
        return f"{MANIFEST} has another checksum than when it was written"
    for name, expected in files.items():
        file = path / name
        if not file.resolve().is_relative_to(path.resolve()):
            return f"{name} is outside of it"
        if not file.is_file():
            return f"{name} is missing"
        if _sha256(file) != expected:
            return f"{name} has another checksum than when it was written"
    return None


def _make(temporary: Path) -> None:
    for old in temporary.parent.glob(f"{UNFINISHED}*"):
        shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir(parents=True)


def _error_of(step: Callable[[], None]) -> BaseException | None:
    """What a step of saving raises: torch says RuntimeError of a full disk, safetensors an error of its own."""
    try:
        step()
    except Exception as error:
        return error
    return None


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Has the disk hold what was written, so that a rename never outlives its files in a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
