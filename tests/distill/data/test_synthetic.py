import numpy as np
import pytest
import torch

from distill.data import DataConfig, Preprocessing, load_data, train_loader
from distill.data.synthetic import POOL

PRE = Preprocessing(input_size=(3, 6, 10), mean=(0.0,) * 3, std=(1 / 255,) * 3)


@pytest.mark.parametrize("fields", [{}, {"crop_padding": 2, "hflip": 0.5}, {"random_resized_crop": True}])
def test_noise_has_the_teachers_size_and_as_many_images_and_classes_as_asked_for(fields):
    config = DataConfig(name="synthetic", synthetic_samples=350, synthetic_classes=7, **fields)
    splits = load_data(config, PRE)
    assert splits.classes == tuple("0123456")
    assert np.bincount(splits.train.labels).tolist() == [40] * 7
    assert np.bincount(splits.eval.labels).tolist() == [10] * 7
    images, _ = next(iter(train_loader(splits.train, 5, seed=0)))
    assert images.shape == (5, 3, 6, 10) and images.dtype == torch.float32
    assert torch.equal(splits.train[(3, 9)][0], load_data(config, PRE).train[(3, 9)][0])


def test_images_are_even_noise_and_repeat_after_a_pool():
    train = load_data(DataConfig(name="synthetic", synthetic_samples=800), PRE).train
    values = torch.stack([train[i][0] for i in range(50)])
    # 9000 pixels of 0 .. 255: mean 127.5, standard deviation 73.9, of the mean 0.78
    assert abs(values.mean() - 127.5) < 4 and abs(values.std() - 73.9) < 3
    numbers = [i for i in range(800) if i // 10 % 5 != 4]  # those that are trained on
    later = numbers.index(numbers[0] + POOL * 5)  # 320, a multiple of both
    assert torch.equal(train[0][0], train[later][0]) and not torch.equal(train[0][0], train[1][0])
