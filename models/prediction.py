"""From image files to class names and probabilities.

Shapes: B images, C channels, K classes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from models.images import converted, image_mode, open_image
from models.layout import at_least_float32
from models.preprocessing import Normalize, Preprocessing, preprocessing_of, resize_and_crop

Source = Image.Image | str | os.PathLike[str]
"""An image, or the path of one."""

Run = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From images (B, C, H, W) to logits (B, K) and the number of time steps that each took, (B,)."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a network makes of one image. The most likely classes come first."""

    classes: tuple[str, ...]
    """Their names; their numbers where the network knows no names."""
    probabilities: tuple[float, ...]
    """Of these classes: the softmax of the logits, in [0, 1]."""
    indices: tuple[int, ...]
    """Their numbers, in the order of the logits."""
    logits: Tensor
    """Of all classes, (K,), at least float32, on the CPU."""
    timesteps: int
    """How many time steps it took."""


def predict(
    network: nn.Module,
    spec: dict[str, Any],
    images: Source | Sequence[Source],
    run: Run,
    topk: int = 5,
    batch_size: int = 32,
) -> Prediction | list[Prediction]:
    """The predictions of a network whose `spec` says how its images are made and what its classes are called.

    Args:
        images: a PIL image or the path of one, or a list of them.
        run: the network's forward.
        topk: number of classes to give, at least 1; all where there are fewer.
        batch_size: images that run together, at most.

    Returns:
        one prediction, or a list in the order of the images.

    Raises:
        ValueError: for a network that takes no images (event frames) or does not say how they are made, one in training
            mode, a number below 1, or a PIL image whose pixels have 32 bits.
        FileNotFoundError, UnreadableImage: name the file.
        TypeError: for anything but images and paths.
    """
    for name, value in (("topk", topk), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}")
    if network.training:
        raise ValueError("predict is for a network in evaluation mode: call eval() first")
    pre = preprocessing_of(spec)
    channels = pre.input_size[0]
    if channels not in (1, 3):
        raise ValueError(
            f"predict takes images of 1 (grey) or 3 (RGB) channels; {type(network).__name__} takes {channels}: "
            "networks of event frames are called on the frames, (T, B, C, H, W)"
        )
    if isinstance(images, Tensor):
        raise TypeError("predict takes PIL images and paths of images, found Tensor; tensors go to the network itself")
    one = isinstance(images, (Image.Image, str, os.PathLike))
    found = list(_predictions(network, spec, [images] if one else list(images), run, pre, topk, batch_size))  # type: ignore[list-item, arg-type]
    return found[0] if one else found


def _predictions(
    network: nn.Module,
    spec: dict[str, Any],
    images: list[Source],
    run: Run,
    pre: Preprocessing,
    topk: int,
    batch_size: int,
) -> Iterator[Prediction]:
    prepare, normalize = resize_and_crop(pre), Normalize(pre)
    parameter = next(network.parameters())
    for start in range(0, len(images), batch_size):
        batch = [prepare(_opened(image, pre.input_size[0])) for image in images[start : start + batch_size]]
        pixels = normalize(torch.stack(batch)).to(parameter.device, parameter.dtype)
        with torch.no_grad():
            logits, steps = run(pixels)
        for row, taken in zip(at_least_float32(logits).cpu(), steps.tolist(), strict=True):
            yield _prediction(row, taken, spec["extra"].get("classes"), topk)


def _opened(image: Source, channels: int) -> Image.Image:
    if isinstance(image, Image.Image):
        return converted(image, image_mode(channels))
    if isinstance(image, (str, os.PathLike)):
        return open_image(image, channels)
    raise TypeError(f"predict takes PIL images and paths of images, found {type(image).__name__}")


def _prediction(logits: Tensor, steps: int, classes: Sequence[str] | None, topk: int) -> Prediction:
    if classes is not None and len(classes) != len(logits):
        raise ValueError(f"the network gives {len(logits)} logits, its extra.classes names {len(classes)} classes")
    probabilities, indices = logits.softmax(0).topk(min(topk, len(logits)))
    numbers = indices.tolist()
    names = tuple(str(number if classes is None else classes[number]) for number in numbers)
    return Prediction(names, tuple(probabilities.tolist()), tuple(numbers), logits, steps)


def until_sure(steps: Iterator[Tensor], margin: float) -> tuple[Tensor, Tensor]:
    """The logits of each image at the first step at which it is sure, and that step's number from 1, (B,).

    Sure: the softmax probability of the likeliest class exceeds that of the second by `margin` or more. The steps end
    when all images are sure, or by themselves.

    Args:
        steps: logits so far, (B, K), after each step.
        margin: in (0, 1].

    Raises:
        ValueError: for another margin, or a single logit.
    """
    if not 0 < margin <= 1:
        raise ValueError(f"early_exit is a margin of probabilities in (0, 1], found {margin}")
    chosen: Any = None
    for number, logits in enumerate(steps, 1):
        if logits.shape[1] < 2:
            raise ValueError("early_exit compares the two likeliest classes; the network has one logit")
        if chosen is None:
            chosen, taken = logits.clone(), torch.ones(len(logits), dtype=torch.long, device=logits.device)
            waiting = torch.ones_like(taken, dtype=torch.bool)
        else:
            chosen[waiting], taken[waiting] = logits[waiting], number
        best = at_least_float32(logits).softmax(1).topk(2, dim=1).values
        waiting &= best[:, 0] - best[:, 1] < margin
        if not waiting.any():
            break
    return chosen, taken
