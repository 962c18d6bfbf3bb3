import sys

import numpy as np
import pytest
import torch

from distill.data import DataConfig, Preprocessing, load_data
from distill.data.digits import held_out, rank_in_class


def grey(size=8, **fields) -> Preprocessing:
    """Pixels as they are in [0, 255], up to rounding."""
    return Preprocessing(input_size=(1, size, size), mean=(0.0,), std=(1 / 255,), **fields)


def test_rank_in_class_counts_the_images_of_the_same_class_before():
    assert rank_in_class(np.array([3, 1, 3, 3, 1, 0])).tolist() == [0, 0, 1, 2, 1, 0]


def test_every_fifth_image_of_a_class_is_held_out():
    labels = np.array([0, 1, 0, 0, 0, 1, 0, 1, 0, 1, 1])  # six 0s, five 1s: the fifth of each is the 7th and the 11th
    assert np.flatnonzero(held_out(labels)).tolist() == [6, 10]


def test_the_split_is_a_stratified_fifth_and_does_not_depend_on_the_seed():
    splits = load_data(DataConfig(), grey())
    # The classes have 178, 182, 177, 183, 181, 182, 181, 179, 174 and 180 images.
    assert np.bincount(splits.eval.labels).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    assert np.bincount(splits.train.labels).tolist() == [143, 146, 142, 147, 145, 146, 145, 144, 140, 144]
    assert splits.classes == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    other = load_data(DataConfig(), grey(), seed=1)
    assert all(torch.equal(splits.eval[i][0], other.eval[i][0]) for i in range(len(splits.eval)))


def test_no_digit_is_lost_or_in_both_splits():
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    splits = load_data(DataConfig(), grey())

    def rows(pairs):
        return sorted((label, *np.rint(image).astype(int)) for image, label in pairs)

    ours = [
        (image.numpy().ravel(), label)
        for part in (splits.train, splits.eval)
        for image, label in (part[i] for i in range(len(part)))
    ]
    expected = list(zip(values * 255 / 16, labels, strict=True))
    assert len(ours) == 1797
    assert rows(ours) == rows(expected)


def test_the_first_digit_is_a_zero_with_known_pixels():
    image, label = load_data(DataConfig(), grey()).train[0]
    assert label == 0
    # load_digits' first row is 0 0 5 13 9 1 0 0, in sixteenths of 255
    assert image[0, 0].round().tolist() == [0, 0, 80, 207, 143, 16, 0, 0]


def test_digits_are_enlarged_and_repeated_in_every_channel():
    pre = Preprocessing(
        input_size=(2, 16, 24), mean=(0.0,) * 2, std=(1 / 255,) * 2, interpolation="nearest", crop_pct=0.5
    )
    small, large = load_data(DataConfig(), grey()), load_data(DataConfig(), pre)
    for part in ("train", "eval"):
        before, after = getattr(small, part)[5][0], getattr(large, part)[5][0]
        assert after.shape == (2, 16, 24)
        expected = before.repeat_interleave(2, dim=1).repeat_interleave(3, dim=2).expand(2, 16, 24)
        assert torch.equal(after, expected)


def test_digits_can_be_cropped_like_photos():
    splits = load_data(
        DataConfig(random_resized_crop=True, max_train_samples=20),
        Preprocessing(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3),
    )
    image, _ = splits.train[3]
    assert image.shape == (3, 16, 16)
    assert torch.equal(image[0], image[2])
    assert not torch.equal(image, splits.train[(1, 3)][0])


def test_limits_take_classes_in_turn():
    splits = load_data(DataConfig(max_train_samples=23, max_eval_samples=10), grey())
    assert np.bincount(splits.train.labels).tolist() == [3, 3, 3, 2, 2, 2, 2, 2, 2, 2]
    assert np.bincount(splits.eval.labels).tolist() == [1] * 10


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        load_data(DataConfig(), grey())
