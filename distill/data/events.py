"""Event data: recordings of an event camera as frames, a batch (T, B, 2, H, W) for T time steps.

Files are those of `distill.data.event_files`; augmentation is a function of (seed, epoch, index), as that of images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from distill.data.config import DataConfig, Preprocessing
from distill.data.datasets import MEMORY_BYTES, ImageSet, Splits, check_several, most_to_train_on, spread
from distill.data.event_files import SETS, open_frames
from distill.data.event_frames import EventTransform, stack_frames
from distill.data.transforms import Transform

TRAIN_SHARE = 0.9
"""Of each class of a set without a split, as the field does."""


@dataclass(frozen=True)
class CountsOnRead(Sequence[Tensor]):
    """Frames of recordings, each (T, C, h, w), read when they are asked for; whole numbers in as few bytes as serve."""

    paths: tuple[str, ...]
    load: Any
    """SpikingJelly's reader of one file."""

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # slices are not asked for
        try:
            counts: np.ndarray = self.load(self.paths[index])
        except Exception as error:  # NumPy's reader raises many kinds, all with the same meaning here
            raise ValueError(f"cannot read the frames {self.paths[index]}: {error}") from error
        most = counts.max(initial=0)
        return torch.from_numpy(counts).to(next(d for d, top in _TYPES.items() if most <= top))

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))


_TYPES = {dtype: torch.iinfo(dtype).max for dtype in (torch.uint8, torch.int16, torch.int32)}


def load_events(
    config: DataConfig, preprocessing: Preprocessing, seed: int, timesteps: int | None, training: bool = True
) -> Splits:
    """Opens the event data that the config names.

    N-MNIST and DVS128 Gesture are split as published. CIFAR10-DVS has no split: of each class the first 90 % of the
    recordings, by file name, are trained on, which is ``split_to_train_test_set(0.9, ...)`` of SpikingJelly.

    Args:
        preprocessing: input size (2, H, W), and mean and std of a pixel's events in a whole recording.
        seed: of the augmentation; which recordings are held out does not depend on it.
        timesteps: T, frames of a recording; None for their sum, images (B, 2, H, W), as an analogue network sees them.
        training: whether there are recordings to train on; without, none is read.

    Raises:
        ValueError: if the data is not there, or training and test recordings have other classes.
    """
    assert config.root is not None  # checked by the config
    transforms = (
        EventTransform(preprocessing, timesteps, config.event_shift, config.hflip),
        EventTransform(preprocessing, timesteps),
    )
    cache = None if config.cache is None else Path(config.cache)
    folders = open_frames(SETS[config.name], Path(config.root), cache, timesteps or 1)
    classes = tuple(folders[0].classes)
    if any(tuple(folder.classes) != classes for folder in folders):
        both = " and ".join(str(list(folder.classes)) for folder in folders)
        raise ValueError(f"data.root: training and test recordings must have the same classes, found {both}")
    check_several(classes, f"data.root: {config.root}")
    train, held_out = _parts(folders, config, training)
    in_memory = config.in_memory
    if in_memory is None:
        pixels = math.prod(folders[0].get_H_W())
        in_memory = (len(train.labels) + len(held_out.labels)) * (timesteps or 1) * 2 * pixels <= MEMORY_BYTES
    collate = None if timesteps is None else stack_frames

    def image_set(part: _Part, transform: EventTransform) -> ImageSet:
        images: Any = list(part.counts) if in_memory else part.counts
        # a set asks its transform for `finish` alone
        return ImageSet(
            images, part.labels, cast(Transform[Any], transform), seed, in_memory, collate, names=part.counts.paths
        )

    return Splits(image_set(train, transforms[0]), image_set(held_out, transforms[1]), classes)


@dataclass(frozen=True)
class _Part:
    """The recordings to train on, or those held out."""

    counts: CountsOnRead
    labels: np.ndarray


def _parts(folders: list[Any], config: DataConfig, training: bool) -> list[_Part]:
    """What to train on and what to hold out, of the set's own two parts or of its only one."""
    labels = [np.array(folder.targets) for folder in folders]
    if len(folders) == 1:
        first = leading(labels[0], TRAIN_SHARE)
        folders, labels, members = folders * 2, labels * 2, [np.flatnonzero(first), np.flatnonzero(~first)]
    else:
        members = [np.arange(len(own)) for own in labels]
    parts = []
    limits = (most_to_train_on(config, training), config.max_eval_samples)
    for folder, own, kept, limit in zip(folders, labels, members, limits, strict=True):
        kept = kept[spread(own[kept], limit)]
        if not len(kept) and limit != 0:
            raise ValueError(f"data.root: {config.root} holds too few recordings to train on some and hold out others")
        parts.append(_Part(CountsOnRead(tuple(folder.samples[i][0] for i in kept), folder.loader), own[kept]))
    return parts


def leading(labels: np.ndarray, share: float) -> np.ndarray:
    """Which items are among the first `share` of their class, rounded up; bool (N,)."""
    first = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        first[members[: math.ceil(len(members) * share)]] = True
    return first
