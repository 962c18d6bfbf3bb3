"""Loaders whose order and augmentation depend on (seed, epoch, index) only.

The sampler yields (epoch, index) pairs, so the epoch reaches a worker with each sample and persistent workers cannot
be left behind. Accelerate keeps this sampler (it replaces only torch's RandomSampler) and calls `set_epoch` on it
before each pass. Without Accelerate call `loader.sampler.set_epoch(epoch)`: nothing advances by itself.

To resume within an epoch, first `loader.set_epoch(epoch)`, then `skip_batches(loader, n)`: Accelerate's own skipping
loader no longer reaches the sampler with several processes, and starts other workers.
"""

import atexit
import multiprocessing
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from distill.data.image_set import ImageSet
from distill.data.seeds import check_seed
from distill.processes import cpus_of_a_process

MOST_WORKERS = 8


class EpochSampler(Sampler[tuple[int, int]]):
    """A permutation of 0 .. length - 1 for each epoch, as (epoch, index) pairs, from (seed, epoch) alone."""

    def __init__(self, length: int, seed: int):
        self._length, self._seed = length, check_seed(seed)
        self.epoch = 0
        self._first = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; passes repeat until another is chosen."""
        self.epoch = epoch

    def start_at(self, first: int) -> None:
        """Leave the first samples out of the next pass; those after it are whole again."""
        self._first = first

    def order(self, epoch: int) -> np.ndarray:
        """Indices of the images in the order of an epoch, int64 (length,)."""
        return np.random.default_rng((self._seed, epoch)).permutation(self._length)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch  # one epoch for the whole pass, even if the next is chosen before it ends
        first, self._first = self._first, 0
        return ((epoch, index) for index in self.order(epoch)[first:].tolist())


def train_loader(
    dataset: ImageSet, batch_size: int, *, seed: int, workers: int | None = None
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Shuffled batches of images (B, C, H, W) and labels (B,); the last, incomplete batch is dropped.

    Args:
        dataset: training images.
        batch_size: images per process and batch.
        seed: of the order, from 0 up; the same in every process.
        workers: loader processes; None: 0 when the images are in memory, else the number of CPUs for each process of
            this machine, at most 8.
    """
    _check_batch_size(batch_size)
    if len(dataset) < batch_size:
        raise ValueError(f"batch_size is {batch_size}; the {len(dataset)} training images allow 1 to {len(dataset)}")
    sampler = EpochSampler(len(dataset), seed)
    return _loader(dataset, batch_size, workers, sampler=sampler, drop_last=True)


def eval_loader(dataset: ImageSet, batch_size: int, *, workers: int | None = None) -> DataLoader[tuple[Tensor, Tensor]]:
    """All images once, in order, in batches (B, C, H, W) with labels (B,); the last batch may be smaller."""
    _check_batch_size(batch_size)
    return _loader(dataset, batch_size, workers, sampler=None, drop_last=False)


def sample_loader(dataset: ImageSet, images: int, batch_size: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """Some images of a set, evenly spread over it, as `eval_loader` gives all of them; the process itself reads them.

    Args:
        images: how many, at most all.
    """
    _check_batch_size(batch_size)
    count = min(images, len(dataset))
    chosen = [i * len(dataset) // count for i in range(count)]
    return _loader(dataset, batch_size, 0, sampler=None, drop_last=False, only=chosen)


def prepare_loader(accelerator: Accelerator, loader: DataLoader) -> Any:
    """The loader as Accelerate wants it: each process gets batches of its own, on its device.

    Returns:
        a loader with `len` (batches of one process) and `set_epoch`.
    """
    return accelerator.prepare(loader)


class RemainingBatches:
    """A pass over a training loader that starts after its first batches, whose images are not read.

    Args:
        loader: prepared or not.
        skipped: batches of each process that are left out, 0 to len(loader).
    """

    def __init__(self, loader: Any, skipped: int):
        if not 0 <= skipped <= len(loader):
            raise ValueError(f"skipped is {skipped}; the {len(loader)} batches of a pass allow 0 to {len(loader)}")
        self._loader, self._skipped = loader, skipped

    def __len__(self) -> int:
        return len(self._loader) - self._skipped

    def __iter__(self) -> Iterator[Any]:
        sampler, batch_size, processes = _plan(self._loader)
        assert isinstance(sampler, EpochSampler), "only training loaders are resumed"
        # A process takes every n-th batch, so a whole round of batches less leaves everyone's turn as it was.
        sampler.start_at(self._skipped * batch_size * processes)
        yield from self._loader


def skip_batches(loader: Any, skipped: int) -> RemainingBatches:
    """What is left of the loader's current epoch after its first `skipped` batches (of each process).

    The batches are those of an uninterrupted pass. The loader is unchanged: its next pass, for which an epoch must be
    set again, is whole.

    Raises:
        ValueError: for more batches than there are.
    """
    return RemainingBatches(loader, skipped)


def sample_indices(loader: Any, epoch: int, batch: int, rank: int, processes: int) -> list[int]:
    """Which images of the set make up one batch of one process, for error reports.

    Args:
        loader: a training or evaluation loader, prepared or not.
        batch: counted from the start of the epoch, from 0 up, on each process.
        rank: which process.
        processes: how many there are.
    """
    sampler, batch_size, _ = _plan(loader)
    first = (batch * processes + rank) * batch_size
    if isinstance(sampler, EpochSampler):
        return sampler.order(epoch)[first : first + batch_size].tolist()
    count = len(loader.dataset)
    if processes == 1:
        return list(range(first, min(first + batch_size, count)))
    return [index % count for index in range(first, first + batch_size)]  # Accelerate evens batches from the start


def _plan(loader: Any) -> tuple[Any, int, int]:
    """Sampler, images in a batch of a process, and processes that share a pass, of a loader prepared or not."""
    shard = loader.batch_sampler
    batches = getattr(shard, "batch_sampler", shard)  # Accelerate puts a sampler of shards around ours
    return batches.sampler, batches.batch_size, getattr(shard, "num_processes", 1)


def _loader(
    dataset: ImageSet,
    batch_size: int,
    workers: int | None,
    *,
    sampler: EpochSampler | None,
    drop_last: bool,
    only: list[int] | None = None,
) -> DataLoader[tuple[Tensor, Tensor]]:
    if workers is None:
        workers = 0 if dataset.in_memory else min(MOST_WORKERS, cpus_of_a_process())
    if workers < 0:
        raise ValueError(f"workers is {workers}; allowed: integers from 0 up")
    images = dataset if only is None else Subset(dataset, only)
    return DataLoader(
        cast(Dataset[tuple[Tensor, Tensor]], images),  # batches hold tensors of labels, items plain integers
        batch_size,
        sampler=sampler,
        drop_last=drop_last,
        collate_fn=dataset.collate,
        num_workers=workers,
        worker_init_fn=_stay_until_told,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # each pass draws a worker seed: from here, not from the global generator
    )


def _stay_until_told(worker: int) -> None:
    """In a loader process: launchers and clusters send SIGTERM to all of a job at once, and the run saves first.

    It ends when the run closes its loaders, or is gone (torch looks every few seconds).
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register  # hooks run in reverse order: after torch's own end of loaders, before multiprocessing's
def _end_loader_processes() -> None:
    """At the end of a run whose loaders something still holds, such as the traceback of an error that nobody caught.

    `multiprocessing` ends them with SIGTERM, which they ignore, and then waits for them: for ever.
    """
    left = [child for child in multiprocessing.active_children() if child.daemon and _ignores_sigterm(child.pid)]
    if left and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise that a process was killed
    for process in left:
        process.kill()


def _ignores_sigterm(pid: int | None) -> bool:
    """As loader processes do; pools and other daemons end by themselves. Linux only: elsewhere nobody says."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    found = re.search(r"^SigIgn:\s*([0-9a-f]+)", status, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> (signal.SIGTERM - 1) & 1)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; allowed: integers from 1 up")
