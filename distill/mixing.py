"""Mixup and CutMix of a training batch, by timm.

    mixup     x = lam x_i + (1 - lam) x_j                   lam ~ Beta(alpha, alpha)
    cutmix    x = x_i with a box of x_j pasted into it      lam = 1 - area of the box / area of the image

    y = lam y_i + (1 - lam) y_j, with j = B - 1 - i: images are paired from both ends of the batch

One lam, one kind and one box for the whole batch. mixup: Zhang et al., ICLR 2018, arXiv 1710.09412, section 2;
CutMix: Yun et al., ICCV 2019, arXiv 1905.04899, section 3.1, whose box is cut at the image's border: lam is that of
what is left of it. Shapes: B images, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from timm.data import Mixup
from torch import Tensor

from distill.train_config import TrainConfig


class Mixing:
    """Mixes the images of a batch and their labels, always in the same way for the same (seed, step, rank).

    Args:
        config: `mixup`, `cutmix`, `mixup_prob` and `mixup_switch_prob` are read.
        classes: K.
        label_smoothing: share of each label that is spread over all classes, in [0, 1); applied here, so the loss
            must leave labels (B, K) as they are (`distill.losses.cross_entropy` does).
        seed: at least 0.
    """

    def __init__(self, config: TrainConfig, classes: int, label_smoothing: float, seed: int) -> None:
        self._enabled, self._seed = config.mixup > 0 or config.cutmix > 0, seed
        self._mixup = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            prob=config.mixup_prob,
            switch_prob=config.mixup_switch_prob,
            mode="batch",
            label_smoothing=label_smoothing,
            num_classes=classes,
        )

    @property
    def enabled(self) -> bool:
        """Whether anything is mixed; if not, a call returns images and labels as they are."""
        return self._enabled

    def __call__(self, images: Tensor, labels: Tensor, step: int, rank: int = 0) -> tuple[Tensor, Tensor]:
        """A pure function of its arguments and the seed; the arguments are left as they are.

        Args:
            images: (B, C, H, W), floats, B even.
            labels: (B,) class indices.
            step: number of the forward pass since the training's start, at least 0.
            rank: of the process, at least 0: each process draws its own.

        Returns:
            mixed images (B, C, H, W), in the memory format of `images`, and probabilities (B, K), float32.

        Raises:
            ValueError: for an odd number of images, or images with an axis of time (event frames).
        """
        if not self.enabled:
            return images, labels
        if images.ndim != 4:
            allowed = "images (B, C, H, W); event frames have no mixup or cutmix"
            raise ValueError(f"mixup and cutmix take {allowed}, found shape {tuple(images.shape)}")
        if len(images) % 2:
            raise ValueError(f"mixup and cutmix take an even number of images, found {len(images)}")
        with _numpy_seeded(self._seed, step, rank):
            mixed, targets = self._mixup(images.clone(), labels)  # timm mixes in place
        return mixed, targets.float()


@contextmanager
def _numpy_seeded(seed: int, step: int, rank: int) -> Iterator[None]:
    """Seeds numpy's global generator, from which timm draws; afterwards it is as before."""
    before = np.random.get_state()
    np.random.seed(np.random.SeedSequence(seed, spawn_key=(step, rank)).generate_state(4))
    try:
        yield
    finally:
        np.random.set_state(before)
