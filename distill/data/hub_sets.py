"""Data sets in the formats of Hugging Face's `datasets`: of a folder on disk, or of the hub.

timm's reader of these wants the names of the image and label columns; here the first of each kind is taken.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distill.data.files import EVAL_SPLITS, EncodedImage, FileSplit


@dataclass(frozen=True, slots=True)
class HubImage(EncodedImage):
    """One row of a table, whose image is encoded in it or in a file."""

    table: Any
    """A `datasets.Dataset` of one column of images that are not decoded."""
    row: int
    split: str
    """Its name: rows of all splits are counted from 0."""

    def __str__(self) -> str:
        return f"in row {self.row} of split {self.split!r} of {self.table.info.dataset_name or 'the data set'}"

    def undecoded(self) -> Image.Image:
        (stored,) = self.table[self.row].values()
        return Image.open(io.BytesIO(stored["bytes"] if stored["bytes"] else Path(stored["path"]).read_bytes()))


def list_hub(name: str, root: str | None, train: str, evaluation: str | None) -> list[FileSplit]:
    """Training and held-out rows; no image is decoded.

    Args:
        name: a folder, below root or by itself, that `save_to_disk` wrote or that holds files `datasets` can read; else
            an id of the hub, whose files go to root, or to the cache of `datasets`.
        train: name of the split.
        evaluation: likewise; None: the first of val, validation, test that there is.

    Raises:
        ValueError: without the package, says what to install; for a data set that cannot be read, lacks a split, or has
            no images or no classes.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"name='hfds/{name}' needs Hugging Face's datasets: pip install datasets") from error
    folder = next((path for path in (Path(root or "", name), Path(name)) if path.is_dir()), None)
    try:
        if folder is not None and any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
            found: Any = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(name if folder is None else str(folder), cache_dir=root)
    except Exception as error:  # no network, no such id, a script instead of data, files of another kind
        raise ValueError(
            f"cannot read name='hfds/{name}': {' '.join(str(error).split())} (looked for a folder "
            f"{str(Path(root or '', name))!r}, then for this id on the hub)"
        ) from error
    splits = found if isinstance(found, dict) else {"train": found}
    chosen = [_chosen(splits, wanted) for wanted in ((train,), (evaluation,) if evaluation else EVAL_SPLITS)]
    return [_rows(name, split, splits[split], datasets) for split in chosen]


def _chosen(splits: dict[str, Any], wanted: tuple[str, ...]) -> str:
    for name in wanted:
        if name in splits:
            return name
    raise ValueError(f"no split {' or '.join(wanted)}; the data set has {', '.join(splits)}")


def _rows(name: str, split: str, table: Any, datasets: Any) -> FileSplit:
    columns = table.features
    image = next((column for column, kind in columns.items() if isinstance(kind, datasets.Image)), None)
    label = next((column for column, kind in columns.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image is None or label is None:
        lacks = "images" if image is None else "class labels"
        raise ValueError(f"split {split!r} of name='hfds/{name}' has no column of {lacks}, only {', '.join(columns)}")
    labels = np.array([-1 if value is None else value for value in table[label]], dtype=np.int64)
    if len(labels) == 0 or labels.min() < 0:
        raise ValueError(f"split {split!r} of name='hfds/{name}' has no images, or some without a label (None, -1)")
    images = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    files = [HubImage(images, row, split) for row in range(len(labels))]
    return FileSplit(Path(f"{name} ({split})"), files, labels, tuple(columns[label].names))
