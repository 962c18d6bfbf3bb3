"""What the processes of a run know of each other's data: all must have found the same images."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from distill.data.image_set import ImageSet


def place() -> tuple[int, int]:
    """Rank of this process, and how many there are."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def from_all(value: Any) -> list[Any]:
    """Every process's value, in the order of their ranks; all must call this."""
    _, processes = place()
    if processes == 1:
        return [value]
    values: list[Any] = [None] * processes
    dist.all_gather_object(values, value)  # between processes of this run, which trust each other
    return values


def check_same_images(train: ImageSet, evaluation: ImageSet) -> None:
    """Ends a run whose processes have loaded different images: they would wait for each other's batches for ever.

    Raises:
        ValueError: on all processes; names two that differ, and how.
    """
    sets = (train, evaluation)
    labels = [hashlib.sha256(images.labels.tobytes()).hexdigest() for images in sets]
    own = ([len(images) for images in sets], labels, sorted({name for images in sets for name in images.skipped}))
    first, *others = from_all(own)
    for rank, other in enumerate(others, 1):
        if other != first:
            counts = [
                f"{train} images to train on and {held_out} to evaluate on"
                for (train, held_out), _, _ in (first, other)
            ]
            classes = "" if counts[0] != counts[1] else ", of other classes or with others left out"
            left_out = sorted(set(first[2]) ^ set(other[2]))
            raise ValueError(
                f"process 0 found {counts[0]}, process {rank} {counts[1]}{classes}: all must read the same files; look "
                "at data.root on each machine"
                + (f". Only one of the two could read {', '.join(left_out[:3])}" if left_out else "")
            )
