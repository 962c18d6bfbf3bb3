"""Image files as PIL images, with one error that names the image where it cannot be read."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image, UnidentifiedImageError


class UnreadableImage(ValueError):
    """An image whose bytes are missing or cannot be decoded; the text names it."""


def image_mode(channels: int) -> str:
    """PIL's mode of an image of 1 (grey) or 3 (RGB) channels."""
    return "RGB" if channels == 3 else "L"


def open_image(path: str | os.PathLike[str], channels: int) -> Image.Image:
    """An image file, decoded.

    Args:
        channels: 1 (grey) or 3 (RGB), into which it is converted.

    Raises:
        FileNotFoundError: if there is no such file.
        UnreadableImage: if it cannot be decoded.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no image at {path}")
    return decoded(lambda: Image.open(io.BytesIO(Path(path).read_bytes())), image_mode(channels), path)


def decoded(undecoded: Callable[[], Image.Image], mode: str, name: object) -> Image.Image:
    """A lazily opened image in PIL's `mode`; `name` tells in an error which it is."""
    try:
        image = undecoded()
        image.load()
        return image.convert(mode)
    except Exception as error:  # Pillow's decoders raise many kinds, all with the same meaning here
        raise unreadable(name, error) from error


def unreadable(name: object, error: Exception) -> UnreadableImage:
    """The error that names an image."""
    unknown = isinstance(error, UnidentifiedImageError)  # whose own text shows a memory address
    return UnreadableImage(f"cannot read the image {name}: {'not in a format that Pillow knows' if unknown else error}")
