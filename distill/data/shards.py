"""WebDataset shards on a disk: tar files in which the files of a sample share a name, e.g. 0001.jpg and 0001.cls.

timm's reader streams such shards: it passes over images that it cannot read, gives processes different numbers of
images, and in evaluation may leave images out or show them twice. Shards that lie on a disk allow better: their headers
are read once, then each image is read at its own offset, so that order, resuming and evaluation are those of folders.
Names of shards and splits are timm's.
"""

import io
import itertools
import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distill.data.files import EVAL_SPLITS, FileSplit, ImageFile

IMAGES = ("jpg", "jpeg", "png", "webp")
INFO = ("_info.json", "info.json")  # what timm reads for the shards of each split


def list_shards(root: str, train: str, evaluation: str | None, classes: Sequence[str] | None) -> list[FileSplit]:
    """Training and held-out samples. Reads the headers of the tars and the labels, no image.

    Args:
        root: the folder of the shards.
        train: a pattern such as train-{0000..0127}.tar, or the name of a split: of `_info.json`, else of the files
            NAME-*.tar or *-NAME-*.tar.
        evaluation: likewise; None: the first of val, validation, test that there is.
        classes: names in the order of the labels; None: the numbers.

    Raises:
        ValueError: for shards that are not there or not tars, and samples without an image or a label.
    """
    if not Path(root).is_dir():
        raise ValueError(f"root is {root!r}, which is not a folder; it must hold the shards")
    found = [_indexed(root, _shards(root, split)) for split in ((train,), (evaluation,) if evaluation else EVAL_SPLITS)]
    count = 1 + max(int(labels.max()) for _, labels in found)
    if classes is not None and len(classes) < count:
        raise ValueError(f"class_map names {len(classes)} classes; the shards have labels up to {count - 1}")
    names = tuple(classes or map(str, range(count)))
    return [FileSplit(Path(root), files, labels, names) for files, labels in found]


def expand(pattern: str) -> list[str]:
    """All names that a pattern stands for: a{08..11}.tar is a08.tar, a09.tar, a10.tar, a11.tar; a{x,y} is ax, ay."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[piece] if place % 2 == 0 else _choices(piece) for place, piece in enumerate(pieces)]
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choices(text: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if numbers is None:
        return text.split(",")
    first, last = numbers.groups()
    return [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]


def _shards(root: str, splits: Sequence[str]) -> list[Path]:
    """The files of the first of these splits that there is, in the order of the pattern, or of their names."""
    info = next((Path(root, name) for name in INFO if Path(root, name).is_file()), None)
    known = {} if info is None else json.loads(info.read_text()).get("splits", {})
    for split in splits:
        pattern = split.partition("|")[0]  # timm writes the number of samples behind a bar
        if split in known:
            found = [Path(root, name) for name in known[split]["filenames"]]
        elif pattern.endswith(".tar") or "{" in pattern:
            found = [Path(root, name) for name in expand(pattern)]
        else:
            found = sorted({*Path(root).glob(f"{split}-*.tar"), *Path(root).glob(f"*-{split}-*.tar")})
        if found:
            if missing := [path.name for path in found if not path.is_file()]:
                raise ValueError(f"{len(missing)} of {len(found)} shards are not in {root!r}, the first: {missing[0]}")
            return found
    raise ValueError(
        f"no shards of {' or '.join(splits)} in {root!r}: looked for splits of that name in _info.json, and for "
        f"{splits[0]}-*.tar; a pattern such as {splits[0]}-{{0000..0127}}.tar is allowed, too"
    )


def _indexed(root: str, shards: Sequence[Path]) -> tuple[list[ImageFile], np.ndarray]:
    """All samples of some shards, in their order, with their labels."""
    files: list[ImageFile] = []
    labels: list[int] = []
    for shard in shards:
        with shard.open("rb") as tar:  # once for all its labels: on a network's disk each opening costs
            for sample, members in _samples(shard, tar).items():
                image = next((members[ending] for ending in IMAGES if ending in members), None)
                if image is None or "cls" not in members:
                    lacks = "image" if image is None else "label, .cls"
                    raise ValueError(f"sample {sample} in {shard} has no {lacks}, only {', '.join(sorted(members))}")
                files.append(image)
                labels.append(_label(members["cls"], tar))
    if not files:
        raise ValueError(f"no samples in {len(shards)} shard(s) of {root!r}, the first is {shards[0]}")
    return files, np.array(labels, dtype=np.int64)


def _samples(shard: Path, opened: io.BufferedReader) -> dict[str, dict[str, ImageFile]]:
    """Of each sample the files by their endings, which begin at the first dot of the name."""
    found: dict[str, dict[str, ImageFile]] = {}
    try:
        with tarfile.open(fileobj=opened, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    stem, _, ending = name.partition(".")
                    file = ImageFile(member.name, str(shard), member.offset_data, member.size)
                    found.setdefault(f"{folder}/{stem}" if folder else stem, {})[ending.lower()] = file
    except tarfile.TarError as error:
        raise ValueError(f"cannot read {shard} as a tar (not compressed): {error}") from error
    return found


def _label(file: ImageFile, shard: io.BufferedReader) -> int:
    shard.seek(file.offset)
    text = shard.read(file.size)
    if not text.strip().isdigit():
        raise ValueError(f"the label {file} is {text[:20]!r}; it must be a number from 0 up")
    return int(text)
