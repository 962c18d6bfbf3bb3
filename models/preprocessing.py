"""How a network wants to see an image, and the way from a decoded image to its input in evaluation.

Shapes: C channels, H x W the input size, h x w an image as it was decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What the network expects: values in [0, 1] at `input_size`, then (value - mean) / std."""

    input_size: tuple[int, int, int]
    """Channels, height and width of the network's input."""
    mean: tuple[float, ...]
    """Mean of each channel, for values in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation of each channel, for values in [0, 1]."""
    interpolation: str = "bilinear"
    """How images are resized: nearest, bilinear, bicubic, box, hamming or lanczos."""
    crop_pct: float = 1.0
    """Evaluation resizes to input / crop_pct, then crops the centre; in (0, 1]."""
    crop_mode: str = "center"
    """What is resized to input / crop_pct. center: the shorter side, and more of the longer one is cropped; squash:
    both sides, whatever the aspect ratio was; border: the longer side, with a border of the mean on the shorter one."""

    def __post_init__(self) -> None:
        if len(self.input_size) != 3 or min(self.input_size) < 1:
            raise ValueError(f"input_size is {self.input_size}; allowed: (channels, height, width), each from 1 up")
        channels = self.input_size[0]
        for field in ("mean", "std"):
            if len(getattr(self, field)) != channels:
                raise ValueError(f"{field} is {getattr(self, field)}; input_size asks for {channels} value(s)")
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; allowed: values above 0")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation is {self.interpolation!r}; allowed: {', '.join(INTERPOLATIONS)}")
        if not 0.0 < self.crop_pct <= 1.0:
            raise ValueError(f"crop_pct is {self.crop_pct}; allowed: values in (0, 1]")
        if self.crop_mode not in CROP_MODES:
            raise ValueError(f"crop_mode is {self.crop_mode!r}; allowed: {', '.join(CROP_MODES)}")

    def entries(self) -> dict[str, Any]:
        """In JSON types, as a saved network says it under "extra"; `preprocessing_of` reads it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def __str__(self) -> str:
        """One line for people, with values as a configuration states them."""
        size = "x".join(map(str, self.input_size))
        return ", ".join([size, *(f"{name} {v}" for name, v in self.entries().items() if name != "input_size")])


def preprocessing_of(spec: Mapping[str, Any]) -> Preprocessing:
    """How the images of a saved network are made.

    Args:
        spec: of a network; its entry "extra" holds what the run said of its images.

    Raises:
        ValueError: names the entry that is missing or wrong.
    """
    extra = spec.get("extra", {})
    try:
        return Preprocessing(
            input_size=tuple(extra["input_size"]),
            mean=tuple(extra["mean"]),
            std=tuple(extra["std"]),
            interpolation=extra.get("interpolation", "bilinear"),
            crop_pct=extra.get("crop_pct", 1.0),
            crop_mode=extra.get("crop_mode", "center"),  # all that was known when it was not written
        )
    except KeyError as error:
        missing = f"extra.{error.args[0]} is missing"
        raise ValueError(f"the network does not say how its images are made: {missing}") from None
    except TypeError as error:
        raise ValueError(f"the network does not say how its images are made: {error}") from None


def resize_and_crop(pre: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """timm's evaluation, as far as uint8 values (C, H, W): resized as `crop_mode` says, centre crop.

    An image that already has the input size passes unchanged when crop_pct is 1; below 1 timm enlarges and crops it,
    and so do we.
    """
    return create_transform(
        pre.input_size,
        interpolation=pre.interpolation,
        mean=pre.mean,  # of the border
        crop_pct=pre.crop_pct,
        crop_mode=pre.crop_mode,
        normalize=False,  # which stops timm after the crop
    )


class Normalize:
    """uint8 in [0, 255] to float32: (x / 255 - mean) / std, the operations and order of timm's transforms."""

    def __init__(self, pre: Preprocessing) -> None:
        self._mean = torch.tensor(pre.mean, dtype=torch.float32).view(-1, 1, 1)
        self._std = torch.tensor(pre.std, dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, image: Tensor) -> Tensor:
        return image.to(torch.float32).div_(255).sub_(self._mean).div_(self._std)
