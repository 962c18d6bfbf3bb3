"""Images that cannot be read, and loader processes that die."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from distill.data.everywhere import from_all, place
from distill.data.files import StoredImage
from models.images import UnreadableImage

if TYPE_CHECKING:
    from distill.data.image_set import ImageSet

log = logging.getLogger(__name__)

READERS = 8  # threads of the check of held-out images: Pillow decodes without holding Python's lock


class Unreadable:
    """Which images of a split could not be read, known to the loader's processes, too.

    Args:
        files: all images of the split.
    """

    def __init__(self, files: Sequence[StoredImage]):
        self._files = files
        self._marks = torch.zeros(len(files), dtype=torch.uint8).share_memory_()

    def __contains__(self, index: int) -> bool:
        return bool(self._marks[index])

    def add(self, index: int, error: UnreadableImage | str) -> None:
        """Leaves out an image for the rest of the run; says so once."""
        if index not in self:
            self._marks[index] = 1
            log.warning("an image is left out: %s", error)

    def kept(self) -> np.ndarray:
        """Indices of the other images, int64.

        Raises:
            ValueError: if there are none.
        """
        kept = np.flatnonzero(self._marks.numpy() == 0)
        if len(kept) == 0:
            raise ValueError(f"none of the {len(self._files)} images can be read, the first is {self._files[0]}")
        return kept

    def recall(self, names: Collection[str]) -> None:
        """Leaves out, without a word, what was left out before an interruption; names of other images are none here."""
        wanted = set(names)
        if wanted:
            self._marks[[index for index, file in enumerate(self._files) if str(file) in wanted]] = 1

    @property
    def names(self) -> tuple[str, ...]:
        """The images that were left out so far, in the order of the split."""
        return tuple(str(self._files[index]) for index in self._marks.nonzero().flatten().tolist())


def find_unreadable(files: Sequence[StoredImage], mode: str) -> Unreadable:
    """Decodes every image once, each on one of the processes: a header says nothing about a truncated file."""
    found, (rank, processes) = Unreadable(files), place()

    def check(index: int) -> UnreadableImage | None:
        try:
            files[index].open(mode)
        except UnreadableImage as error:
            return error
        return None

    own = range(rank, len(files), processes)
    with ThreadPoolExecutor(READERS) as pool:
        errors = {index: str(error) for index, error in zip(own, pool.map(check, own), strict=True) if error}
    for index, text in sorted(item for of_process in from_all(errors) for item in of_process.items()):
        found.add(index, text)
    return found


def skipped_images(accelerator: Accelerator, *image_sets: ImageSet) -> tuple[str, ...]:
    """Names of the images that any process has left out of these sets so far, sorted; all processes must call this."""
    own = [name for image_set in image_sets for name in image_set.skipped]
    return tuple(sorted(set(gather_object(own))))


class LoaderProcessDied(RuntimeError):
    """A process that loads images has ended by itself."""


@contextmanager
def loader_errors_explained() -> Iterator[None]:
    """Turns torch's errors about loader processes into ones that say what happened, and what to do.

    torch raises that of a dead process wherever the main process happens to be, from a signal handler: wrap the whole
    training in this.

    Raises:
        LoaderProcessDied: names the process, and the likely cause.
        UnreadableImage: names the image, without the traceback of the process that torch puts into the text.
    """
    try:
        yield
    except UnreadableImage as error:
        raise UnreadableImage(str(error).rpartition("UnreadableImage: ")[2].strip()) from error
    except RuntimeError as error:
        died = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
        if died is None:
            raise
        raise LoaderProcessDied(
            _DIED.format(f" (pid {died[1].strip()})", str(error).strip().splitlines()[0])
        ) from error
    except (EOFError, OSError) as error:
        # a batch that the process had promised cannot be fetched any more: torch notices its death only later
        if not any(frame.name == "_try_get_data" for frame in traceback.extract_tb(error.__traceback__)):
            raise
        raise LoaderProcessDied(_DIED.format("", str(error) or type(error).__name__)) from error


_DIED = (
    "a process that loads images died{}, most likely because the machine ran out of memory (or of shared memory, "
    "/dev/shm, in a container): use fewer data.workers, 0 for none, or a smaller batch_size. torch says: {}"
)
