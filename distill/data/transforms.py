"""From a decoded image to the network's input, in two halves: `prepare` is fixed, `finish` is random.

Images in memory are kept as `prepare` left them, so that work is done once. `finish` draws its random numbers from
(seed, epoch, image) alone: not from the global generators, which it leaves as they were, nor from the worker. Where
timm has no part in it, a whole batch is finished at once, to the same values.

Shapes: C channels, H x W the input size, h x w an image as it was decoded.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import str_to_pil_interp
from torch import Tensor
from torchvision.transforms import Compose
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from distill.data.config import DataConfig
from distill.data.seeds import SampleKey, seeded_generators, uniforms
from distill.data.timm_augment import timm_parts
from models.preprocessing import Normalize, Preprocessing, resize_and_crop

Stored = TypeVar("Stored", Tensor, Image.Image)


class Transform(ABC, Generic[Stored]):
    """The interface of the transforms below."""

    stored_shape: tuple[int, int, int] | None
    """Shape of what `prepare` returns, uint8; None when it varies from image to image."""

    @abstractmethod
    def prepare(self, image: Image.Image) -> Stored:
        """The fixed half, whose result may be kept: an image of h x w pixels to uint8 values."""

    @abstractmethod
    def finish(self, stored: Stored, key: SampleKey) -> Tensor:
        """The random half: what `prepare` returned to normalised float32 values, (C, H, W)."""


class BatchTransform(Transform[Tensor]):
    """A transform that finishes a batch at once; an item is a batch of one."""

    @abstractmethod
    def finish_batch(self, stored: Tensor, keys: Sequence[SampleKey]) -> Tensor:
        """What `prepare` returned, (B, C, H, W), to normalised float32 values; `stored` stays as it was."""

    def finish(self, stored: Tensor, key: SampleKey) -> Tensor:
        return self.finish_batch(stored.unsqueeze(0), [key])[0]


class EvalTransform(BatchTransform):
    """timm's evaluation: resized as `crop_mode` says, centre crop, normalise. Nothing is random."""

    def __init__(self, pre: Preprocessing):
        self.stored_shape = pre.input_size
        self._resize_and_crop = resize_and_crop(pre)
        self._normalize = Normalize(pre)

    def prepare(self, image: Image.Image) -> Tensor:
        return self._resize_and_crop(image)

    def finish_batch(self, stored: Tensor, keys: Sequence[SampleKey]) -> Tensor:
        return self._normalize(stored)


class CropFlipTransform(BatchTransform):
    """Training of small images: a random crop after reflected padding, a random flip, normalise.

    An image of another size than H x W is resized to it first, whole: its aspect ratio is not kept.

    Args:
        pre: what the teacher expects.
        padding: pixels of padding on each side, 0 to min(H, W) - 1.
        hflip: probability of a flip, in [0, 1].
    """

    def __init__(self, pre: Preprocessing, padding: int, hflip: float):
        self.stored_shape = pre.input_size
        self._crop = CropFlip(pre, padding, hflip)
        self._normalize = Normalize(pre)

    def prepare(self, image: Image.Image) -> Tensor:
        return self._crop.prepare(image)

    def finish_batch(self, stored: Tensor, keys: Sequence[SampleKey]) -> Tensor:
        return self._normalize(self._crop(stored, keys))


class CropFlipTailTransform(Transform[Tensor]):
    """The same crop and flip, then timm's part of the augmentation, image by image.

    Args:
        crop: crop and flip.
        tail: random transform of the crop, from a PIL image to normalised floats; runs with seeded global generators.
    """

    def __init__(self, crop: "CropFlip", tail: Callable[[Image.Image], Tensor]):
        self.stored_shape = crop.shape
        self._crop, self._tail = crop, tail

    def prepare(self, image: Image.Image) -> Tensor:
        return self._crop.prepare(image)

    def finish(self, stored: Tensor, key: SampleKey) -> Tensor:
        image = self._crop(stored.unsqueeze(0), [key])[0]
        with seeded_generators(key):
            return self._tail(to_pil_image(image))


class ResizedCropTransform(Transform[Image.Image]):
    """timm's ImageNet training transform; images are kept at their own size, because the crop comes first."""

    stored_shape = None

    def __init__(self, transform: Callable[[Image.Image], Tensor]):
        self._transform = transform

    def prepare(self, image: Image.Image) -> Image.Image:
        return image

    def finish(self, stored: Image.Image, key: SampleKey) -> Tensor:
        with seeded_generators(key):
            return self._transform(stored)


class CropFlip:
    """Random crops and flips of a uint8 batch; arguments as of `CropFlipTransform`."""

    def __init__(self, pre: Preprocessing, padding: int, hflip: float):
        _, height, width = self.shape = pre.input_size
        if padding >= min(height, width):
            raise ValueError(
                f"crop_padding is {padding}; a {height}x{width} image allows 0 to {min(height, width) - 1}"
            )
        self._resample = str_to_pil_interp(pre.interpolation)
        self._padding, self._hflip = padding, hflip
        # The pixel that each row and column of the padded image shows: a crop, flipped or not, is a slice of these.
        self._rows, self._columns = _reflected(height, padding), _reflected(width, padding)

    def prepare(self, image: Image.Image) -> Tensor:
        """An image of any size to uint8 values, (C, H, W)."""
        size = self.shape[2], self.shape[1]
        return pil_to_tensor(image if image.size == size else image.resize(size, self._resample))

    def __call__(self, images: Tensor, keys: Sequence[SampleKey]) -> Tensor:
        """Images (B, C, H, W) to crops of the same shape, each with the random numbers of its key."""
        if not (self._padding or self._hflip):
            return images
        count, channels, height, width = images.shape
        draws = uniforms(keys, 3)
        top, left = torch.from_numpy((draws[:, :2] * (2 * self._padding + 1)).astype(np.int64)).T[:, :, None]
        if self._padding:
            rows = self._rows[top + torch.arange(height)]  # (B, H)
            planes = torch.arange(count * channels).view(count, channels, 1) * height
            # whole rows are picked before pixels, which copies most of the bytes in pieces of W
            images = images.reshape(-1, width).index_select(0, (planes + rows[:, None]).flatten())
            images = images.view(count, channels, height, width)
        across = torch.arange(width).expand(count, width)
        flipped = torch.from_numpy(draws[:, 2] < self._hflip)[:, None]
        columns = self._columns[left + torch.where(flipped, width - 1 - across, across)]  # (B, W)
        return images.gather(3, columns[:, None, None].expand_as(images))


def train_transform(config: DataConfig, pre: Preprocessing) -> Transform[Any]:
    """The transform that the config asks for; timm's parts only where they are needed, because they are slower."""
    if not (config.random_resized_crop or config.auto_augment or config.random_erasing):
        return CropFlipTransform(pre, config.crop_padding, config.hflip)
    parts = timm_parts(config, pre)
    if config.random_resized_crop:
        return ResizedCropTransform(Compose(parts))
    crop = CropFlip(pre, config.crop_padding, config.hflip)
    return CropFlipTailTransform(crop, Compose([parts.augment, parts.to_input]))


def _reflected(size: int, padding: int) -> Tensor:
    """Index of the pixel shown at -padding .. size + padding - 1, mirrored about the border pixels."""
    position = torch.arange(-padding, size + padding).abs()
    return torch.where(position < size, position, 2 * (size - 1) - position)
