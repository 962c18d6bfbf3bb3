"""What to read and how to augment it (`DataConfig`); what the teacher expects to see (`models.preprocessing`)."""

from dataclasses import dataclass
from typing import Literal

from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

from distill.data.event_config import EVENTS, check_event_fields
from distill.data.torchvision_names import TORCHVISION, check_torchvision_fields, torchvision_set
from models.preprocessing import Preprocessing

__all__ = ["DataConfig", "Preprocessing"]

NAMES = ("digits", "synthetic", "folder", *TORCHVISION, "wds/NAME", "hfds/NAME", *EVENTS)
WITHOUT_FILES = ("digits", "synthetic")
POLICIES = ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images to train and evaluate on, and the augmentation of the training images."""

    name: str = "digits"
    """digits: scikit-learn's 1,797 grey 8x8 digits, no download; folder: image folders or tar files below root;
    cifar10, cifar100, mnist, fashion_mnist, kmnist, emnist/letters, svhn, stl10, food101, flowers102, oxford_iiit_pet,
    dtd, eurosat, gtsrb, fgvc_aircraft, stanford_cars and others: torchvision's; wds/NAME: WebDataset shards below
    root; hfds/NAME: Hugging Face datasets; synthetic: noise, to measure speed (docs/data.md); nmnist,
    cifar10_dvs, dvs128_gesture: recordings of event cameras, as student.timesteps frames (docs/event_data.md)."""
    root: str | None = None
    """Folder that holds the splits: train/ and val/ with one sub-folder a class, or train.tar and val.tar; of sets by
    name where they lie or are downloaded to; of event data the folder of the recordings or of their archives, or one
    archive."""
    download: bool = False
    """Download a set of torchvision's to root if it is not there."""
    train_split: str = "train"
    """Name of the training sub-folder, or of its tar without the ending, or of a split of a set by name; of shards also
    a pattern such as train-{0000..0127}.tar."""
    eval_split: str | None = None
    """Name of the held-out sub-folder, tar or split; None: the first of val, validation, test that exists, or the
    usual one of a set by name."""
    class_map: str | None = None
    """A text file with the name of each class on a line of its own, in the order of the labels, where the splits lack
    some classes or are in another order; None: the names of the sub-folders, in alphabetical order."""
    crop_padding: int = 0
    """Pixels of reflected padding on each side before a random crop to the input size; 0: no such crop."""
    hflip: float = 0.0
    """Probability that a training image is mirrored left to right, in [0, 1]."""
    random_resized_crop: bool = False
    """Train on random crops of 8 to 100 % of the area, resized (timm's ImageNet training crop)."""
    auto_augment: str | None = None
    """timm's auto-augment policy for training images, e.g. rand-m9-mstd0.5."""
    random_erasing: float = 0.0
    """Probability that a rectangle of a training image is replaced by noise, in [0, 1]."""
    max_train_samples: int | None = None
    """Keep only so many training images, the first of every class in turn; None: all."""
    max_eval_samples: int | None = None
    """Keep only so many held-out images, the first of every class in turn; None: all."""
    in_memory: bool | None = None
    """Decode once and keep the images in memory as uint8; None: when train and eval need at most about 1 GiB."""
    cache: str | None = None
    """Folder for the frames of event data; None: root itself, or the folder of the archive that root is."""
    event_shift: int = 0
    """Most pixels by which the training frames of a recording are shifted up, down and sideways, around the edges."""
    on_corrupt: Literal["error", "skip"] = "error"
    """What an image that cannot be read does: stop the run with its name, or be left out and reported."""
    synthetic_samples: int = 1280
    """Images of name=synthetic; every fifth of a class is held out."""
    synthetic_classes: int = 10
    """Classes of name=synthetic."""
    workers: int | None = None
    """Loader processes; None: 0 when the images are in memory, else the number of CPUs for each process
    of this machine, at most 8."""

    def __post_init__(self) -> None:
        kind, _, rest = self.name.partition("/")
        by_name = torchvision_set(self.name) is not None
        readers = kind in ("wds", "hfds") and bool(rest)
        if not (self.name in (*WITHOUT_FILES, "folder", *EVENTS) or by_name or readers):
            raise ValueError(f"name is {self.name!r}; allowed: {', '.join(NAMES)}")
        check_event_fields(self)
        if self.name == "folder" and not self.root:
            raise ValueError(f"root is {self.root!r}; name='folder' needs the path of a folder with the splits")
        if kind == "wds" and not self.root:
            raise ValueError(f"root is {self.root!r}; name={self.name!r} needs the path of the folder of the shards")
        if by_name:
            check_torchvision_fields(self.name, self.root, self.train_split, self.eval_split)
        if (by_name or kind == "hfds") and self.class_map is not None:
            raise ValueError(f"class_map is {self.class_map!r}; name={self.name!r} has its classes: leave it out")
        if self.download and not by_name:
            raise ValueError(f"download is True; name={self.name!r} downloads nothing: allowed is False")
        if self.name in WITHOUT_FILES:
            for field in ("root", "eval_split", "class_map"):
                if getattr(self, field) is not None:
                    raise ValueError(
                        f"{field} is {getattr(self, field)!r}; name={self.name!r} reads no files: leave it out"
                    )
            if self.in_memory is False:
                raise ValueError(
                    f"in_memory is False; name={self.name!r} is always in memory: allowed are True and None"
                )
        if self.on_corrupt not in ("error", "skip"):
            raise ValueError(f"on_corrupt is {self.on_corrupt!r}; allowed: error, skip")
        if not 2 <= self.synthetic_classes <= self.synthetic_samples // 5:
            raise ValueError(
                f"synthetic_classes is {self.synthetic_classes}; allowed: 2 to synthetic_samples // 5, "
                f"{self.synthetic_samples // 5}"
            )
        for field in ("train_split", "eval_split"):
            if getattr(self, field) == "":
                raise ValueError(f"{field} is ''; allowed: the name of a sub-folder or tar of root")
        for field in ("hflip", "random_erasing"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                raise ValueError(f"{field} is {getattr(self, field)}; allowed: a probability in [0, 1]")
        for field, least in (("crop_padding", 0), ("max_train_samples", 1), ("max_eval_samples", 1), ("workers", 0)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise ValueError(f"{field} is {value}; allowed: integers from {least} up")
        if self.random_resized_crop and self.crop_padding:
            raise ValueError(f"crop_padding is {self.crop_padding}; with random_resized_crop only 0 is allowed")
        if self.auto_augment is not None:
            _check_policy(self.auto_augment)


def _check_policy(policy: str) -> None:
    """Let timm parse the policy now: its own complaint is an assertion in the middle of a run."""
    kind = policy.split("-")[0]
    build = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}.get(kind, auto_augment_transform)
    try:
        if kind not in POLICIES:
            raise ValueError(f"unknown policy {kind!r}")
        build(policy, {"translate_const": 1, "img_mean": (0, 0, 0)})
    except (AssertionError, ValueError) as error:
        allowed = f"one of {', '.join(POLICIES)}, with timm's options, e.g. rand-m9-mstd0.5"
        raise ValueError(f"auto_augment is {policy!r} ({error}); allowed: {allowed}") from error
