"""Event frames: counts of events, from how a recording is kept to what networks see.

Shapes: T time steps, B recordings, C = 2 polarities (off, on), H x W the input size, h x w the camera's pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.data.config import Preprocessing
from distill.data.seeds import SampleKey

MODES = ("nearest", "bilinear", "bicubic")


def summed(images: Tensor) -> Tensor:
    """What an analogue network sees: images (B, C, H, W) as they are, frames (T, B, C, H, W) summed over time."""
    return images.sum(0) if images.ndim == 5 else images


def stack_frames(items: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """A batch of frames (T, B, C, H, W) and labels (B,) from items ((T, C, H, W), class index)."""
    frames, labels = zip(*items, strict=True)
    return torch.stack(frames, 1), torch.tensor(labels)


class EventTransform:
    """From counts of events (T, C, h, w) to float32 frames (T, C, H, W), or to their sum (C, H, W).

    x_t = (n_t - mean / T) / std, so that the sum over time is (n - mean) / std: mean and std are those of a pixel's
    events in the whole recording. Training frames are shifted and flipped, all T in the same way.

    Args:
        pre: the input size, to which frames are resized, mean and std; `crop_pct` and `crop_mode` have no effect.
        timesteps: T; None for the sum over time.
        shift: most pixels of the random shift in each direction, of the resized frames; what leaves on one side comes
            back on the other.
        hflip: probability of a flip, in [0, 1].

    Raises:
        ValueError: for another number of channels than two, or a way of resizing that frames do not have.
    """

    def __init__(self, pre: Preprocessing, timesteps: int | None, shift: int = 0, hflip: float = 0.0) -> None:
        channels, *size = pre.input_size
        if channels != 2:
            raise ValueError(f"input_size is {pre.input_size}; event data has 2 channels, one a polarity")
        if pre.interpolation not in MODES:
            raise ValueError(f"interpolation is {pre.interpolation!r}; event frames allow {', '.join(MODES)}")
        if shift >= min(size):
            raise ValueError(f"event_shift is {shift}; frames of {size[0]}x{size[1]} allow 0 to {min(size) - 1}")
        self._size, self._mode = tuple(size), pre.interpolation
        self._shift, self._hflip, self._summed = shift, hflip, timesteps is None
        self._mean = torch.tensor(pre.mean).view(-1, 1, 1) / (timesteps or 1)
        self._std = torch.tensor(pre.std).view(-1, 1, 1)

    def finish(self, stored: Tensor, key: SampleKey) -> Tensor:
        """Counts (T, C, h, w) to frames, or their sum."""
        frames = stored.to(torch.float32)
        if self._summed:
            frames = frames.sum(0, keepdim=True)
        if frames.shape[2:] != self._size:
            # values are kept, as of images, not the number of events; antialiased: none is skipped in making small
            smooth = self._mode != "nearest"
            frames = F.interpolate(frames, self._size, mode=self._mode, antialias=smooth)
        rng = key.rng()
        if self._shift:
            offsets = [rng.randint(-self._shift, self._shift) for _ in range(2)]
            frames = frames.roll(offsets, (2, 3))
        if rng.random() < self._hflip:
            frames = frames.flip(3)
        frames = (frames - self._mean) / self._std
        return frames[0] if self._summed else frames
