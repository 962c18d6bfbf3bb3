"""What may differ between the configuration of a run and the one that it is resumed with."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    "train.cuda_graphs",
)
"""What may differ when a run is resumed: none of it changes a number, unless images are skipped (`_may_change`)."""

BEFORE = {"adapter": "conv1x1"}
"""Of fields that came later, what runs did that lack them."""

PROCESSES = "processes"
"""What --allow-changed calls the number of processes, which is no field of the configuration."""


def changed_fields(saved: dict[str, Any], resolved: dict[str, Any], allow_changed: Sequence[str] = ()) -> list[str]:
    """Dotted names of what differs between two configurations and is in the way of resuming one with the other."""
    old, new = {**BEFORE, **flatten(saved)}, {**BEFORE, **flatten(resolved)}
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return [key for key in changed if not _among(key, (*_may_change(old, new), *allow_changed))]


def check_same(saved: dict[str, Any], resolved: dict[str, Any], path: Path, allow_changed: Sequence[str]) -> None:
    """
    Raises:
        ValueError: if the run in `path` cannot be resumed with this configuration; names the fields.
    """
    if changed := changed_fields(saved, resolved, allow_changed):
        old, new = flatten(saved), flatten(resolved)
        shown = ", ".join(f"{key} (was {old.get(key)!r}, is {new.get(key)!r})" for key in changed[:5])
        raise ValueError(
            f"the run in {path} cannot be resumed with another configuration: {shown}. Give it the same, start a new "
            f"run without --resume, or say --allow-changed {' '.join(changed[:5])}"
        )


def check_names(allow_changed: Sequence[str], resolved: dict[str, Any], resume: bool) -> None:
    """
    Raises:
        ValueError: for a name of --allow-changed that is no field or group, and without --resume.
    """
    if allow_changed and not resume:
        raise ValueError("--allow-changed means nothing without --resume")
    known = [*flatten(resolved), PROCESSES]
    for name in allow_changed:
        if name != PROCESSES and not any(_among(key, (name,)) for key in known):
            close = difflib.get_close_matches(name, known, n=3) or list(resolved)
            raise ValueError(f"--allow-changed {name}: there is no such field; allowed: {', '.join(close)}")


def _may_change(*configurations: dict[str, Any]) -> tuple[str, ...]:
    """What may differ between these flat configurations.

    In memory an image that cannot be read is dropped, streamed another takes its place: where images are skipped, the
    two train on different batches.
    """
    if all(values.get("data.on_corrupt", "error") == "error" for values in configurations):
        return MAY_CHANGE
    return tuple(name for name in MAY_CHANGE if name != IN_MEMORY)


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
