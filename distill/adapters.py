"""From a student's firing rates to a teacher's features: the learnable piece between the two halves of a hybrid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.taps import Tap


class Adapter(nn.Module):
    """Firing rates into the teacher's feature space: resize, 1x1 convolution, batch norm, the teacher's activation.

    Args:
        in_channels: of the student's block.
        tap: gives the channels C and, where the feature has passed one, the activation.

    Takes (B, in_channels, h, w) and the size (H, W) of the teacher's feature, gives (B, C, H, W).
    """

    def __init__(self, in_channels: int, tap: Tap) -> None:
        super().__init__()
        channels = tap.shape[0]
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.act = tap.activation if tap.activation is not None else nn.Identity()
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, rate: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
        if tuple(rate.shape[2:]) != tuple(size):
            rate = F.interpolate(rate, tuple(size), mode="bilinear", align_corners=False)
        return self.act(self.bn(self.conv(rate)))
