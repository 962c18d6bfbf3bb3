"""The official Python batches of CIFAR-10 and CIFAR-100, read without running anything that they hold.

torchvision unpickles these files. A pickle may call any function, so here an unpickler builds numpy arrays, text,
numbers, lists and dictionaries, and refuses to look up anything else; the checksums of the official files come first.
"""

import _codecs
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

PIXELS = 3 * 32 * 32

# What a pickled array of bytes names: numpy's own reconstruction, wherever this numpy keeps it, and text to bytes.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _codecs.encode,
}


class ArrayUnpickler(pickle.Unpickler):
    """Refuses every global that an array of numbers does not need."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of images needs") from None


def read_split(official: type[CIFAR10], root: Path, train: bool) -> tuple[np.ndarray, list[int], tuple[str, ...]]:
    """Images, uint8 (N, 32, 32, 3), labels and names of the classes of one split.

    Args:
        official: torchvision's class of the set, which knows the files and their checksums.
        root: the folder that holds torchvision's `base_folder`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: for a file that is not the official one, or asks for more than arrays.
    """
    folder = root / official.base_folder
    batches = [
        _checked(folder / name, _read(folder / name, md5))
        for name, md5 in (official.train_list if train else official.test_list)
    ]
    meta = _read(folder / official.meta["filename"], official.meta["md5"])
    images = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), [y for _, labels in batches for y in labels], tuple(meta[official.meta["key"]])


def load_arrays(file: BinaryIO) -> Any:
    """What a pickle of arrays, text, numbers, lists and dictionaries holds; Python 2's text is read as Latin-1."""
    return ArrayUnpickler(file, encoding="latin1").load()


def _read(path: Path, md5: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(path)
    if not check_integrity(path, md5):
        raise ValueError(f"{path} is not the official file: its MD5 sum is not {md5}")
    try:
        with path.open("rb") as file:
            found = load_arrays(file)
    except Exception as error:  # a broken pickle raises many kinds, all with the same meaning here
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"cannot read {path}: it holds no dictionary")
    return found


def _checked(path: Path, batch: dict[str, Any]) -> tuple[np.ndarray, Sequence[int]]:
    pixels, labels = batch.get("data"), batch.get("labels", batch.get("fine_labels"))
    if not isinstance(pixels, np.ndarray) or not isinstance(labels, list) or pixels.shape != (len(labels), PIXELS):
        raise ValueError(f"cannot read {path}: it must hold data, bytes (N, {PIXELS}), and N labels")
    return pixels.astype(np.uint8, casting="safe", copy=False), labels
