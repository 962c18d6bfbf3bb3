"""The images of a run as map-style datasets: a training and a held-out set with the same classes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.data.config import DataConfig, Preprocessing
from distill.data.digits import CLASSES, load_digits, rank_in_class
from distill.data.event_config import is_events
from distill.data.everywhere import check_same_images, from_all
from distill.data.faults import Unreadable, find_unreadable
from distill.data.files import ONE_FOLDER, DecodedOnRead, FileSplit
from distill.data.image_set import ImageSet
from distill.data.sources import list_files
from distill.data.synthetic import synthetic_images, synthetic_labels
from distill.data.transforms import EvalTransform, Transform, train_transform
from models.images import UnreadableImage, image_mode

MEMORY_BYTES = 2**30  # what in_memory=None allows for train and eval together
PROBES = 64  # images whose headers stand for all when sizes vary


@dataclass(frozen=True)
class Splits:
    """What a run trains on and is judged on."""

    train: ImageSet
    eval: ImageSet
    classes: tuple[str, ...]
    """Name of each class, in the order of the labels."""


def load_data(
    config: DataConfig,
    preprocessing: Preprocessing,
    seed: int = 0,
    timesteps: int | None = None,
    training: bool = True,
) -> Splits:
    """Open the images that the config names, as the teacher expects them.

    Args:
        config: which images, and the augmentation of the training set.
        preprocessing: size and normalisation.
        seed: of the augmentation, from 0 up; which images are held out does not depend on it.
        timesteps: T, of event data the frames of a recording, items (T, C, H, W) and batches (T, B, C, H, W); None: the
            sum over all frames, an image, as an analogue network sees it. Images are the same for every T.
        training: whether there are images to train on. Without, none is read, and folders and tars need no training
            split: what the held-out one has are the classes.

    Raises:
        ValueError: if there is nothing to read, there are not two classes, or processes of one run have found different
            images.
    """
    splits = _opened(config, preprocessing, seed, timesteps, training)
    check_same_images(splits.train, splits.eval)
    return splits


def _opened(
    config: DataConfig, preprocessing: Preprocessing, seed: int, timesteps: int | None, training: bool
) -> Splits:
    if is_events(config):
        from distill.data.events import load_events  # which is built on this file

        return load_events(config, preprocessing, seed, timesteps, training)
    load = {"digits": _load_digits, "synthetic": _load_synthetic}.get(config.name, _load_files)
    transforms = train_transform(config, preprocessing), EvalTransform(preprocessing)
    return load(config, preprocessing, *transforms, seed, training)


def _load_digits(
    config: DataConfig, pre: Preprocessing, train: Transform[Any], evaluate: Transform[Any], seed: int, training: bool
) -> Splits:
    images, labels, held_out = load_digits(pre)
    channels = pre.input_size[0]

    def image_set(members: np.ndarray, limit: int | None, transform: Transform[Any]) -> ImageSet:
        members = members[spread(labels[members], limit)]
        if transform.stored_shape is None:  # timm's crop wants PIL images
            mode = image_mode(channels)
            stored: Any = [Image.fromarray(images[i]).convert(mode) for i in members]
        else:
            stored = torch.from_numpy(images[members]).unsqueeze(1).repeat(1, channels, 1, 1)
        return ImageSet(stored, labels[members], transform, seed, in_memory=True)

    return Splits(
        image_set(np.flatnonzero(~held_out), most_to_train_on(config, training), train),
        image_set(np.flatnonzero(held_out), config.max_eval_samples, evaluate),
        CLASSES,
    )


def _load_synthetic(
    config: DataConfig, pre: Preprocessing, train: Transform[Any], evaluate: Transform[Any], seed: int, training: bool
) -> Splits:
    labels, later = synthetic_labels(config)

    def image_set(members: np.ndarray, limit: int | None, transform: Transform[Any]) -> ImageSet:
        members = members[spread(labels[members], limit)]
        return ImageSet(synthetic_images(pre, transform, members), labels[members], transform, seed, in_memory=True)

    return Splits(
        image_set(np.flatnonzero(~later), most_to_train_on(config, training), train),
        image_set(np.flatnonzero(later), config.max_eval_samples, evaluate),
        tuple(map(str, range(config.synthetic_classes))),
    )


def _load_files(
    config: DataConfig, pre: Preprocessing, train: Transform[Any], evaluate: Transform[Any], seed: int, training: bool
) -> Splits:
    if pre.input_size[0] not in (1, 3):
        raise ValueError(f"input_size is {pre.input_size}; image files allow 1 (grey) or 3 (RGB) channels")
    train_files, eval_files = list_files(config, training)
    _check_classes(train_files, eval_files)
    sets = [
        (limited(train_files, most_to_train_on(config, training)), train),
        (limited(eval_files, config.max_eval_samples), evaluate),
    ]
    mode = image_mode(pre.input_size[0])
    in_memory = config.in_memory
    if in_memory is None:
        needed = sum(estimated_bytes(f, transform, len(mode), config.on_corrupt == "skip") for f, transform in sets)
        in_memory = from_all(needed <= MEMORY_BYTES)[0]  # headers that one process alone cannot read decide nothing

    def image_set(files: FileSplit, transform: Transform[Any]) -> ImageSet:
        record = None
        skip = config.on_corrupt == "skip" and len(files.files) > 0
        if skip and not in_memory and transform is evaluate:  # no other image may count in the place of one
            record = find_unreadable(files.files, mode)
            files = files.part(record.kept())
        elif skip:
            record = Unreadable(files.files)
        images: Any = DecodedOnRead(files.files, mode, transform.prepare)
        if in_memory:
            images = _collect(images, transform.stored_shape, record)
            files = files if record is None else files.part(record.kept())
        substitute = skip and not in_memory and transform is train
        # text alone, where the files hold pixels that are not needed any more
        names: Any = list(map(str, files.files)) if in_memory else files.files
        return ImageSet(
            images, files.labels, transform, seed, in_memory, unreadable=record, substitute=substitute, names=names
        )

    train_set, eval_set = (image_set(files, transform) for files, transform in sets)
    return Splits(train_set, eval_set, train_files.classes)


def _collect(
    images: DecodedOnRead, shape: tuple[int, int, int] | None, record: Unreadable | None
) -> Tensor | list[Any]:
    """All images in one uint8 tensor where they have one shape, which costs forked workers nothing; else a list.

    Those that cannot be read are left out where there is a record of them, else they are an error.
    """
    found: Any = [] if shape is None else torch.empty((len(images), *shape), dtype=torch.uint8)
    count = 0
    for index in range(len(images)):
        try:
            image = images[index]
        except UnreadableImage as error:
            if record is None:
                raise
            record.add(index, error)
            continue
        if shape is None:
            found.append(image)
        else:
            found[count] = image
        count += 1
    return found[:count]


def estimated_bytes(files: FileSplit, transform: Transform[Any], channels: int, skip: bool = False) -> int:
    """Memory for all prepared images; from the headers of some when their sizes vary.

    Args:
        skip: whether headers that cannot be read do not count.
    """
    if transform.stored_shape is not None:
        return len(files.files) * math.prod(transform.stored_shape)
    sizes = []
    for probe in files.files[:: math.ceil(len(files.files) / PROBES) or 1]:
        try:
            sizes.append(probe.pixels())
        except UnreadableImage:
            if not skip:
                raise
    return len(files.files) * channels * sum(sizes) // max(1, len(sizes))


def most_to_train_on(config: DataConfig, training: bool) -> int | None:
    """How many training images are wanted at most; None: all."""
    return config.max_train_samples if training else 0


def limited(files: FileSplit, limit: int | None) -> FileSplit:
    """The split with only `limit` of its images, spread over its classes."""
    return files.part(spread(files.labels, limit))


def spread(labels: np.ndarray, limit: int | None) -> np.ndarray:
    """Indices of `limit` images: the first of every class, then the second, and so on; in their own order."""
    if limit is None:
        return np.arange(len(labels))
    return np.sort(np.lexsort((labels, rank_in_class(labels)))[:limit])


def check_several(classes: Sequence[str], where: object) -> None:
    """One class teaches nothing, and is most often a folder around those of the classes.

    Raises:
        ValueError: for fewer than two classes; names the one.
    """
    if len(classes) < 2:
        found = f"the class {classes[0]!r} alone" if classes else "no class"
        raise ValueError(f"{where} has {found}, at least two are needed; in folders and tars {ONE_FOLDER}")


def _check_classes(train: FileSplit, evaluate: FileSplit) -> None:
    for split in (train, evaluate):
        check_several(split.classes, split.path)
    if train.classes == evaluate.classes:
        return
    differences = [
        f"only in {here.path}: {_some(set(here.classes) - set(there.classes))}"
        for here, there in ((train, evaluate), (evaluate, train))
        if set(here.classes) - set(there.classes)
    ]
    raise ValueError(f"train and eval must have the same classes; {'; '.join(differences)}")


def _some(names: set[str]) -> str:
    first = ", ".join(sorted(names)[:5])
    return first if len(names) <= 5 else f"{first} and {len(names) - 5} more"
