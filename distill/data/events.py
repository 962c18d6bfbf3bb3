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
from distill.data.datasets import MEMORY_BYTES, ImageSet, Splits, spread
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
        counts: np.ndarray = self.load(self.paths[index])
        most = counts.max(initial=0)
        return torch.from_numpy(counts).to(next(d for d, top in _TYPES.items() if most <= top))

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))


_TYPES = {dtype: torch.iinfo(dtype).max for dtype in (torch.uint8, torch.int16, torch.int32)}


def load_events(config: DataConfig, preprocessing: Preprocessing, seed: int, timesteps: int | None) -> Splits:
    """Opens the event data that the config names.

    N-MNIST and DVS128 Gesture are split as published. CIFAR10-DVS has no split: of each class the first 90 % of the
    recordings, by file name, are trained on, which is ``split_to_train_test_set(0.9, ...)`` of SpikingJelly.

    Args:
        preprocessing: input size (2, H, W), and mean and std of a pixel's events in a whole recording.
        seed: of the augmentation; which recordings are held out does not depend on it.
        timesteps: T, frames of a recording; None for their sum, images (B, 2, H, W), as an analogue network sees them.

    Raises:
        ValueError: if the data is not there, or training and test recordings have other classes.
    """
    assert config.root is not None  # checked by the config
    augmented = EventTransform(preprocessing, timesteps, config.event_shift, config.hflip)
    plain = EventTransform(preprocessing, timesteps)
    cache = None if config.cache is None else Path(config.cache)
    found = open_frames(SETS[config.name], Path(config.root), cache, timesteps or 1)
    classes = tuple(found[0].classes)
    if any(tuple(each.classes) != classes for each in found):
        both = " and ".join(str(list(each.classes)) for each in found)
        raise ValueError(f"root: training and test recordings must have the same classes, found {both}")
    samples = [(each, np.array(each.targets)) for each in found]
    if len(found) == 1:
        folder, labels = samples[0]
        first = leading(labels, TRAIN_SHARE)
        chosen = [(folder, labels, np.flatnonzero(first)), (folder, labels, np.flatnonzero(~first))]
    else:
        chosen = [(folder, labels, np.arange(len(labels))) for folder, labels in samples]
    limits = (config.max_train_samples, config.max_eval_samples)
    chosen = [(f, y, kept[spread(y[kept], limit)]) for (f, y, kept), limit in zip(chosen, limits, strict=True)]
    if not all(len(kept) for *_, kept in chosen):
        raise ValueError(f"root: {config.root} holds too few recordings to train on some and hold out others")
    in_memory = config.in_memory
    if in_memory is None:
        pixels = math.prod(found[0].get_H_W())
        recordings = sum(len(kept) for *_, kept in chosen)
        in_memory = recordings * (timesteps or 1) * 2 * pixels <= MEMORY_BYTES
    sets = []
    for (folder, labels, kept), transform in zip(chosen, (augmented, plain), strict=True):
        counts: Any = CountsOnRead(tuple(folder.samples[i][0] for i in kept), folder.loader)
        sets.append(
            ImageSet(
                list(counts) if in_memory else counts,
                labels[kept],
                cast(Transform[Any], transform),  # a set asks its transform for `finish` alone
                seed,
                in_memory,
                None if timesteps is None else stack_frames,
            )
        )
    return Splits(*sets, classes)


def leading(labels: np.ndarray, share: float) -> np.ndarray:
    """Which items are among the first `share` of their class, rounded up; bool (N,)."""
    first = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        first[members[: math.ceil(len(members) * share)]] = True
    return first
