"""Which of torchvision's classification sets can be named, and where torchvision looks for them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TorchvisionSet:
    """How torchvision is asked for a set."""

    cls: str
    """Class of `torchvision.datasets`."""
    looks_for: str
    """What must lie below `root`."""
    url: str
    """Where the set is described and offered."""
    splits: tuple[str, ...] = ("train", "test")
    """Names of the splits; none where the set has only one: then every fifth image of a class is held out."""
    train: str = "train"
    """The split that is trained on unless `train_split` names another."""
    eval: str = "test"
    """The split that is held out unless `eval_split` names another."""
    by_flag: bool = False
    """Whether the class takes train=True or False, not the name of a split."""
    variants: tuple[str, ...] = ()
    """Parts of the set of which one must be named after a slash."""


_IDX = "the four idx files *-images-idx3-ubyte and *-labels-idx1-ubyte"

TORCHVISION = {
    "cifar10": TorchvisionSet(
        "CIFAR10", "cifar-10-batches-py/", "https://www.cs.toronto.edu/~kriz/cifar.html", by_flag=True
    ),
    "cifar100": TorchvisionSet(
        "CIFAR100", "cifar-100-python/", "https://www.cs.toronto.edu/~kriz/cifar.html", by_flag=True
    ),
    "mnist": TorchvisionSet("MNIST", f"MNIST/raw/ with {_IDX}", "http://yann.lecun.com/exdb/mnist", by_flag=True),
    "fashion_mnist": TorchvisionSet(
        "FashionMNIST",
        f"FashionMNIST/raw/ with {_IDX}",
        "https://github.com/zalandoresearch/fashion-mnist",
        by_flag=True,
    ),
    "kmnist": TorchvisionSet("KMNIST", f"KMNIST/raw/ with {_IDX}", "https://github.com/rois-codh/kmnist", by_flag=True),
    "emnist": TorchvisionSet(
        "EMNIST",
        "EMNIST/raw/ with the idx files emnist-SPLIT-train-* and emnist-SPLIT-test-*",
        "https://www.nist.gov/itl/products-and-services/emnist-dataset",
        by_flag=True,
        variants=("byclass", "bymerge", "balanced", "letters", "digits", "mnist"),
    ),
    "usps": TorchvisionSet(
        "USPS", "usps.bz2 and usps.t.bz2", "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets", by_flag=True
    ),
    "svhn": TorchvisionSet(
        "SVHN",
        "train_32x32.mat and test_32x32.mat",
        "http://ufldl.stanford.edu/housenumbers",
        splits=("train", "test", "extra"),
    ),
    "stl10": TorchvisionSet("STL10", "stl10_binary/", "https://cs.stanford.edu/~acoates/stl10"),
    "food101": TorchvisionSet(
        "Food101", "food-101/ with meta/ and images/", "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101"
    ),
    "flowers102": TorchvisionSet(
        "Flowers102",
        "flowers-102/ with jpg/, imagelabels.mat and setid.mat",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
        splits=("train", "val", "test"),
    ),
    "oxford_iiit_pet": TorchvisionSet(
        "OxfordIIITPet",
        "oxford-iiit-pet/ with images/ and annotations/",
        "https://www.robots.ox.ac.uk/~vgg/data/pets",
        splits=("trainval", "test"),
        train="trainval",
    ),
    "dtd": TorchvisionSet(
        "DTD",
        "dtd/dtd/ with images/ and labels/ (partition 1)",
        "https://www.robots.ox.ac.uk/~vgg/data/dtd",
        splits=("train", "val", "test"),
    ),
    "eurosat": TorchvisionSet(
        "EuroSAT", "eurosat/2750/ with a folder a class", "https://github.com/phelber/eurosat", splits=()
    ),
    "sun397": TorchvisionSet(
        "SUN397", "SUN397/ with ClassName.txt", "https://vision.princeton.edu/projects/2010/SUN", splits=()
    ),
    "gtsrb": TorchvisionSet(
        "GTSRB", "gtsrb/ with GTSRB/ and GT-final_test.csv", "https://benchmark.ini.rub.de/gtsrb_dataset.html"
    ),
    "fgvc_aircraft": TorchvisionSet(
        "FGVCAircraft",
        "fgvc-aircraft-2013b/data/",
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
        splits=("train", "val", "trainval", "test"),
        train="trainval",
    ),
    "stanford_cars": TorchvisionSet(
        "StanfordCars",
        "stanford_cars/ with devkit/, cars_train/, cars_test/ and cars_test_annos_withlabels.mat",
        "https://github.com/pytorch/vision/issues/7545",
    ),
    "country211": TorchvisionSet(
        "Country211",
        "country211/ with train/, valid/ and test/",
        "https://github.com/openai/CLIP/blob/main/data/country211.md",
        splits=("train", "valid", "test"),
        eval="valid",
    ),
    "imagenette": TorchvisionSet(
        "Imagenette", "imagenette2/", "https://github.com/fastai/imagenette", splits=("train", "val"), eval="val"
    ),
}
"""By the value of `data.name`."""


def torchvision_set(name: str) -> TorchvisionSet | None:
    """The set that a name stands for, with or without a variant after a slash; None if it is none of these."""
    return TORCHVISION.get(name.partition("/")[0])


def check_torchvision_fields(name: str, root: str | None, train_split: str, eval_split: str | None) -> None:
    """Refuses settings that torchvision could not follow.

    Raises:
        ValueError: names the field and the allowed values.
    """
    found = torchvision_set(name)
    assert found is not None
    variant = name.partition("/")[2]
    if found.variants and variant not in found.variants:
        allowed = ", ".join(f"{name.partition('/')[0]}/{each}" for each in found.variants)
        raise ValueError(f"name is {name!r}; allowed: {allowed}")
    if not found.variants and "/" in name:
        raise ValueError(f"name is {name!r}; allowed: {name.partition('/')[0]}")
    if not root:
        raise ValueError(
            f"root is {root!r}; name={name!r} needs the folder that holds {found.looks_for}, or where it is to be put"
        )
    for field, value, default in (("train_split", train_split, "train"), ("eval_split", eval_split, None)):
        if value != default and value not in found.splits:
            allowed = ", ".join(found.splits) or "none: every fifth image of a class is held out"
            raise ValueError(f"{field} is {value!r}; name={name!r} allows {allowed}")
