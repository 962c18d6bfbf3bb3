import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import distill.data.datasets as datasets
from distill.data import DataConfig, ImageSet, Preprocessing, eval_loader, load_data
from distill.data.datasets import spread

DATA = Path(__file__).parents[3] / os.environ.get("DISTILL_DATA", "../shared/data")
needs_data = pytest.mark.skipif(not (DATA / "cifar10").is_dir(), reason=f"no real data in {DATA}: set DISTILL_DATA")
PIXELS = Preprocessing(input_size=(3, 4, 4), mean=(0.0,) * 3, std=(1 / 255,) * 3)  # pixels as they are


@pytest.fixture
def images(tmp_path) -> np.ndarray:
    """Folders train/ and val/ with classes a, b, c; train has 3 images a class, val 1. Returns train, (9, 4, 4, 3)."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
    for split, count in (("train", 3), ("val", 1)):
        for i, name in enumerate("abc"):
            (tmp_path / split / name).mkdir(parents=True)
            for j in range(count):
                Image.fromarray(pixels[3 * i + j]).save(tmp_path / split / name / f"{j}.png")
    return pixels


def folder(root: Path, **fields) -> DataConfig:
    return DataConfig(name="folder", root=str(root), **fields)


def pixels(image_set: ImageSet) -> np.ndarray:
    """All images of a set as uint8, (N, H, W, C)."""
    items = torch.stack([image_set[i][0] for i in range(len(image_set))])
    return items.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_of_the_right_size_arrive_unchanged(images, tmp_path, in_memory):
    splits = load_data(folder(tmp_path, in_memory=in_memory), PIXELS)
    assert splits.classes == ("a", "b", "c")
    assert (pixels(splits.train) == images).all()
    assert (pixels(splits.eval) == images[::3]).all()
    assert [splits.train[i][1] for i in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert splits.train.in_memory is splits.eval.in_memory is in_memory
    assert isinstance(splits.train[0][1], int)


def test_grey_input_is_the_luma_of_the_image(images, tmp_path):
    grey = Preprocessing(input_size=(1, 4, 4), mean=(0.0,), std=(1 / 255,))
    result = pixels(load_data(folder(tmp_path), grey).train)
    luma = images @ np.array([0.299, 0.587, 0.114])  # ITU-R 601-2, Pillow's conversion
    assert result.shape == (9, 4, 4, 1)
    assert np.abs(result[..., 0] - luma).max() <= 1


def test_memory_and_disk_give_the_same_augmented_images(images, tmp_path):
    for fields in ({"crop_padding": 2, "hflip": 0.5}, {"random_resized_crop": True}, {"auto_augment": "rand-m9-mstd1"}):
        kept, read = (load_data(folder(tmp_path, in_memory=m, **fields), PIXELS, seed=3) for m in (True, False))
        for key in [(e, i) for e in range(2) for i in range(9)]:
            assert torch.equal(kept.train[key][0], read.train[key][0])


def test_an_index_alone_means_epoch_zero(images, tmp_path):
    train = load_data(folder(tmp_path, crop_padding=3), PIXELS).train
    assert all(torch.equal(train[i][0], train[(0, i)][0]) for i in range(9))
    assert not all(torch.equal(train[i][0], train[(1, i)][0]) for i in range(9))


@pytest.mark.parametrize("key", [9, -1, (0, 9), (1, -1)])
def test_an_index_out_of_range_is_refused(images, tmp_path, key):
    with pytest.raises(IndexError, match="allowed: 0 to 8"):
        load_data(folder(tmp_path), PIXELS).train[key]


def test_evaluation_is_not_augmented(images, tmp_path):
    config = folder(tmp_path, crop_padding=3, hflip=1.0, random_erasing=1.0, auto_augment="rand-m9")
    splits = load_data(config, PIXELS)
    assert (pixels(splits.eval) == images[::3]).all()
    assert torch.equal(splits.eval[1][0], splits.eval[(7, 1)][0])


def test_images_are_kept_in_memory_only_within_the_budget(images, tmp_path, monkeypatch):
    needed = (9 + 3) * 3 * 4 * 4  # bytes of train and eval
    monkeypatch.setattr(datasets, "MEMORY_BYTES", needed)
    assert load_data(folder(tmp_path), PIXELS).train.in_memory
    monkeypatch.setattr(datasets, "MEMORY_BYTES", needed - 1)
    assert not load_data(folder(tmp_path), PIXELS).train.in_memory
    assert load_data(folder(tmp_path, max_train_samples=8), PIXELS).train.in_memory
    assert load_data(folder(tmp_path, in_memory=True), PIXELS).train.in_memory


def test_the_budget_counts_images_at_their_own_size_when_the_crop_needs_it(images, tmp_path, monkeypatch):
    small = Preprocessing(input_size=(3, 2, 2), mean=(0.0,) * 3, std=(1.0,) * 3)
    needed = 9 * 3 * 4 * 4 + 3 * 3 * 2 * 2  # train as decoded, eval as resized
    monkeypatch.setattr(datasets, "MEMORY_BYTES", needed)
    assert load_data(folder(tmp_path, random_resized_crop=True), small).train.in_memory
    monkeypatch.setattr(datasets, "MEMORY_BYTES", needed - 1)
    assert not load_data(folder(tmp_path, random_resized_crop=True), small).train.in_memory


def test_a_corrupt_image_stops_loading_or_reading_with_its_name(images, tmp_path):
    (tmp_path / "train" / "b" / "1.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"b/1\.png"):
        load_data(folder(tmp_path, in_memory=True), PIXELS)
    train = load_data(folder(tmp_path, in_memory=False), PIXELS).train
    assert train[3][1] == 1
    with pytest.raises(ValueError, match=r"b/1\.png"):
        train[4]
    with pytest.raises(ValueError, match=r"b/1\.png"):
        list(eval_loader(train, 3, workers=1))


def test_different_classes_in_train_and_eval_are_named(images, tmp_path):
    (tmp_path / "val" / "c").rename(tmp_path / "val" / "d")
    with pytest.raises(ValueError, match=r"only in .*train: c; only in .*val: d"):
        load_data(folder(tmp_path), PIXELS)


@pytest.mark.parametrize("splits", [("train", "val"), ("val",)], ids="_".join)
def test_a_single_class_is_refused_by_split_before_any_image_is_read(images, tmp_path, splits):
    """In val alone it is Tiny ImageNet as it is unpacked, whose held-out images all lie in val/images."""
    for split in splits:
        (tmp_path / split / "b").rename(tmp_path / split / "images")
        for other in "ac":
            shutil.rmtree(tmp_path / split / other)
        for file in (tmp_path / split).rglob("*.png"):
            file.write_bytes(b"no image")
    message = rf"{tmp_path / splits[0]} has the class 'images' alone, at least two are needed; .*a class is one folder,"
    with pytest.raises(ValueError, match=message):
        load_data(folder(tmp_path), PIXELS)


def test_a_split_may_hold_one_class_of_those_that_a_class_map_names(images, tmp_path):
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    for other in "ac":
        shutil.rmtree(tmp_path / "val" / other)
    splits = load_data(folder(tmp_path, class_map=str(tmp_path / "names.txt")), PIXELS)
    assert splits.classes == ("a", "b", "c") and splits.eval.labels.tolist() == [1]
    (tmp_path / "names.txt").write_text("b\n")
    for other in "ac":
        shutil.rmtree(tmp_path / "train" / other)
    with pytest.raises(ValueError, match="has the class 'b' alone"):
        load_data(folder(tmp_path, class_map=str(tmp_path / "names.txt")), PIXELS)


@pytest.mark.parametrize("in_memory", [True, False, None])
@pytest.mark.parametrize("fields", [{}, {"on_corrupt": "skip"}, {"random_resized_crop": True}], ids=str)
def test_without_training_images_no_training_split_is_wanted(images, tmp_path, in_memory, fields):
    shutil.rmtree(tmp_path / "train")
    splits = load_data(folder(tmp_path, in_memory=in_memory, **fields), PIXELS, training=False)
    assert len(splits.train) == 0 and splits.train.skipped == () and splits.classes == ("a", "b", "c")
    assert (pixels(splits.eval) == images[::3]).all() and splits.eval.labels.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"looked for train/ or train\.tar"):
        load_data(folder(tmp_path, in_memory=in_memory, **fields), PIXELS)


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_other_data_has_no_training_images_either_where_none_are_wanted(name):
    pre = Preprocessing(input_size=(1, 8, 8), mean=(0.0,), std=(1.0,))
    whole, held_out = (load_data(DataConfig(name=name), pre, training=training) for training in (True, False))
    assert (len(whole.train), len(held_out.train)) == ({"digits": 1442, "synthetic": 1030}[name], 0)
    assert held_out.eval.labels.tolist() == whole.eval.labels.tolist() and held_out.classes == whole.classes
    assert torch.equal(held_out.eval[3][0], whole.eval[3][0])


def test_limits_spread_over_the_classes(images, tmp_path):
    splits = load_data(folder(tmp_path, max_train_samples=5, max_eval_samples=2), PIXELS)
    assert splits.train.labels.tolist() == [0, 0, 1, 1, 2]
    assert (pixels(splits.train) == images[[0, 1, 3, 4, 6]]).all()
    assert splits.eval.labels.tolist() == [0, 1]
    assert splits.classes == ("a", "b", "c")


def test_spread_takes_the_first_of_every_class_in_turn():
    labels = np.array([1, 1, 1, 0, 1, 2])
    assert spread(labels, 4).tolist() == [0, 1, 3, 5]
    assert spread(labels, 100).tolist() == [0, 1, 2, 3, 4, 5]
    assert spread(labels, None).tolist() == [0, 1, 2, 3, 4, 5]


def test_files_have_one_or_three_channels_and_seeds_are_not_negative(images, tmp_path):
    with pytest.raises(ValueError, match=r"input_size is \(2, 4, 4\)"):
        load_data(folder(tmp_path), Preprocessing(input_size=(2, 4, 4), mean=(0.0,) * 2, std=(1.0,) * 2))
    with pytest.raises(ValueError, match="seed is -1"):
        load_data(folder(tmp_path), PIXELS, seed=-1)


@needs_data
def test_cifar10_in_memory_is_normalised_like_the_decoded_file():
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    pre = Preprocessing(input_size=(3, 32, 32), mean=mean, std=std)
    config = folder(DATA / "cifar10", train_split="test", max_train_samples=50, max_eval_samples=20)
    splits = load_data(config, pre)
    assert splits.train.labels.tolist() == [label for label in range(10) for _ in range(5)]
    # README: over many images the mean is 0.4914 ..., the deviation 0.2470 ...: normalised 0 and 1, roughly for 50
    values = torch.stack([splits.train[i][0] for i in range(50)])
    assert values.mean((0, 2, 3)).abs().max() < 0.3
    assert (values.std((0, 2, 3)) - 1).abs().max() < 0.2
    assert torch.equal(splits.eval[2][0], splits.train[5][0])  # the same file by the evaluation's and the other path


@needs_data
def test_imagenet_photos_are_read_from_the_tar_at_224_pixels():
    pre = Preprocessing(input_size=(3, 224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.875)
    config = folder(DATA / "imagenet_sample", train_split="val", random_resized_crop=True, in_memory=False)
    splits = load_data(config, pre)
    assert len(splits.classes) == len(splits.eval) == 1000
    for part in (splits.train, splits.eval):
        image, label = part[999]
        assert (image.shape, label) == ((3, 224, 224), 999)
        assert -1 <= image.min() < image.max() <= 1


def test_a_class_map_numbers_the_classes_also_those_that_a_split_lacks(images, tmp_path):
    shutil.rmtree(tmp_path / "train" / "b")
    shutil.rmtree(tmp_path / "val" / "a")
    (tmp_path / "classes.txt").write_text("c\n\nz\n b \na\n")
    splits = load_data(folder(tmp_path, class_map=str(tmp_path / "classes.txt")), PIXELS)
    assert splits.classes == ("c", "z", "b", "a")
    assert [splits.train[i][1] for i in range(6)] == [3, 3, 3, 0, 0, 0]  # a, then c
    assert [splits.eval[i][1] for i in range(2)] == [2, 0]  # b, then c


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb", r"1 class\(es\) of .*train are not in the class map, the first: \['c'\]"),
        ("a\nb\nc\na", r"must name each class once, found twice: \['a'\]"),
        ("\n", "must name each class once, found none"),
        (None, "which cannot be read as text"),
    ],
)
def test_a_class_map_that_does_not_fit_is_refused(images, tmp_path, text, message):
    if text is not None:
        (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_data(folder(tmp_path, class_map=str(tmp_path / "classes.txt")), PIXELS)
