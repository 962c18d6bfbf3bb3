import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from PIL import Image

from distill.data import DataConfig, Preprocessing, Splits, eval_loader, load_data, train_loader
from distill.data.shards import expand

PRE = Preprocessing(input_size=(3, 4, 4), mean=(0.0,) * 3, std=(1 / 255,) * 3)


def encoded(value: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value,) * 3).save(buffer, kind)
    return buffer.getvalue()


def write_shard(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def root(tmp_path):
    """Three training shards of 4, 3 and 4 samples, two to evaluate on of 3 each; values are 10 x the sample."""
    number = 0
    for split, sizes in (("train", (4, 3, 4)), ("validation", (3, 3))):
        for shard, size in enumerate(sizes):
            members = {}
            for _ in range(size):
                members[f"x/{number:03}.{'png' if number % 2 else 'jpg'}"] = encoded(
                    10 * number, "png" if number % 2 else "jpeg"
                )
                members[f"x/{number:03}.cls"] = f"{number % 3}\n".encode()
                members[f"x/{number:03}.json"] = b"{}"
                number += 1
            write_shard(tmp_path / f"some-{split}-{shard:02}.tar", members)
    return tmp_path


def load(root, **fields) -> Splits:
    return load_data(DataConfig(name="wds/some", root=str(root), **fields), PRE)


def samples(batches) -> list[tuple[int, int]]:
    """Number and label of each image."""
    return [
        (round(float(image.mean()) / 10), int(label))
        for images, labels in batches
        for image, label in zip(images, labels, strict=True)
    ]


def whole(split) -> list[tuple[int, int]]:
    return samples(eval_loader(split, 4, workers=0))


@pytest.mark.parametrize("in_memory", [True, False])
def test_samples_of_all_shards_are_there_in_order_with_their_labels(root, in_memory):
    splits = load(root, in_memory=in_memory)
    assert whole(splits.train) == [(i, i % 3) for i in range(11)]
    assert whole(splits.eval) == [(i, i % 3) for i in range(11, 17)]
    assert splits.classes == ("0", "1", "2")


def test_each_shard_is_opened_once_for_its_headers_and_labels(root, monkeypatch):
    opened = []
    real = io.open

    def count(path, *args, **kwargs):
        opened.append(Path(path).name)
        return real(path, *args, **kwargs)

    for place in ("io.open", "builtins.open", "tarfile.bltn_open"):
        monkeypatch.setattr(place, count)
    load(root, in_memory=False)
    assert opened == sorted(path.name for path in root.glob("*.tar"))


def test_patterns_and_info_files_choose_shards(root):
    chosen = load(root, train_split="some-train-{01..02}.tar|7", eval_split="some-validation-01.tar")
    assert [i for i, _ in whole(chosen.train)] == [4, 5, 6, 7, 8, 9, 10]
    assert [i for i, _ in whole(chosen.eval)] == [14, 15, 16]
    split = {"name": "small", "num_samples": 3, "filenames": ["some-train-01.tar"], "shard_lengths": [3]}
    (root / "_info.json").write_text(json.dumps({"splits": {"small": split}}))
    assert [i for i, _ in whole(load(root, train_split="small").train)] == [4, 5, 6]


def test_braces_expand_like_those_of_a_shell():
    assert expand("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expand("{x,y}-{0..1}") == ["x-0", "x-1", "y-0", "y-1"]
    assert expand("plain.tar") == ["plain.tar"]


@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_see_every_sample_of_an_epoch_once_in_another_order_each_time(root, workers):
    train = load(root, in_memory=False).train
    shards = [
        prepare_data_loader(train_loader(train, 1, seed=0, workers=workers), num_processes=2, process_index=p)
        for p in range(2)
    ]
    orders = []
    for _ in range(2):
        seen = [samples(loader) for loader in shards]
        assert len(seen[0]) == len(seen[1]) == 5  # eleven samples
        assert len({*seen[0], *seen[1]}) == 10
        orders.append(seen)
    assert orders[0] != orders[1]


def test_class_names_come_from_a_class_map(root):
    (root / "names.txt").write_text("ant\nbee\ncat\ndog\n")
    assert load(root, class_map=str(root / "names.txt")).classes == ("ant", "bee", "cat", "dog")
    (root / "names.txt").write_text("ant\nbee\n")
    with pytest.raises(ValueError, match="class_map names 2 classes; the shards have labels up to 2"):
        load(root, class_map=str(root / "names.txt"))


def test_a_broken_image_in_a_shard_is_named_or_left_out(root):
    write_shard(
        root / "some-train-01.tar", {"a.jpg": b"no image", "a.cls": b"0", "b.jpg": encoded(50, "png"), "b.cls": b"2"}
    )
    with pytest.raises(ValueError, match=r"cannot read the image a.jpg in .*some-train-01\.tar"):
        load(root, in_memory=True)
    train = load(root, on_corrupt="skip", in_memory=False).train
    assert whole(train)[4:6] == [(5, 2), (5, 2)]
    assert len(train.skipped) == 1 and train.skipped[0].startswith("a.jpg in ")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": b""}, "sample a in .* has no label, .cls, only jpg"),
        ({"a.cls": b"1"}, "sample a in .* has no image, only cls"),
        ({"a.jpg": b"", "a.cls": b"cat"}, r"the label a.cls in .* is b'cat'; it must be a number from 0 up"),
        ({}, "no samples in 1 shard"),
        (None, r"cannot read .* as a tar \(not compressed\)"),
    ],
)
def test_shards_of_another_kind_are_refused(tmp_path, members, message):
    for split in ("train", "val"):
        write_shard(tmp_path / f"{split}-0.tar", members or {})
    if members is None:
        (tmp_path / "train-0.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_shards_of_a_single_class_are_refused(tmp_path):
    for split in ("train", "val"):
        write_shard(tmp_path / f"{split}-0.tar", {"a.jpg": encoded(1, "jpeg"), "a.cls": b"0"})
    with pytest.raises(ValueError, match="has the class '0' alone, at least two are needed"):
        load(tmp_path)


def test_shards_that_are_not_there_are_named(root):
    with pytest.raises(ValueError, match=r"no shards of tr in .*tr-\*\.tar"):
        load(root, train_split="tr")
    with pytest.raises(ValueError, match=r"1 of 4 shards are not in .*, the first: some-train-03\.tar"):
        load(root, train_split="some-train-{00..03}.tar")
    with pytest.raises(ValueError, match="nowhere', which is not a folder"):
        load(root / "nowhere")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")


def write_hub(datasets, folder, broken=None, unlabelled=None) -> None:
    """Saves to disk ten rows to train on and four to test on, of value 10 x row, classes ant and bee in turn.

    In both splits the image of one row may be broken, or its label missing.
    """
    features = datasets.Features(
        {"name": datasets.Value("string"), "img": datasets.Image(), "fine": datasets.ClassLabel(names=["ant", "bee"])}
    )
    splits = {}
    for split, count in (("train", 10), ("test", 4)):
        images = [{"bytes": b"x" if i == broken else encoded(10 * i, "png"), "path": None} for i in range(count)]
        labels = [None if i == unlabelled else i % 2 for i in range(count)]
        rows = {"name": ["?"] * count, "img": images, "fine": labels}
        splits[split] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(splits).save_to_disk(str(folder))


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_hugging_face_data_set_on_disk_is_read(hub, tmp_path, in_memory):
    write_hub(hub, tmp_path / "set")
    splits = load_data(DataConfig(name="hfds/set", root=str(tmp_path), in_memory=in_memory), PRE)
    assert splits.classes == ("ant", "bee")
    assert whole(splits.train) == [(i, i % 2) for i in range(10)]
    assert whole(splits.eval) == [(i, i % 2) for i in range(4)]
    by_path = load_data(DataConfig(name=f"hfds/{tmp_path / 'set'}"), PRE)
    assert torch.equal(by_path.train[7][0], splits.train[7][0])


def test_workers_read_a_hugging_face_data_set_too(hub, tmp_path):
    write_hub(hub, tmp_path / "set", broken=3)
    config = DataConfig(name="hfds/set", root=str(tmp_path), in_memory=False, on_corrupt="skip")
    splits = load_data(config, PRE)
    expected = [(i, i % 2) for i in range(10)]
    assert samples(eval_loader(splits.train, 4, workers=2)) == [*expected[:3], expected[4], *expected[4:]]
    assert splits.train.skipped == ("in row 3 of split 'train' of the data set",)
    assert splits.eval.skipped == ("in row 3 of split 'test' of the data set",)  # two images are told apart


def test_a_folder_of_images_is_read_by_datasets(hub, tmp_path):
    for split in ("train", "validation"):
        for i, name in enumerate(("ant", "bee")):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            Image.fromarray(np.full((4, 4, 3), 10 * i, np.uint8)).save(tmp_path / "set" / split / name / "0.png")
    splits = load_data(DataConfig(name=f"hfds/{tmp_path / 'set'}", root=str(tmp_path / "cache")), PRE)
    assert whole(splits.train) == whole(splits.eval) == [(0, 0), (1, 1)]


def test_hugging_face_data_sets_that_do_not_serve_are_refused(hub, tmp_path, monkeypatch):
    write_hub(hub, tmp_path / "set")
    with pytest.raises(ValueError, match="no split dev; the data set has train, test"):
        load_data(DataConfig(name="hfds/set", root=str(tmp_path), eval_split="dev"), PRE)
    table = hub.DatasetDict({name: hub.Dataset.from_dict({"x": [1]}) for name in ("train", "test")})
    table.save_to_disk(str(tmp_path / "numbers"))
    with pytest.raises(ValueError, match="has no column of images, only x"):
        load_data(DataConfig(name="hfds/numbers", root=str(tmp_path)), PRE)
    write_hub(hub, tmp_path / "unlabelled", unlabelled=2)
    with pytest.raises(ValueError, match=r"'train' of .*unlabelled' has no images, or some without a label"):
        load_data(DataConfig(name="hfds/unlabelled", root=str(tmp_path)), PRE)

    def no_network(*args, **kwargs):
        raise ConnectionError("couldn't reach the hub")

    monkeypatch.setattr(hub, "load_dataset", no_network)
    with pytest.raises(ValueError, match="cannot read name='hfds/nobody/nothing': couldn't reach the hub"):
        load_data(DataConfig(name="hfds/nobody/nothing", root=str(tmp_path)), PRE)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs Hugging Face's datasets: pip install datasets"):
        load_data(DataConfig(name="hfds/set", root=str(tmp_path)), PRE)
