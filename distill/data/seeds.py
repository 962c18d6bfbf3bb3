"""Random numbers that depend on (seed, epoch, image) alone, whatever process draws them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch


class SampleKey(NamedTuple):
    """All that the augmentation of one image may depend on."""

    seed: int
    epoch: int
    image: int
    """Index of the image in its set."""

    def rng(self) -> random.Random:
        """A generator of its own; a string seed is hashed (SHA-512), so neighbouring keys are unrelated."""
        return random.Random(f"{self.seed} {self.epoch} {self.image}")


@contextmanager
def seeded_generators(key: SampleKey) -> Iterator[None]:
    """Seed the global CPU generators of Python, NumPy and PyTorch from the key; afterwards they are as before."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    rng = key.rng()
    random.seed(rng.getrandbits(64))
    np.random.seed(rng.getrandbits(32))
    torch.default_generator.manual_seed(rng.getrandbits(63))  # torch.manual_seed would seed the GPUs too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


def check_seed(seed: int) -> int:
    """The seed, if it is one."""
    if seed < 0:
        raise ValueError(f"seed is {seed}; allowed: integers from 0 up")
    return seed
