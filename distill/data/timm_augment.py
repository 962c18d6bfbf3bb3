"""timm's random training transforms, in the three parts that we combine."""

from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image, ImageOps
from timm.data.auto_augment import AugmentOp
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms import Compose

from distill.data.config import DataConfig, Preprocessing


class TimmParts(NamedTuple):
    """All three draw from the global generators."""

    crop: Callable[[Image.Image], Image.Image]
    """Random resized crop and flip."""
    augment: Callable[[Image.Image], Image.Image]
    """The auto-augment policy, if any."""
    to_input: Callable[[Image.Image], Tensor]
    """To a tensor, normalise, random erasing."""


def timm_parts(config: DataConfig, pre: Preprocessing) -> TimmParts:
    """What timm's `create_transform(is_training=True)` makes for this config; images of 1 or 3 channels."""
    if pre.input_size[0] not in (1, 3):
        fields = "random_resized_crop, auto_augment and random_erasing"
        raise ValueError(f"input_size is {pre.input_size}; {fields} allow 1 or 3 channels")
    crop, augment, to_input = create_transform(
        pre.input_size,
        is_training=True,
        hflip=config.hflip,
        color_jitter=None,  # type: ignore[arg-type]  # off: timm's default is 0.4, its annotation forgets None
        auto_augment=config.auto_augment,
        interpolation=pre.interpolation,
        mean=pre.mean,
        std=pre.std,
        re_prob=config.random_erasing,
        re_mode="pixel",
        separate=True,
    )
    _allow_zero_bits(augment)
    return TimmParts(crop, augment, to_input)


def _allow_zero_bits(augment: Compose) -> None:
    """Let timm's posterize keep 0 bits, a black image, as before Pillow 13.

    Pillow 13 refuses 0 bits, which timm 1.0.31 asks for about once in a thousand images of rand-m9-mstd0.5-inc1.
    """
    for policy in augment.transforms:
        for op in _operations(policy):
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize


def _operations(policy: Any) -> list[AugmentOp]:
    """The operations of a RandAugment or AugMix, a flat list, or of an AutoAugment, a list of sub-policies."""
    return policy.ops if hasattr(policy, "ops") else [op for sub_policy in policy.policy for op in sub_policy]


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)
