"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels that come with the package."""

import numpy as np
from PIL import Image
from timm.data.transforms import str_to_pil_interp

from distill.data.config import Preprocessing

CLASSES = tuple("0123456789")
HOLDOUT = 5  # every fifth image of a class is held out


def load_digits(pre: Preprocessing) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The digits at the teacher's input size.

    The grey value is repeated in every channel. `crop_pct` and `crop_mode` play no part: the digits fill
    their image.

    Returns:
        images, uint8 (1797, H, W), labels, int64 (1797,), and which of them are held out, bool (1797,).
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError("name='digits' needs scikit-learn: pip install scikit-learn") from error
    values, labels = load(return_X_y=True)  # (1797, 64) floats 0..16
    small = np.rint(values * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    _, height, width = pre.input_size
    resample = str_to_pil_interp(pre.interpolation)
    images = np.stack([np.asarray(Image.fromarray(image).resize((width, height), resample)) for image in small])
    labels = labels.astype(np.int64)
    return images, labels, held_out(labels)


def held_out(labels: np.ndarray) -> np.ndarray:
    """Every fifth image of each class, bool (N,): stratified, and the same in every run whatever its seed."""
    return rank_in_class(labels) % HOLDOUT == HOLDOUT - 1


def rank_in_class(labels: np.ndarray) -> np.ndarray:
    """How many images of the same class come before each image, int64 (N,)."""
    ranks = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        ranks[members] = np.arange(len(members))
    return ranks
