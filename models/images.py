"""Image files as PIL images, with one error that names the image where it cannot be read."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

SIXTEEN_BITS = ("PNG", "PPM")
"""Formats of which Pillow opens 16 bits of grey as 32: PGM, and before Pillow 11 PNG."""


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
        return converted(image, mode)
    except Exception as error:  # Pillow's decoders raise many kinds, all with the same meaning here
        raise unreadable(name, error) from error


def converted(image: Image.Image, mode: str) -> Image.Image:
    """An image in PIL's `mode`, "L" or "RGB". Of 16 bits of grey the high byte is kept, as Pillow does with 16 bits of
    colour; its own conversion makes all from 255 up white.

    Raises:
        ValueError: for pixels of 32 bits, of which nothing says what is black and what is white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BITS):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels have mode {image.mode!r}, 32 bits without a known range; allowed: 8 or 16 bits")
    return image.convert(mode)


def unreadable(name: object, error: Exception) -> UnreadableImage:
    """The error that names an image."""
    unknown = isinstance(error, UnidentifiedImageError)  # whose own text shows a memory address
    return UnreadableImage(f"cannot read the image {name}: {'not in a format that Pillow knows' if unknown else error}")
