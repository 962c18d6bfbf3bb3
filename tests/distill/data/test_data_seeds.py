import random

import numpy as np
import pytest
import torch

from distill.data.seeds import SampleKey, check_seed, seeded_generators


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
