"""Files in the formats that torchvision reads, written here, against torchvision's own classes."""

import bz2
import hashlib
import io
import json
import os
import pickle
import struct
import urllib.error
from contextlib import contextmanager

import numpy as np
import pytest
import scipy.io
import torchvision.datasets
from PIL import Image

from distill.data import DataConfig, ImageSet, Preprocessing, load_data
from distill.data.cifar_files import load_arrays
from distill.data.torchvision_names import TORCHVISION


def preprocessing(size=8, channels=3) -> Preprocessing:
    """Pixels as they are in [0, 255], up to rounding."""
    return Preprocessing(
        input_size=(channels, size, size), mean=(0.0,) * channels, std=(1 / 255,) * channels, interpolation="nearest"
    )


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def same_as_torchvision(image_set: ImageSet, expected, order=None) -> None:
    """The same images, in RGB, and labels as torchvision's class gives, bit by bit."""
    assert len(image_set) == len(expected if order is None else order) > 0
    for index, theirs in enumerate(range(len(expected)) if order is None else order):
        image, label = expected[theirs]
        ours, our_label = image_set[index]
        assert our_label == label
        assert (ours.round().byte().permute(1, 2, 0).numpy() == np.asarray(image.convert("RGB"))).all()


def write_idx(path, values: np.ndarray) -> None:
    """The format of MNIST: two zeros, 8 for bytes, number of axes, sizes, values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}i", *values.shape) + values.tobytes())


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_idx_files_are_read_as_torchvision_reads_them(name, folder, tmp_path):
    for seed, prefix in enumerate(("train", "t10k")):
        write_idx(tmp_path / folder / "raw" / f"{prefix}-images-idx3-ubyte", noise(20, 8, 8, seed=seed))
        write_idx(tmp_path / folder / "raw" / f"{prefix}-labels-idx1-ubyte", (np.arange(20) % 10).astype(np.uint8))
    splits = load_data(DataConfig(name=name, root=str(tmp_path)), preprocessing())
    cls = getattr(torchvision.datasets, folder)
    assert splits.classes == tuple(cls.classes) and splits.train.in_memory
    same_as_torchvision(splits.train, cls(tmp_path, train=True))
    same_as_torchvision(splits.eval, cls(tmp_path, train=False))
    grey = load_data(DataConfig(name=name, root=str(tmp_path)), preprocessing(channels=1)).train[3][0]
    assert (grey[0].round().byte().numpy() == noise(20, 8, 8)[3]).all()


def test_the_letters_of_emnist_count_from_zero(tmp_path):
    for part in ("train", "test"):
        write_idx(tmp_path / f"EMNIST/raw/emnist-letters-{part}-images-idx3-ubyte", noise(26, 8, 8))
        write_idx(tmp_path / f"EMNIST/raw/emnist-letters-{part}-labels-idx1-ubyte", np.arange(1, 27, dtype=np.uint8))
    splits = load_data(DataConfig(name="emnist/letters", root=str(tmp_path)), preprocessing())
    assert "".join(splits.classes) == "abcdefghijklmnopqrstuvwxyz"
    assert splits.train.labels.tolist() == list(range(26))


def write_cifar(root, monkeypatch, cls, counts, tamper=None) -> None:
    """Batches as the official ones are pickled, Python 2's protocol; their checksums become the official ones."""
    folder, names = root / cls.base_folder, [f"class {i}" for i in range(10)]
    folder.mkdir()
    key = "labels" if cls is torchvision.datasets.CIFAR10 else "fine_labels"
    sums = {}
    for seed, (file, count) in enumerate(counts.items()):
        batch = {"data": noise(count, 3072, seed=seed), key: [(i + seed) % 10 for i in range(count)]}
        (folder / file).write_bytes(
            pickle.dumps(batch if tamper is None or seed else {**batch, "x": tamper}, protocol=2)
        )
    (folder / cls.meta["filename"]).write_bytes(pickle.dumps({cls.meta["key"]: names}, protocol=2))
    for file in folder.iterdir():
        sums[file.name] = hashlib.md5(file.read_bytes()).hexdigest()
    files = [[name, sums[name]] for name in counts]
    monkeypatch.setattr(cls, "train_list", files[:-1])
    monkeypatch.setattr(cls, "test_list", files[-1:])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": sums[cls.meta["filename"]]})


CIFARS = {
    "cifar10": (torchvision.datasets.CIFAR10, {"data_batch_1": 20, "data_batch_2": 20, "test_batch": 10}),
    "cifar100": (torchvision.datasets.CIFAR100, {"train": 20, "test": 10}),
}


@pytest.mark.parametrize("name", CIFARS)
@pytest.mark.parametrize("in_memory", [True, False])
def test_cifar_batches_are_read_as_torchvision_reads_them(name, in_memory, tmp_path, monkeypatch):
    cls, counts = CIFARS[name]
    write_cifar(tmp_path, monkeypatch, cls, counts)
    splits = load_data(DataConfig(name=name, root=str(tmp_path), in_memory=in_memory), preprocessing(32))
    assert splits.classes == tuple(f"class {i}" for i in range(10))
    same_as_torchvision(splits.train, cls(tmp_path, train=True))
    same_as_torchvision(splits.eval, cls(tmp_path, train=False))


class Malice:
    """Unpickling this makes a folder."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_a_cifar_batch_that_would_run_code_is_refused_and_nothing_runs(tmp_path, monkeypatch):
    cls, counts = CIFARS["cifar10"]
    write_cifar(tmp_path, monkeypatch, cls, counts, tamper=Malice(str(tmp_path / "ran")))  # with matching checksums
    with pytest.raises(ValueError, match=r"cannot read .*data_batch_1: it asks for (posix|nt).mkdir"):
        load_data(DataConfig(name="cifar10", root=str(tmp_path)), preprocessing(32))
    assert not (tmp_path / "ran").exists()
    cls(tmp_path)  # what torchvision's own reader does with the same file
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_arrays_of_every_old_protocol_are_read(protocol):
    values = {"data": noise(4, 6), "labels": [1, 2], "name": "x"}
    found = load_arrays(io.BytesIO(pickle.dumps(values, protocol=protocol)))
    assert (found["data"] == values["data"]).all() and (found["labels"], found["name"]) == ([1, 2], "x")


@pytest.mark.parametrize("call", [b"cos\nsystem\n(S'false'\ntR.", b"cbuiltins\neval\n(S'1'\ntR.", b"cnumpy\nload\n."])
def test_no_function_is_looked_up(call):
    with pytest.raises(pickle.UnpicklingError, match="which no batch of images needs"):
        load_arrays(io.BytesIO(call))


def test_a_cifar_batch_with_another_checksum_is_refused(tmp_path, monkeypatch):
    cls, counts = CIFARS["cifar10"]
    write_cifar(tmp_path, monkeypatch, cls, counts)
    with (tmp_path / cls.base_folder / "data_batch_2").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="data_batch_2 is not the official file"):
        load_data(DataConfig(name="cifar10", root=str(tmp_path)), preprocessing(32))


def test_a_mat_file_of_svhn_has_its_ten_as_zero(tmp_path, monkeypatch):
    sums = {}
    for seed, split in enumerate(("train", "test")):
        file = tmp_path / f"{split}_32x32.mat"
        labels = np.arange(1, 11, dtype=np.uint8)[:, None]
        scipy.io.savemat(file, {"X": noise(32, 32, 3, 10, seed=seed), "y": labels})
        sums[split] = ["http://nowhere", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", sums)
    splits = load_data(DataConfig(name="svhn", root=str(tmp_path)), preprocessing(32))
    assert splits.classes == tuple("0123456789")
    assert splits.train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    same_as_torchvision(splits.train, torchvision.datasets.SVHN(tmp_path, split="train"))


def save(path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(8, 8, 3, seed=seed)).save(path, quality=95)


def write_food101(root) -> None:
    for split, numbers in (("train", (1, 2)), ("test", (3,))):
        (root / "food-101/meta").mkdir(parents=True, exist_ok=True)
        names = {food: [f"{food}/{i}" for i in numbers] for food in ("waffles", "apple_pie")}
        (root / f"food-101/meta/{split}.json").write_text(json.dumps(names))
        for seed, name in enumerate(name for part in names.values() for name in part):
            save(root / f"food-101/images/{name}.jpg", seed)


def write_pets(root) -> None:
    lines = [("Abyssinian_1", 1), ("pug_2", 2), ("Abyssinian_3", 1), ("pug_4", 2)]
    (root / "oxford-iiit-pet/annotations").mkdir(parents=True)
    for split, part in (("trainval", lines[:2]), ("test", lines[2:])):
        text = "".join(f"{name} {label} 1 1\n" for name, label in part)
        (root / f"oxford-iiit-pet/annotations/{split}.txt").write_text(text)
    for seed, (name, _) in enumerate(lines):
        save(root / f"oxford-iiit-pet/images/{name}.jpg", seed)


def write_gtsrb(root) -> None:
    for seed in range(4):
        save(root / f"gtsrb/GTSRB/Training/0000{seed % 2}/{seed}.ppm", seed)
        save(root / f"gtsrb/GTSRB/Final_Test/Images/{seed}.ppm", seed + 9)
    rows = "".join(f"{seed}.ppm;8;8;0;0;7;7;{seed % 2}\n" for seed in range(4))
    (root / "gtsrb/GT-final_test.csv").write_text(f"Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n{rows}")


def write_aircraft(root) -> None:
    data = root / "fgvc-aircraft-2013b/data"
    save(data / "images/1.jpg", 1), save(data / "images/2.jpg", 2), save(data / "images/3.jpg", 3)
    (data / "variants.txt").write_text("707-320\nA300\n")
    (data / "images_variant_trainval.txt").write_text("2 A300\n1 707-320\n")
    (data / "images_variant_test.txt").write_text("3 A300\n")


def write_dtd(root) -> None:
    (root / "dtd/dtd/labels").mkdir(parents=True)
    for split, numbers in (("train", (1, 2)), ("val", (3,)), ("test", (4, 5))):
        names = [f"{kind}/{kind}_{i}.jpg" for i in numbers for kind in ("woven", "banded")]
        (root / f"dtd/dtd/labels/{split}1.txt").write_text("\n".join(names))
        for seed, name in enumerate(names):
            save(root / f"dtd/dtd/images/{name}", seed)


def write_country211(root) -> None:
    for split in ("train", "valid", "test"):
        for seed in range(4):
            save(root / f"country211/{split}/{'AD' if seed < 2 else 'ZW'}/{seed}.jpg", seed)


def write_imagenette(root) -> None:
    for split in ("train", "val"):
        for seed in range(4):
            save(root / f"imagenette2/{split}/{'n01440764' if seed < 2 else 'n02102040'}/{seed}.JPEG", seed)


def write_cars(root) -> None:
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    scipy.io.savemat(base / "devkit/cars_meta.mat", {"class_names": np.array(["Audi", "BMW"], dtype=object)})
    rows = np.array([("1.jpg", 2), ("2.jpg", 1), ("3.jpg", 2)], dtype=[("fname", object), ("class", object)])
    for folder, file in (
        ("cars_train", "devkit/cars_train_annos.mat"),
        ("cars_test", "cars_test_annos_withlabels.mat"),
    ):
        scipy.io.savemat(base / file, {"annotations": rows})
        for seed in range(1, 4):
            save(base / f"{folder}/{seed}.jpg", seed)


def write_flowers(root) -> None:
    folder = root / "flowers-102"
    for seed in range(1, 9):
        save(folder / f"jpg/image_{seed:05}.jpg", seed)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 102, 3, 4, 5, 6, 7, 8]])})
    ids = {"trnid": np.array([[2, 1, 3]]), "valid": np.array([[4, 5]]), "tstid": np.array([[6, 7, 8]])}
    scipy.io.savemat(folder / "setid.mat", ids)


def write_stl10(root) -> None:
    (root / "stl10_binary").mkdir()
    (root / "stl10_binary/class_names.txt").write_text("airplane\nbird\n")
    for seed, split in enumerate(("train", "test")):
        (root / f"stl10_binary/{split}_X.bin").write_bytes(noise(3, 3, 96, 96, seed=seed).tobytes())
        (root / f"stl10_binary/{split}_y.bin").write_bytes(bytes([2, 1, 2]))


@pytest.mark.parametrize("name", ["flowers102", "stl10"])
def test_sets_whose_files_have_checksums_are_read_as_torchvision_reads_them(name, tmp_path, monkeypatch):
    {"flowers102": write_flowers, "stl10": write_stl10}[name](tmp_path)
    cls = getattr(torchvision.datasets, TORCHVISION[name].cls)
    module = __import__(cls.__module__, fromlist=["check_integrity"])
    monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: True)
    splits = load_data(DataConfig(name=name, root=str(tmp_path)), preprocessing(8 if name == "flowers102" else 96))
    same_as_torchvision(splits.train, cls(tmp_path, split="train"))
    same_as_torchvision(splits.eval, cls(tmp_path, split="test"))
    assert len(splits.classes) == {"flowers102": 102, "stl10": 2}[name]


def test_the_text_of_usps_is_read_as_torchvision_reads_it(tmp_path):
    for seed, file in enumerate(("usps.bz2", "usps.t.bz2")):
        values = np.random.default_rng(seed).uniform(-1, 1, (10, 256)).round(3)
        lines = [f"{y + 1} " + " ".join(f"{i + 1}:{v}" for i, v in enumerate(row)) for y, row in enumerate(values)]
        (tmp_path / file).write_bytes(bz2.compress("\n".join(lines).encode()))
    splits = load_data(DataConfig(name="usps", root=str(tmp_path)), preprocessing(16))
    same_as_torchvision(splits.train, torchvision.datasets.USPS(tmp_path, train=True))
    same_as_torchvision(splits.eval, torchvision.datasets.USPS(tmp_path, train=False))


WRITERS = {
    "dtd": (write_dtd, "train", "test"),
    "country211": (write_country211, "train", "valid"),
    "imagenette": (write_imagenette, "train", "val"),
    "stanford_cars": (write_cars, "train", "test"),
    "food101": (write_food101, "train", "test"),
    "oxford_iiit_pet": (write_pets, "trainval", "test"),
    "gtsrb": (write_gtsrb, "train", "test"),
    "fgvc_aircraft": (write_aircraft, "trainval", "test"),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("in_memory", [True, False])
def test_sets_of_files_are_read_as_torchvision_reads_them(name, in_memory, tmp_path):
    write, train, held_out = WRITERS[name]
    write(tmp_path)
    splits = load_data(DataConfig(name=name, root=str(tmp_path), in_memory=in_memory), preprocessing())
    cls = getattr(torchvision.datasets, TORCHVISION[name].cls)
    same_as_torchvision(splits.train, cls(tmp_path, split=train))
    same_as_torchvision(splits.eval, cls(tmp_path, split=held_out))
    names = getattr(cls(tmp_path, split=train), "classes", ("0", "1"))
    assert splits.classes == tuple(", ".join(name) if isinstance(name, tuple) else name for name in names)


def test_of_a_set_without_a_split_every_fifth_image_of_a_class_is_held_out(tmp_path):
    for seed in range(20):
        save(tmp_path / f"eurosat/2750/{'Forest' if seed < 10 else 'River'}/{seed:02}.jpg", seed)
    splits = load_data(DataConfig(name="eurosat", root=str(tmp_path)), preprocessing())
    held_out = [4, 9, 14, 19]
    expected = torchvision.datasets.EuroSAT(tmp_path)
    same_as_torchvision(splits.train, expected, [i for i in range(20) if i not in held_out])
    same_as_torchvision(splits.eval, expected, held_out)
    assert splits.classes == ("Forest", "River")


def test_images_of_sun397_are_in_the_order_of_their_paths(tmp_path):
    for seed in reversed(range(10)):
        save(tmp_path / f"SUN397/a/{'abbey' if seed < 5 else 'alley/outdoor'}/sun_{seed}.jpg", seed)
    (tmp_path / "SUN397/ClassName.txt").write_text("/a/abbey\n/a/alley/outdoor\n")
    splits = load_data(DataConfig(name="sun397", root=str(tmp_path)), preprocessing())
    expected = torchvision.datasets.SUN397(tmp_path)
    order = sorted(range(10), key=lambda i: expected._image_files[i])
    same_as_torchvision(splits.eval, expected, [order[4], order[9]])
    same_as_torchvision(splits.train, expected, order[:4] + order[5:9])
    assert splits.classes == ("abbey", "alley/outdoor")


@pytest.mark.parametrize("name", [*(name for name in TORCHVISION if name != "emnist"), "emnist/digits"])
def test_a_set_that_is_not_there_says_where_it_was_looked_for_and_how_to_get_it(name, tmp_path):
    found = TORCHVISION[name.partition("/")[0]]
    with pytest.raises(ValueError) as error:
        load_data(DataConfig(name=name, root=str(tmp_path)), preprocessing())
    for text in (f"no {name} in {str(tmp_path)!r}", found.looks_for, "--data.download true", found.url):
        assert text in str(error.value)


@pytest.mark.parametrize("name", ["cifar10", "mnist", "food101"])
def test_without_network_a_download_fails_with_one_clear_error(name, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(ValueError, match=f"cannot download {name} to .*no route to host.* offers, to that folder"):
        load_data(DataConfig(name=name, root=str(tmp_path / "new"), download=True), preprocessing())


def test_a_download_of_what_is_there_reads_it(tmp_path, monkeypatch):
    cls, counts = CIFARS["cifar10"]
    write_cifar(tmp_path, monkeypatch, cls, counts)
    splits = load_data(DataConfig(name="cifar10", root=str(tmp_path), download=True), preprocessing(32))
    assert (len(splits.train), len(splits.eval)) == (40, 10)


def test_machines_that_share_a_folder_download_in_turns(tmp_path, monkeypatch):
    cls, counts = CIFARS["cifar10"]
    write_cifar(tmp_path, monkeypatch, cls, counts)
    order = []

    @contextmanager
    def alone_in(folder):
        order.append(f"waits for {folder.name}")
        yield
        order.append("done")

    monkeypatch.setattr("distill.data.torchvision_sets.alone_in", alone_in)
    monkeypatch.setattr(cls, "download", lambda self: order.append("downloads"))
    config = DataConfig(name="cifar10", root=str(tmp_path), download=True)
    load_data(config, preprocessing(32))
    assert order == [f"waits for {tmp_path.name}", "downloads", "done"] * 2  # for each split
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first of the machine has done it
    load_data(config, preprocessing(32))
    assert order[6:] == ["downloads"] * 2
