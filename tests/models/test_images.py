"""Images of more than 8 bits: 16 bits keep their high byte in all formats, 32 bits are refused."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from models.images import UnreadableImage, converted, decoded, open_image

VALUES = np.array([[0x0000, 0x00FF], [0x1234, 0xFFFF]], dtype=np.uint16)
HIGH = [[0x00, 0x00], [0x12, 0xFF]]


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def big_endian_tiff() -> bytes:
    """The four values behind a header of 8 bytes, then their description."""
    counts = {256: 2, 257: 2, 258: 16, 259: 1, 262: 1, 273: 8, 277: 1, 278: 2, 279: 8}
    entries = b"".join(struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in counts.items())
    return (
        b"MM" + struct.pack(">HI", 42, 16) + VALUES.astype(">u2").tobytes() + struct.pack(">H", 9) + entries + bytes(4)
    )


FILES = {
    "png": encoded(Image.fromarray(VALUES), "PNG"),
    "tiff": encoded(Image.fromarray(VALUES), "TIFF"),
    "tiff, high byte first": big_endian_tiff(),
    "pgm": b"P5 2 2 65535\n" + VALUES.astype(">u2").tobytes(),
}


@pytest.mark.parametrize("kind", list(FILES))
def test_sixteen_bits_of_grey_keep_their_high_byte(kind, tmp_path):
    (tmp_path / "x").write_bytes(FILES[kind])
    assert np.asarray(open_image(tmp_path / "x", 1)).tolist() == HIGH
    colours = np.asarray(open_image(tmp_path / "x", 3))
    assert colours.shape == (2, 2, 3) and all(colours[:, :, c].tolist() == HIGH for c in range(3))


def test_a_png_that_pillow_opens_with_32_bits_is_one_of_16():
    image = Image.fromarray(VALUES.astype(np.int32))  # as before Pillow 11
    image.format = "PNG"
    assert np.asarray(converted(image, "L")).tolist() == HIGH


@pytest.mark.parametrize(("dtype", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_pixels_of_32_bits_are_refused_by_their_mode(dtype, mode):
    image = Image.fromarray(VALUES.astype(dtype))
    with pytest.raises(ValueError, match=f"mode '{mode}', 32 bits without a known range; allowed: 8 or 16 bits"):
        converted(image, "RGB")
    with pytest.raises(UnreadableImage, match=rf"cannot read the image scan\.tif: its pixels have mode '{mode}'"):
        decoded(lambda: Image.open(io.BytesIO(encoded(image, "TIFF"))), "L", "scan.tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_other_modes_are_converted_by_pillow(mode):
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20).convert(mode)
    for wanted in ("L", "RGB"):
        assert converted(image, wanted).tobytes() == image.convert(wanted).tobytes()
