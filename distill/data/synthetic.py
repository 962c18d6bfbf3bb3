"""Images of noise at the teacher's input size: they cost no reading, so a run shows the speed of all the rest."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchvision.transforms.functional import to_pil_image

from distill.data.config import DataConfig, Preprocessing
from distill.data.digits import held_out
from distill.data.transforms import Transform

POOL = 64  # different images, which all others repeat: memory does not grow with synthetic_samples


class Repeated(Sequence[Any]):
    """A few images that stand for many: image i is pool[i % len(pool)]."""

    def __init__(self, pool: Sequence[Any] | torch.Tensor, members: np.ndarray):
        self._pool, self._members = pool, members

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: Any) -> Any:
        return self._pool[int(self._members[index]) % len(self._pool)]


def synthetic_images(pre: Preprocessing, transform: Transform[Any], members: np.ndarray) -> Sequence[Any]:
    """The images of these numbers as the transform stores them; the same in every run, whatever its seed."""
    values = np.random.default_rng(0).integers(0, 256, (POOL, *pre.input_size), dtype=np.uint8)
    pool: Any = torch.from_numpy(values)
    if transform.stored_shape is None:  # timm's crop wants PIL images
        pool = [to_pil_image(image) for image in pool]
    return Repeated(pool, members)


def synthetic_labels(config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """The classes in turn, int64 (N,), and which images are held out: every fifth of a class."""
    labels = np.arange(config.synthetic_samples) % config.synthetic_classes
    return labels, held_out(labels)
