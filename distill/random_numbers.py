"""Random numbers of an evaluation, apart from those of the training."""

from __future__ import annotations

import contextlib
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
