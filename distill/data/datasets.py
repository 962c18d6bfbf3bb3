"""The images of a run as map-style datasets: a training and a held-out set with the same classes."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from distill.data.config import DataConfig, Preprocessing
from distill.data.digits import CLASSES, load_digits, rank_in_class
from distill.data.event_config import is_events
from distill.data.files import DecodedOnRead, FileSplit, find_split, list_split, read_class_map
from distill.data.seeds import SampleKey, check_seed
from distill.data.transforms import BatchTransform, EvalTransform, Transform, train_transform

MEMORY_BYTES = 2**30  # what in_memory=None allows for train and eval together
PROBES = 64  # images whose headers stand for all when sizes vary


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Images and their labels: item i is (float32 (C, H, W), class index).

    Where the transform allows, a loader gets its batches whole (`__getitems__`), not item by item.

    An item is asked for by its index, which means epoch 0, or by (epoch, index), as the training sampler does.

    Args:
        images: what the transform's `prepare` returned, one per image: one uint8 tensor, a list, or read from disk.
        labels: class of each image, int64 (N,).
        transform: its `finish` makes an item of a prepared image.
        seed: of the augmentation, from 0 up.
        in_memory: whether `images` are held in memory.
        collate: makes a batch of items; None: torch's own, which stacks along a new first axis.
    """

    def __init__(
        self,
        images: Sequence[Any] | Tensor,
        labels: np.ndarray,
        transform: Transform[Any],
        seed: int,
        in_memory: bool,
        collate: Callable[[Sequence[tuple[Tensor, int]]], tuple[Tensor, Tensor]] | None = None,
    ):
        assert len(images) == len(labels)
        self._images, self._labels, self._transform = images, labels, transform
        self._seed = check_seed(seed)
        self.in_memory = in_memory
        self.collate = partial(_collated, collate or default_collate)

    @property
    def labels(self) -> np.ndarray:
        """Class of each image, int64 (N,), in the order of the items."""
        return self._labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        sample = self._sample(key)
        return self._transform.finish(self._images[sample.image], sample), int(self._labels[sample.image])

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> Any:
        """A batch (images, labels) made at once, or, where that cannot be, a list of items; the same values."""
        if not isinstance(self._transform, BatchTransform):
            return [self[key] for key in keys]
        samples = [self._sample(key) for key in keys]
        indices = [sample.image for sample in samples]
        images = self._images
        stored = images[indices] if isinstance(images, Tensor) else torch.stack([images[i] for i in indices])
        return self._transform.finish_batch(stored, samples), torch.from_numpy(self._labels[indices])

    def _sample(self, key: int | tuple[int, int]) -> SampleKey:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):  # a negative index would be augmented differently from its positive twin
            raise IndexError(f"index is {index}; allowed: 0 to {len(self) - 1}")
        return SampleKey(self._seed, epoch, index)


def _collated(collate: Callable[[Any], Any], batch: Any) -> Any:
    """What `ImageSet.__getitems__` returned, as a batch."""
    return batch if isinstance(batch, tuple) else collate(batch)


@dataclass(frozen=True)
class Splits:
    """What a run trains on and is judged on."""

    train: ImageSet
    eval: ImageSet
    classes: tuple[str, ...]
    """Name of each class, in the order of the labels."""


def load_data(config: DataConfig, preprocessing: Preprocessing, seed: int = 0, timesteps: int | None = None) -> Splits:
    """Open the images that the config names, as the teacher expects them.

    Args:
        config: which images, and the augmentation of the training set.
        preprocessing: size and normalisation.
        seed: of the augmentation, from 0 up; which images are held out does not depend on it.
        timesteps: T, of event data the frames of a recording, items (T, C, H, W) and batches (T, B, C, H, W); None: the
            sum over all frames, an image, as an analogue network sees it. Images are the same for every T.
    """
    if is_events(config):
        from distill.data.events import load_events  # which is built on this file

        return load_events(config, preprocessing, seed, timesteps)
    load = _load_digits if config.name == "digits" else _load_folder
    return load(config, preprocessing, train_transform(config, preprocessing), EvalTransform(preprocessing), seed)


def _load_digits(
    config: DataConfig, pre: Preprocessing, train: Transform[Any], evaluate: Transform[Any], seed: int
) -> Splits:
    images, labels, held_out = load_digits(pre)
    channels = pre.input_size[0]

    def image_set(members: np.ndarray, limit: int | None, transform: Transform[Any]) -> ImageSet:
        members = members[spread(labels[members], limit)]
        if transform.stored_shape is None:  # timm's crop wants PIL images
            mode = "RGB" if channels == 3 else "L"
            stored: Any = [Image.fromarray(images[i]).convert(mode) for i in members]
        else:
            stored = torch.from_numpy(images[members]).unsqueeze(1).repeat(1, channels, 1, 1)
        return ImageSet(stored, labels[members], transform, seed, in_memory=True)

    return Splits(
        image_set(np.flatnonzero(~held_out), config.max_train_samples, train),
        image_set(np.flatnonzero(held_out), config.max_eval_samples, evaluate),
        CLASSES,
    )


def _load_folder(
    config: DataConfig, pre: Preprocessing, train: Transform[Any], evaluate: Transform[Any], seed: int
) -> Splits:
    if pre.input_size[0] not in (1, 3):
        raise ValueError(f"input_size is {pre.input_size}; image files allow 1 (grey) or 3 (RGB) channels")
    assert config.root is not None  # checked by the config
    classes = None if config.class_map is None else read_class_map(config.class_map)
    train_files = list_split(find_split(config.root, config.train_split), classes)
    eval_files = list_split(find_split(config.root, config.eval_split), classes)
    _check_same_classes(train_files, eval_files)
    sets = [
        (limited(train_files, config.max_train_samples), train),
        (limited(eval_files, config.max_eval_samples), evaluate),
    ]
    mode = "RGB" if pre.input_size[0] == 3 else "L"
    in_memory = config.in_memory
    if in_memory is None:
        in_memory = sum(estimated_bytes(files, transform, len(mode)) for files, transform in sets) <= MEMORY_BYTES

    def image_set(files: FileSplit, transform: Transform[Any]) -> ImageSet:
        images: Any = DecodedOnRead(files.files, mode, transform.prepare)
        if in_memory:
            images = _collect(images, len(images), transform.stored_shape)
        return ImageSet(images, files.labels, transform, seed, in_memory)

    train_set, eval_set = (image_set(files, transform) for files, transform in sets)
    return Splits(train_set, eval_set, train_files.classes)


def _collect(images: Iterable[Any], count: int, shape: tuple[int, int, int] | None) -> Tensor | list[Any]:
    """All images in one uint8 tensor where they have one shape, which costs forked workers nothing; else a list."""
    if shape is None:
        return list(images)
    stack = torch.empty((count, *shape), dtype=torch.uint8)
    for index, image in enumerate(images):
        stack[index] = image
    return stack


def estimated_bytes(files: FileSplit, transform: Transform[Any], channels: int) -> int:
    """Memory for all prepared images; from the headers of some when their sizes vary."""
    if transform.stored_shape is not None:
        return len(files.files) * math.prod(transform.stored_shape)
    probes = files.files[:: math.ceil(len(files.files) / PROBES)]
    return len(files.files) * channels * sum(probe.pixels() for probe in probes) // len(probes)


def limited(files: FileSplit, limit: int | None) -> FileSplit:
    """The split with only `limit` of its images, spread over its classes."""
    kept = spread(files.labels, limit)
    return FileSplit(files.path, [files.files[i] for i in kept], files.labels[kept], files.classes)


def spread(labels: np.ndarray, limit: int | None) -> np.ndarray:
    """Indices of `limit` images: the first of every class, then the second, and so on; in their own order."""
    if limit is None:
        return np.arange(len(labels))
    return np.sort(np.lexsort((labels, rank_in_class(labels)))[:limit])


def _check_same_classes(train: FileSplit, evaluate: FileSplit) -> None:
    if train.classes == evaluate.classes:
        return
    differences = [
        f"only in {here.path}: {_some(set(here.classes) - set(there.classes))}"
        for here, there in ((train, evaluate), (evaluate, train))
        if set(here.classes) - set(there.classes)
    ]
    raise ValueError(f"train and eval must have the same classes; {'; '.join(differences)}")


def _some(names: set[str]) -> str:
    first = ", ".join(sorted(names)[:5])
    return first if len(names) <= 5 else f"{first} and {len(names) - 5} more"
