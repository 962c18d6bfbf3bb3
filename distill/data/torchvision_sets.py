"""Classification sets of torchvision by name: it knows where files lie, what they are, and how to download them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.datasets

from distill.data.cifar_files import read_split
from distill.data.config import DataConfig
from distill.data.digits import held_out
from distill.data.files import ArrayImage, FileSplit, ImageFile, StoredImage
from distill.data.locks import alone_in
from distill.data.torchvision_names import TorchvisionSet, torchvision_set


def list_torchvision(config: DataConfig) -> list[FileSplit]:
    """Training and held-out images of the set that the config names; files on disk are not read yet.

    Raises:
        ValueError: if the set is not there, says where it was looked for; or if the download fails.
    """
    found = torchvision_set(config.name)
    assert found is not None and config.root is not None  # checked by the config
    if not found.splits:
        both = _open(config, found, None)
        both = both.part(np.array(sorted(range(len(both.files)), key=lambda i: str(both.files[i]))))  # SUN397's vary
        later = held_out(both.labels)
        return [both.part(np.flatnonzero(~later)), both.part(np.flatnonzero(later))]
    train = found.train if config.train_split == "train" else config.train_split
    train_files, eval_files = (_open(config, found, split) for split in (train, config.eval_split or found.eval))
    classes = max(train_files.classes, eval_files.classes, key=len)  # numbers, where torchvision gives no names
    return [FileSplit(s.path, s.files, s.labels, classes) for s in (train_files, eval_files)]


def _open(config: DataConfig, found: TorchvisionSet, split: str | None) -> FileSplit:
    """One split, downloaded first if the config says so."""
    assert config.root is not None
    root = Path(config.root).expanduser()
    cls = getattr(torchvision.datasets, found.cls)
    where: dict[str, Any] = {} if split is None else {"split": split}
    if found.by_flag:
        where = {"train": split == "train"}
    if found.variants:
        where["split"] = config.name.partition("/")[2]
    missing = (
        f"no {config.name} in {str(root)!r}: looked for {found.looks_for}. Get it with --data.download true, or put "
        f"there what {found.url} offers"
    )
    cifar = found.cls in ("CIFAR10", "CIFAR100")
    if config.download:
        with _first_of_this_machine(root):
            try:
                root.mkdir(parents=True, exist_ok=True)
                if cifar:  # its constructor would unpickle: `download` needs no more than the folder
                    holder = cls.__new__(cls)
                    holder.root = str(root)
                    holder.download()
                else:
                    cls(str(root), download=True, **where)
            except Exception as error:  # no network, a dead link, a wrong checksum, a full disk
                raise ValueError(
                    f"cannot download {config.name} to {str(root)!r}: {' '.join(str(error).split())}; "
                    f"copy {found.looks_for}, which {found.url} offers, to that folder"
                ) from error
    try:
        if cifar:
            images, labels, classes = read_split(cls, root, split == "train")
            return _split(str(root / cls.base_folder), _arrays(images, str(root / cls.base_folder)), labels, classes)
        dataset = cls(str(root), **where)
    except (RuntimeError, OSError) as error:  # "Dataset not found", or a folder that torchvision lists
        raise ValueError(missing) from error
    files, targets = _listed(dataset)
    names = [", ".join(name) if isinstance(name, tuple) else name for name in getattr(dataset, "classes", ())]
    if names[:1] == ["N/A"]:  # EMNIST's letters count from 1
        names, targets = names[1:], targets - 1
    return _split(str(root / config.name), files, targets, tuple(names))


def _split(path: str, files: Sequence[StoredImage], targets: Any, classes: tuple[str, ...]) -> FileSplit:
    labels = np.asarray(targets, dtype=np.int64)
    if len(labels) == 0:
        raise ValueError(f"{path} holds no images")
    return FileSplit(Path(path), list(files), labels, classes or tuple(map(str, range(labels.max() + 1))))


def _listed(dataset: Any) -> tuple[Sequence[StoredImage], np.ndarray]:
    """The images of one of torchvision's sets, and their classes, without decoding any."""
    data = getattr(dataset, "data", None)
    if data is not None:
        images = np.asarray(data)
        if images.ndim == 4 and images.shape[1] == 3:
            images = images.transpose(0, 2, 3, 1)
        labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
        return _arrays(images, str(dataset.root)), np.asarray(labels)
    for attribute in ("_samples", "samples"):
        if (pairs := getattr(dataset, attribute, None)) is not None:
            paths, labels = [path for path, _ in pairs], [label for _, label in pairs]
            break
    else:
        paths = next(getattr(dataset, name) for name in ("_image_files", "_images") if hasattr(dataset, name))
        labels = dataset._labels
    return [ImageFile(os.path.basename(path), str(path)) for path in paths], np.asarray(labels)


def _arrays(images: np.ndarray, path: str) -> list[ArrayImage]:
    return [ArrayImage(image, f"image {index} of {path}") for index, image in enumerate(images)]


@contextmanager
def _first_of_this_machine(root: Path) -> Iterator[None]:
    """With several processes one of each machine downloads, one machine after the other, then the others find it."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if distributed and not first:
        torch.distributed.barrier()
    with alone_in(root) if first else nullcontext():
        yield
    if distributed and first:
        torch.distributed.barrier()
