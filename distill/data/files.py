"""Image files in class folders or in tar files: listed by timm's functions, read and decoded here.

timm's own dataset replaces an image that it cannot read by the next one, and its tar reader shares one file position
between forked workers. We take the list of images from it and read each at its own offset.

Classes are numbered in alphabetical order of their folder names, as torchvision's ImageFolder does, whereas timm sorts
numbers inside a name by value. Both give CIFAR-10 (0 airplane .. 9 truck) and ImageNet (wnids) their usual indices;
they differ for names such as 2 and 10, or a and B, and then a warning says so.
"""

import io
import os
import tarfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.data.readers.reader_image_in_tar import extract_tarinfos
from timm.utils.misc import natural_key

from models.images import decoded, unreadable

EVAL_SPLITS = ("val", "validation", "test")
FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
"""Endings of image files, in small letters: those of torchvision's ImageFolder. timm alone takes the first three."""
ONE_FOLDER = "a class is one folder, with its images directly in it"


class StoredImage(Protocol):
    """An image that is decoded when it is asked for; its `str` says where it lies."""

    def open(self, mode: str) -> Image.Image:
        """The image in PIL's `mode`, decoded; UnreadableImage, with its name, if that cannot be."""
        ...

    def pixels(self) -> int:
        """Height x width."""
        ...


class ArrayImage(NamedTuple):
    """An image whose pixels are at hand, uint8 (H, W) or (H, W, 3)."""

    values: np.ndarray
    name: str

    def __str__(self) -> str:
        return self.name

    def open(self, mode: str) -> Image.Image:
        return Image.fromarray(self.values).convert(mode)

    def pixels(self) -> int:
        return self.values.shape[0] * self.values.shape[1]


class EncodedImage(ABC):
    """A stored image that Pillow decodes; a subclass finds its bytes and gives it a `str`."""

    __slots__ = ()

    @abstractmethod
    def undecoded(self) -> Image.Image:
        """The image as Pillow opens it: its header is read, its pixels are not."""

    def open(self, mode: str) -> Image.Image:
        """The image in PIL's `mode`, decoded; an image that cannot be decoded is an error."""
        return decoded(self.undecoded, mode, self)

    def pixels(self) -> int:
        """Height x width, from the image's header only."""
        try:
            image = self.undecoded()
        except Exception as error:
            raise unreadable(self, error) from error
        return image.width * image.height


@dataclass(frozen=True, slots=True)
class ImageFile(EncodedImage):
    """Where one image's bytes lie."""

    name: str
    """Path of the image inside its split."""
    path: str
    """The file on disk: the image itself or the tar around it."""
    offset: int = 0
    """First byte of the image in that file."""
    size: int | None = None
    """Number of bytes; None: to the end of the file."""

    def __str__(self) -> str:
        return self.path if self.size is None else f"{self.name} in {self.path}"

    def undecoded(self) -> Image.Image:
        with open(self.path, "rb") as file:  # opened anew each time: workers never share a file position
            file.seek(self.offset)
            data = file.read(self.size if self.size is not None else -1)
        if self.size is not None and len(data) != self.size:
            raise ValueError(f"the tar ends after {len(data)} of its {self.size} bytes")
        return Image.open(io.BytesIO(data))


@dataclass(frozen=True)
class FileSplit:
    """The images of one split, sorted by name."""

    path: Path
    files: Sequence[StoredImage]
    labels: np.ndarray
    """Class of each image, int64, an index into `classes`."""
    classes: tuple[str, ...]
    """Names of the classes, of folders in alphabetical order."""

    def part(self, members: np.ndarray) -> "FileSplit":
        """Only some of the images, by their indices."""
        return FileSplit(self.path, [self.files[i] for i in members], self.labels[members], self.classes)


class DecodedOnRead(Sequence[Any]):
    """Images that are decoded and prepared anew at every access."""

    def __init__(self, files: Sequence[StoredImage], mode: str, prepare: Callable[[Image.Image], Any]):
        self._files, self._mode, self._prepare = files, mode, prepare

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Any) -> Any:
        return self._prepare(self._files[index].open(self._mode))


def find_split(root: str, split: str | None) -> Path:
    """Folder or tar of a split below root; with split None the first of val, validation, test that exists."""
    names = EVAL_SPLITS if split is None else (split,)
    if not Path(root).is_dir():
        raise ValueError(f"root is {root!r}, which is not a folder; looked for {_alternatives(names)} in it")
    for name in names:
        for path in (Path(root, name), Path(root, f"{name}.tar")):
            if path.is_dir() if path.suffix != ".tar" else path.is_file():
                return path
    raise ValueError(f"nothing to read in {root!r}: looked for {_alternatives(names)}")


def read_class_map(path: str) -> tuple[str, ...]:
    """Names of classes, one a line, in the order of their labels; empty lines do not count."""
    try:
        names = tuple(line.strip() for line in Path(path).read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"class_map is {path!r}, which cannot be read as text: {error}") from error
    twice = sorted({name for name in names if names.count(name) > 1})[:3] if len(set(names)) < len(names) else []
    if twice or not names:
        raise ValueError(
            f"class_map {path!r} must name each class once, " + (f"found twice: {twice}" if twice else "found none")
        )
    return names


def list_split(path: Path, classes: Sequence[str] | None = None) -> FileSplit:
    """All images of a split, with their classes. Reads names and tar headers, no image.

    Args:
        classes: the names of all classes in the order of the labels; None: those of the split, alphabetically.

    Raises:
        ValueError: if it holds no images, or some lie anywhere but directly in the one folder (or tar) of their class.
    """
    found = _in_tar(path) if path.is_file() else _in_folder(path)
    found.sort(key=lambda item: item[0].name)  # timm's own order leaves ties as the file system has them
    outside = [file for file, name in found if name in ("", ".")]
    if outside:
        raise ValueError(f"{len(outside)} image(s) outside of class folders, the first is {outside[0]}")
    _check_folders(path, found)
    if classes is not None:
        if unknown := sorted({name for _, name in found} - set(classes)):
            raise ValueError(f"{len(unknown)} class(es) of {path} are not in the class map, the first: {unknown[:3]}")
        return _split(path, found, tuple(classes))
    classes = tuple(sorted({name for _, name in found}))
    if list(classes) != sorted(classes, key=natural_key):
        warnings.warn(
            f"the classes of {path} are numbered in alphabetical order (2 after 10, B before a), like torchvision's "
            "ImageFolder; timm would number them differently: check the teacher's order",
            stacklevel=2,
        )
    return _split(path, found, classes)


def _split(path: Path, found: list[tuple[ImageFile, str]], classes: tuple[str, ...]) -> FileSplit:
    index = {name: i for i, name in enumerate(classes)}
    labels = np.array([index[name] for _, name in found], dtype=np.int64)
    return FileSplit(path, [file for file, _ in found], labels, classes)


def _check_folders(path: Path, found: list[tuple[ImageFile, str]]) -> None:
    """timm names a class after the last folder alone: cat/day and dog/day were one class, cat/ and cat/day two."""
    folders: dict[str, PurePath] = {}
    for folder, name in sorted({(_folder_of(file.name), name) for file, name in found}):
        other = folders.setdefault(name, PurePath(folder))
        if other != PurePath(folder):
            raise ValueError(f"images of class {name!r} of {path} lie in {other} and in {folder}; {ONE_FOLDER}")
    of_classes = set(folders.values())
    for inner in sorted(of_classes):
        if outer := next((parent for parent in inner.parents if parent in of_classes), None):
            raise ValueError(f"images of {path} lie in {outer} and in {inner} inside of it; {ONE_FOLDER}")


def _folder_of(name: str) -> str:
    """Of an image: inside of a tar in a tar, which may hold parts of several classes, if there is one; else the tar."""
    return os.path.dirname(name.rpartition(".tar/")[2]) or os.path.dirname(name)


def _in_folder(path: Path) -> list[tuple[ImageFile, str]]:
    samples, indices = find_images_and_targets(str(path), types=FORMATS)
    if not samples:
        raise ValueError(_no_images(path))
    name = {index: name for name, index in indices.items()}
    return [(ImageFile(os.path.relpath(file, path), file), name[label]) for file, label in samples]


def _in_tar(path: Path) -> list[tuple[ImageFile, str]]:
    try:
        # cache_tarinfo=False: for tars above 10 GB timm would leave a pickle next to them, and read it next time.
        samples, labels, indices, _ = extract_tarinfos(str(path), cache_tarinfo=False, extensions=FORMATS)
    except tarfile.TarError as error:
        raise ValueError(f"cannot read {path} as a tar (not compressed): {error}") from error
    except ValueError as error:  # unpacking its empty list of samples
        raise ValueError(_no_images(path)) from error
    classes = {index: name for name, index in indices.items()}
    found = []
    for (member, _, inner_tar), label in zip(samples, labels, strict=True):
        start, name = (inner_tar.offset_data, f"{inner_tar.name}/") if inner_tar is not None else (0, "")
        file = ImageFile(name + member.name, str(path), start + member.offset_data, member.size)
        found.append((file, classes[label]))
    return found


def _no_images(path: Path) -> str:
    return f"no images in {path}: looked for {', '.join(FORMATS)} files in one folder a class"


def _alternatives(names: Sequence[str]) -> str:
    return " or ".join(f"{name}/ or {name}.tar" for name in names)
