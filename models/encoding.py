"""How images become the input of T time steps. Direct encoding, the default, is the same image each step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from spikingjelly.activation_based import encoding
from torch import Tensor


def takes_event_frames(channels: int) -> bool:
    """Whether a network's input is event frames, told by its channels where no data is at hand: images never have two,
    frames have the two polarities of a pixel's events."""
    return channels == 2


@dataclass(frozen=True, kw_only=True)
class PoissonEncoder:
    """Each value of an image, in [0, 1], is the probability of a spike at each step, drawn anew.

    Networks are given normalised images: (value - mean) / std. The encoder undoes that first.

    Args:
        mean: of the normalisation, a number for each channel, or one for all; 0 where images come as they are.
        std: likewise; 1 where images come as they are.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name in ("mean", "std"):  # a list, as JSON has it, would not hash
            given = getattr(self, name)
            values = (given,) if isinstance(given, (int, float)) else given
            object.__setattr__(self, name, tuple(float(value) for value in values))
        if not all(value > 0 for value in self.std):
            raise ValueError(f"std must be above 0, found {self.std}")

    def __call__(self, images: Tensor, timesteps: int) -> Tensor:
        """Spikes (T, B, C, H, W) in {0, 1} from images (B, C, H, W).

        Raises:
            ValueError: for values outside [0, 1], to rounding, or that are no floating-point numbers.
        """
        if not images.is_floating_point():
            raise ValueError(f"Poisson encoding takes floating-point values in [0, 1], found {images.dtype}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, images.shape[1]):
                wanted = f"1 or {images.shape[1]} numbers, one a channel"
                raise ValueError(f"{name} of the Poisson encoder must be {wanted}, found {getattr(self, name)}")
        dtype = torch.promote_types(images.dtype, torch.float32)
        mean, std = (torch.tensor(v, dtype=dtype, device=images.device)[:, None, None] for v in (self.mean, self.std))
        values = images.to(dtype) * std + mean
        low, high = values.aminmax()
        # a normalised image in half precision is off by as much when the normalisation is undone
        rounding = max(1e-4, 2 * torch.finfo(images.dtype).eps * (1 + max(map(abs, self.mean))))
        if low < -rounding or high > 1 + rounding or not torch.isfinite(high - low):
            raise ValueError(
                f"Poisson encoding takes values in [0, 1], found {low.item():.4g} to {high.item():.4g}; "
                f"the encoder knows a normalisation by mean {self.mean} and std {self.std}"
            )
        draw = encoding.PoissonEncoder(step_mode="s")
        # a value of 0 must not fire, though SpikingJelly's comparison with a drawn 0.0 would let it
        return torch.stack([draw(values).to(images.dtype) * (values > 0) for _ in range(timesteps)])
