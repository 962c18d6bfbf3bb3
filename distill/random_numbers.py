"""Random numbers of an evaluation, apart from those of the training; of a training, apart on each process."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Draws in here are the same each time and leave the numbers that come after it as they were.

    Evaluation draws where images are encoded as random spikes (`models.PoissonEncoder`).
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def draw_apart(stage: str, rank: int) -> None:
    """Gives a process numbers of its own, where all were seeded alike; the main process goes on with those it has.

    Dropout and random spikes (`models.PoissonEncoder`) would be the same for the images of every process.

    Args:
        stage: names the training.
    """
    if rank > 0:
        seed = hashlib.sha256(f"{torch.initial_seed()}/{stage}/{rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(seed[:8]))
