"""How many recordings frames were made of: where some were added since, or taken away, that is an error.

Beside `events_np/`, which holds a file of events for each recording (for each gesture of DVS128 Gesture), lies
`events_np.recordings`, the number of recordings that it was made of; it is missing where SpikingJelly itself, or an
archive, was the source. Each folder of frames has a file for each file of events.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

RAW = "events_np"
NOTE = f"{RAW}.recordings"
FRAMES = "frames_number_{}_split_by_number"


def count_files(folders: Iterable[Path], endings: tuple[str, ...]) -> int:
    """How many files with these endings, in small or capital letters, lie anywhere in some folders."""
    names = (name for folder in folders for _, _, files in os.walk(folder, followlinks=True) for name in files)
    return sum(name.lower().endswith(endings) for name in names)


def note_recordings(folder: Path, count: int) -> None:
    """Keeps how many recordings the events in this folder are made of."""
    (folder / NOTE).write_text(f"{count}\n")


def check_recordings(folder: Path, source: Path, count: int) -> None:
    """
    Args:
        folder: with events_np/, or a link to it, and frames.
        source: of the recordings.
        count: how many there are now.

    Raises:
        ValueError: if the events were made of another number; says what to remove.
    """
    events = (folder / RAW).resolve()
    note = events.with_name(NOTE)
    text = note.read_text().strip() if note.is_file() else ""
    if not text.isdigit() or int(text) == count:
        return
    frames = sorted({path for place in (events.parent, folder) for path in place.glob(FRAMES.format("*"))})
    old = [*dict.fromkeys([events, folder / RAW]), *frames]
    raise ValueError(
        f"data.root: there are {count} recordings in {source}, {events} was made of {text}: remove "
        f"{', '.join(map(str, old))}, which are then made anew"
    )


def check_frames(folder: Path, frames: Path, count: int) -> None:
    """
    Args:
        folder: with events_np/, or a link to it.
        frames: the folder that was cut of it.
        count: how many recordings' frames are there.

    Raises:
        ValueError: if there are more or fewer files of events.
    """
    events = count_files([folder / RAW], (".npz", ".npy"))
    if events != count:
        raise ValueError(
            f"data.root: {folder / RAW} holds the events of {events} recordings, {frames} the frames of {count}: "
            f"remove {frames}, which is then made anew"
        )
