"""Images and labels as a map-style dataset, whose items depend on (seed, epoch, index) alone."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from distill.data.faults import Unreadable
from distill.data.seeds import SampleKey, check_seed
from distill.data.transforms import BatchTransform, Transform
from models.images import UnreadableImage


@dataclass(frozen=True)
class Batch(Sequence[tuple[Tensor, int]]):
    """Items that were made together; a sequence of them for any collate function that does not know this."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        return self.images[index], int(self.labels[index])


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
        unreadable: the images of the split that could not be read; None: an image that cannot be read is an error.
        substitute: whether `unreadable` numbers these images, and grows: in the place of one that cannot be read stands
            the next that can, with its label, whatever the process, worker or epoch.
        names: of each image, something whose `str` says where it lies; None where nothing does.
    """

    def __init__(
        self,
        images: Sequence[Any] | Tensor,
        labels: np.ndarray,
        transform: Transform[Any],
        seed: int,
        in_memory: bool,
        collate: Callable[[Sequence[tuple[Tensor, int]]], tuple[Tensor, Tensor]] | None = None,
        unreadable: Unreadable | None = None,
        substitute: bool = False,
        names: Sequence[object] | None = None,
    ):
        assert len(images) == len(labels)
        self._images, self._labels, self._transform = images, labels, transform
        self._seed = check_seed(seed)
        self.in_memory = in_memory
        self.collate = partial(_collated, collate or default_collate)
        self._unreadable, self._substitute, self._names = unreadable, substitute, names

    @property
    def labels(self) -> np.ndarray:
        """Class of each image, int64 (N,), in the order of the items."""
        return self._labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        sample = self._sample(key)
        image, index = self._read(sample.image)
        return self._transform.finish(image, sample), int(self._labels[index])

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> Sequence[tuple[Tensor, int]]:
        """Items made at once where the transform allows; the same values."""
        if not isinstance(self._transform, BatchTransform):
            return [self[key] for key in keys]
        samples = [self._sample(key) for key in keys]
        indices = [sample.image for sample in samples]
        if isinstance(self._images, Tensor):
            stored = self._images[indices]
        else:
            read = [self._read(index) for index in indices]
            stored, indices = torch.stack([image for image, _ in read]), [index for _, index in read]
        return Batch(self._transform.finish_batch(stored, samples), torch.from_numpy(self._labels[indices]))

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the images that were left out so far because they could not be read, by this process's loaders."""
        return () if self._unreadable is None else self._unreadable.names

    def names_of(self, indices: Sequence[int]) -> list[str]:
        """Where the images of some items lie: of those that stood in for them, where they could not be read.

        Returns:
            as many names; none where the images have no names.
        """
        if self._names is None:
            return []
        if self._unreadable is not None and self._substitute:
            indices = [next(self._readable_from(index), index) for index in indices]
        return [str(self._names[index]) for index in indices]

    def leave_out(self, names: Collection[str]) -> None:
        """Has images that an interrupted run could not read left out, and reported, again.

        Only where others take their places: what is in memory, or held out, was looked at anew when it was loaded.
        """
        if self._unreadable is not None and self._substitute:
            self._unreadable.recall(names)

    def _read(self, index: int) -> tuple[Any, int]:
        """An image as it is stored, and its index; of the next that can be read, where that is wanted."""
        if self._unreadable is None or not self._substitute:
            return self._images[index], index
        for other in self._readable_from(index):
            try:
                return self._images[other], other
            except UnreadableImage as error:
                self._unreadable.add(other, error)
        self._unreadable.kept()  # which says that nothing is left
        raise AssertionError

    def _readable_from(self, index: int) -> Iterator[int]:
        """This image, then those that may stand in its place, without those known to be unreadable."""
        assert self._unreadable is not None
        return (i for i in chain(range(index, len(self)), range(index)) if i not in self._unreadable)

    def _sample(self, key: int | tuple[int, int]) -> SampleKey:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):  # a negative index would be augmented differently from its positive twin
            raise IndexError(f"index is {index}; allowed: 0 to {len(self) - 1}")
        return SampleKey(self._seed, epoch, index)


def _collated(collate: Callable[[Any], Any], items: Sequence[tuple[Tensor, int]]) -> Any:
    """Images and labels of a batch, without another copy of those that were made together."""
    return (items.images, items.labels) if isinstance(items, Batch) else collate(items)
