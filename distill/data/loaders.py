"""Loaders whose order and augmentation depend on (seed, epoch, index) only.

The sampler yields (epoch, index) pairs, so the epoch reaches a worker with each sample and persistent workers cannot
be left behind. Accelerate keeps this sampler (it replaces only torch's RandomSampler) and calls `set_epoch` on it
before each pass. Without Accelerate call `loader.sampler.set_epoch(epoch)`: nothing advances by itself.

To resume within an epoch, first `loader.set_epoch(epoch)` on the prepared loader, then `skip_first_batches`: with
several processes Accelerate's own call no longer reaches the sampler through the skipping one.
"""

import os
from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from distill.data.datasets import ImageSet
from distill.data.seeds import check_seed

MOST_WORKERS = 8


class EpochSampler(Sampler[tuple[int, int]]):
    """A permutation of 0 .. length - 1 for each epoch, as (epoch, index) pairs, from (seed, epoch) alone."""

    def __init__(self, length: int, seed: int):
        self._length, self._seed = length, check_seed(seed)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; passes repeat until another is chosen."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch  # one epoch for the whole pass, even if the next is chosen before it ends
        order = np.random.default_rng((self._seed, epoch)).permutation(self._length)
        return ((epoch, index) for index in order.tolist())


def train_loader(
    dataset: ImageSet, batch_size: int, *, seed: int, workers: int | None = None
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Shuffled batches of images (B, C, H, W) and labels (B,); the last, incomplete batch is dropped.

    Args:
        dataset: training images.
        batch_size: images per process and batch.
        seed: of the order, from 0 up; the same in every process.
        workers: loader processes; None: 0 when the images are in memory, else the number of CPUs, at most 8.
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


def _loader(
    dataset: ImageSet, batch_size: int, workers: int | None, *, sampler: EpochSampler | None, drop_last: bool
) -> DataLoader[tuple[Tensor, Tensor]]:
    if workers is None:
        workers = 0 if dataset.in_memory else min(MOST_WORKERS, _cpus())
    if workers < 0:
        raise ValueError(f"workers is {workers}; allowed: integers from 0 up")
    return DataLoader(
        cast(Dataset[tuple[Tensor, Tensor]], dataset),  # batches hold tensors of labels, items plain integers
        batch_size,
        sampler=sampler,
        drop_last=drop_last,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # each pass draws a worker seed: from here, not from the global generator
    )


def _cpus() -> int:
    # The CPUs that this process may use, as torch counts them before it warns of too many workers; Linux only.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; allowed: integers from 1 up")
