"""Recordings of event cameras on disk, made into files of frames by SpikingJelly's readers.

SpikingJelly's own preparation takes nothing but the official archives (their MD5 is checked, another file of the same
name is deleted, missing ones are downloaded). Here data is found first, as archive, unpacked or as SpikingJelly left
it; its readers then parse the recordings (`create_raw_from_extracted`) and integrate the frames.

What they write, a folder with events_np/ and frames_number_T_split_by_number/, each npz files without pickles, appears
in one move: an interrupted preparation leaves nothing half done. Machines that share a folder take turns, and find what
another one has done.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import logging
import struct
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from spikingjelly import configure

from distill.data.event_counts import FRAMES, RAW, check_frames, check_recordings, count_files, note_recordings
from distill.data.locks import alone_in

log = logging.getLogger(__name__)

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True, kw_only=True)
class Recordings:
    """One of SpikingJelly's data sets.

    Args:
        title: what people call it.
        reader: SpikingJelly's module and class in `spikingjelly.datasets`.
        parts: the folders that it is when it is unpacked.
        ending: of the files of recordings in them.
        has_split: whether training and test recordings are told apart by the set itself.
    """

    title: str
    reader: str
    parts: tuple[str, ...]
    ending: str
    has_split: bool

    @functools.cached_property
    def reader_class(self) -> Any:
        module, name = self.reader.split(".")
        return getattr(_spikingjelly_module(module), name)


SETS = {
    "nmnist": Recordings(
        title="N-MNIST", reader="n_mnist.NMNIST", parts=("Train", "Test"), ending=".bin", has_split=True
    ),
    "cifar10_dvs": Recordings(
        title="CIFAR10-DVS", reader="cifar10_dvs.CIFAR10DVS", parts=CIFAR10, ending=".aedat", has_split=False
    ),
    "dvs128_gesture": Recordings(
        title="DVS128 Gesture",
        reader="dvs128_gesture.DVS128Gesture",
        parts=("DvsGesture",),
        ending=".aedat",
        has_split=True,
    ),
}


def _spikingjelly_module(name: str) -> Any:
    """A module of `spikingjelly.datasets` without the package's own imports, at the first use: it takes a second.

    The package imports torchaudio, for data that is not ours, and torchaudio refuses to be imported where it was built
    for another CUDA than torch.
    """
    package = "spikingjelly.datasets"
    if package in sys.modules:
        return importlib.import_module(f"{package}.{name}")
    spec = importlib.util.find_spec(package)
    assert spec is not None
    sys.modules[package] = importlib.util.module_from_spec(spec)  # which knows its folder and has not been run
    try:
        return importlib.import_module(f"{package}.{name}")
    finally:
        del sys.modules[package]  # whoever imports the package gets the whole of it


def open_frames(data: Recordings, root: Path, cache: Path | None, frames: int) -> list[Any]:
    """SpikingJelly's data sets of frames, prepared where they are not there yet.

    Args:
        root: a folder with the recordings or their archives, or one archive (tar, zip).
        cache: a folder for what is prepared; None: the root itself, or the folder of the archive.
        frames: of one recording, cut so that each holds as many events (the last one what is left over, too).

    Returns:
        two torchvision ``DatasetFolder`` (training, test), or one where the set has no split.

    Raises:
        ValueError: if the data is not there, an archive is not safe, the cache cannot be written, or what was prepared
            is not of all the recordings that are there.
    """
    if not root.exists():
        raise ValueError(f"data.root: there is no {root}; {_how_to_get(data)}")
    splits: list[dict[str, Any]] = [{"train": True}, {"train": False}] if data.has_split else [{}]
    options = {"data_type": "frame", "frames_number": frames, "split_by": "number"}
    with _one_process_first():
        folder = _folder_of(root, cache)
        for half in (root / f"{RAW}.building", folder / f"{RAW}.building"):
            if half.exists():
                raise ValueError(
                    f"data.root: SpikingJelly was interrupted in {half.parent}: remove {RAW}/ and {half.name}"
                )
        if not (folder / RAW).is_dir():
            _prepare_raw(data, root, folder)
        if (found := _unpacked(data, root)) is not None:
            check_recordings(folder, found, _recordings(data, found))
        name = FRAMES.format(frames)
        if not (folder / name).is_dir():
            log.info("%s: cutting the recordings into %d frames each, kept in %s", data.title, frames, folder / name)
            with _written_aside(folder, name) as work:
                if work is not None:
                    (work / RAW).symlink_to((folder / RAW).resolve(), target_is_directory=True)
                    with _reading(data, root):
                        data.reader_class(str(work), **splits[0], **options)
                    _move(work / name, folder / name)
    try:
        opened = [data.reader_class(str(folder), **split, **options) for split in splits]
    except RuntimeError as error:  # SpikingJelly's own preparation was interrupted in this folder
        raise ValueError(f"data.root: {error}") from error
    check_frames(folder, folder / name, sum(len(part.samples) for part in opened))
    return opened


def _folder_of(root: Path, cache: Path | None) -> Path:
    """Where what is prepared is kept; of its own for each root in a cache."""
    if cache is None and root.is_dir():
        return root
    key = [str(root.resolve())]
    if root.is_file():  # another archive of the same name is other data
        key += [str(root.stat().st_size), str(root.stat().st_mtime_ns)]
    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:8]
    return (cache or root.parent) / f"{root.name.split('.')[0]}-{digest}"


def _prepare_raw(data: Recordings, root: Path, folder: Path) -> None:
    """Makes events_np/: a file of events for each recording."""
    if root.is_dir() and (root / RAW).is_dir():
        with _written_aside(folder, RAW) as work:
            if work is not None:
                (folder / RAW).symlink_to((root / RAW).resolve(), target_is_directory=True)
        return
    found = _unpacked(data, root)
    archives = [] if found else _archives(data, root)
    with _written_aside(folder, RAW) as work:
        if work is None:
            return
        for archive in archives:
            log.info("%s: unpacking %s", data.title, archive)
            _unpack(archive, work / "unpacked")
        found = found or _unpacked(data, work / "unpacked")
        if found is None:
            names = ", ".join(f"{part}/" for part in data.parts)
            raise ValueError(f"data.root: {root} holds no {data.title}: there is no {names} in it; {_how_to_get(data)}")
        log.info("%s: reading the recordings, kept in %s", data.title, folder / RAW)
        source, raw = work / "source", work / RAW
        source.mkdir()
        raw.mkdir()
        for part in data.parts:  # nothing but these: the readers take any other folder for a class
            (source / part).symlink_to((found / part).resolve(), target_is_directory=True)
        with _reading(data, root):
            data.reader_class.create_raw_from_extracted(source, raw)
        if not archives:  # an archive is known by its size and date
            note_recordings(folder, _recordings(data, found))
        _move(raw, folder / RAW)


def _unpacked(data: Recordings, root: Path) -> Path | None:
    """The folder with the set's parts: the root, its extract/ or another folder in it; None where there is none."""
    if not root.is_dir():
        return None
    inside = sorted(child for child in root.iterdir() if child.is_dir())
    for folder in (root, *inside):
        if all((folder / part).is_dir() for part in data.parts):
            return folder
    return None


def _recordings(data: Recordings, folder: Path) -> int:
    """How many there are in the set's parts in a folder."""
    return count_files((folder / part for part in data.parts), (data.ending,))


def _archives(data: Recordings, root: Path) -> list[Path]:
    """The root, if it is an archive, or the official ones in it or in its download/."""
    if root.is_file():
        return [root]
    names = [name for name, *_ in _resources(data) if name.endswith((".zip", ".tar.gz"))]
    for folder in (root, root / "download"):
        found = [folder / name for name in names if (folder / name).is_file()]
        if len(found) == len(names):
            return found
    parts, files = ", ".join(f"{part}/" for part in data.parts), ", ".join(names)
    raise ValueError(
        f"data.root: no {data.title} in {root}: looked for {RAW}/, for {parts} (also one folder deeper) and for "
        f"{files} (also in download/); {_how_to_get(data)}"
    )


def _resources(data: Recordings) -> list[tuple[str, str, str]]:
    """File, address and MD5 of each official file, as SpikingJelly lists them."""
    return data.reader_class.resource_url_md5()


def _how_to_get(data: Recordings) -> str:
    files: dict[str, list[str]] = {}
    for name, url, _ in _resources(data):
        files.setdefault(url, []).append(name)
    return "get " + "; ".join(f"{', '.join(names)} from {url}" for url, names in files.items())


def _unpack(archive: Path, folder: Path) -> None:
    """Unpacks a tar or zip; none of its names gets out of the folder."""
    try:
        if tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
        elif zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(folder)  # which drops .. and leading slashes by itself
        else:
            raise ValueError(f"data.root: {archive} is neither a folder nor a tar or zip")
    except tarfile.FilterError as error:
        raise ValueError(f"data.root: {archive} is not safe to unpack: {error}") from error
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"data.root: {archive} cannot be unpacked: {error}") from error


@contextlib.contextmanager
def _written_aside(folder: Path, name: str) -> Iterator[Path | None]:
    """A new folder inside of `folder`, which is made where missing; it is gone afterwards.

    None where the turn of another process has left what it is for, the folder of this name.
    """
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(alone_in(folder))
            work = held.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix=".preparing-"))
        except OSError as error:
            raise ValueError(
                f"data.cache: {folder} cannot be written ({error.strerror}): say where frames are kept"
            ) from error
        yield None if (folder / name).is_dir() else Path(work)


@contextlib.contextmanager
def _reading(data: Recordings, root: Path) -> Iterator[None]:
    """SpikingJelly's readers at work: in one thread, with complaints that say what was being read.

    numpy parses the head of each array with `ast`, which several threads break in Python before 3.13 ("AST constructor
    recursion depth mismatch", gh-106905).
    """
    threads = configure.max_threads_number_for_datasets_preprocess
    configure.max_threads_number_for_datasets_preprocess = 1
    try:
        yield
    except (ValueError, IndexError, struct.error) as error:
        raise ValueError(f"data.root: a recording of {data.title} in {root} cannot be read: {error}") from error
    finally:
        configure.max_threads_number_for_datasets_preprocess = threads


def _move(source: Path, target: Path) -> None:
    """Moves a folder into place; where another process was faster, its own stays."""
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _one_process_first() -> contextlib.AbstractContextManager[Any]:
    """Of a launched run the first process of each machine prepares, the others find it done."""
    return PartialState().local_main_process_first() if PartialState._shared_state else contextlib.nullcontext()
