import random

import numpy as np
import pytest
import torch

from distill.data.seeds import SampleKey, _mix, check_seed, seeded_generators, uniforms


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_the_global_generators_repeat_for_a_key_and_differ_between_keys():
    seen = set()
    for key in (SampleKey(0, 0, 0), SampleKey(1, 0, 0), SampleKey(0, 1, 0), SampleKey(0, 0, 1), SampleKey(1, 11, 1)):
        with seeded_generators(key):
            first = draws()
        with seeded_generators(key):
            assert draws() == first
        seen.update(first)
    assert len(seen) == 15  # 5 keys x 3 generators


def test_the_global_generators_continue_as_if_nothing_had_been_drawn():
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = draws(), draws()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    first = draws()
    with pytest.raises(RuntimeError), seeded_generators(SampleKey(0, 0, 0)):
        draws()
        raise RuntimeError("also after an error")
    assert (first, draws()) == expected


def test_keys_that_read_alike_when_joined_are_different():
    assert SampleKey(1, 11, 1).rng().random() != SampleKey(11, 1, 1).rng().random()


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed is -1; allowed: integers from 0 up"):
        check_seed(-1)


def test_random_numbers_of_a_batch_are_those_of_splitmix64():
    # the first outputs of splitmix64 from state 1234567, as Rosetta Code's page on it lists them
    state, outputs = 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        outputs.append(int(_mix(np.array([state], dtype=np.uint64))[0]))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_random_numbers_of_an_image_do_not_depend_on_its_batch():
    keys = [SampleKey(seed, epoch, image) for seed in (0, 2**63) for epoch in range(3) for image in range(50)]
    together = uniforms(keys, 4)
    assert together.shape == (300, 4) and together.min() >= 0 and together.max() < 1
    for row in (0, 17, 299):
        assert (uniforms([keys[row]], 4) == together[row]).all()
        assert (uniforms([keys[row]], 2) == together[row, :2]).all()
    assert len(np.unique(together)) == 1200


def test_random_numbers_of_neighbouring_images_are_even_and_unrelated():
    values = uniforms([SampleKey(0, epoch, image) for epoch in range(10) for image in range(1000)], 2)
    # 10,000 draws: tenths hold 1000 +- 5 standard deviations (30); correlations are 0 +- 5 / 100
    assert all(abs(count - 1000) < 150 for column in values.T for count in np.histogram(column, 10, (0, 1))[0])
    by_epoch = values[:, 0].reshape(10, 1000)
    pairs = [(values[:, 0], values[:, 1]), (values[:-1, 0], values[1:, 0]), (by_epoch[:-1], by_epoch[1:])]
    for left, right in pairs:
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 0.05
