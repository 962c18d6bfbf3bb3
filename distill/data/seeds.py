"""Random numbers that depend on (seed, epoch, image) alone, whatever process draws them."""

import random
from collections.abc import Iterator, Sequence
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


def uniforms(keys: Sequence[SampleKey], draws: int) -> np.ndarray:
    """Random numbers of many images at once, float64 in [0, 1), (images, draws); each row is its key's alone.

    Splitmix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators", fig. 11) hashes seed, epoch, image
    and number of the draw, one after the other: h <- mix(h + gamma (value + 1)). Seeds count modulo 2^64.
    """
    columns = np.array([(key.seed % 2**64, key.epoch, key.image) for key in keys], dtype=np.uint64).reshape(-1, 3)
    state = np.zeros((len(keys), 1), dtype=np.uint64)
    for column in columns.T:
        state = _mix(state + _GAMMA * (column[:, None] + np.uint64(1)))
    state = _mix(state + _GAMMA * np.arange(1, draws + 1, dtype=np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: np.ndarray) -> np.ndarray:
    """Splitmix64's finalizer: a permutation of the 64-bit numbers; products wrap around."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


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
