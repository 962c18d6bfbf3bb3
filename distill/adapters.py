"""From a student's firing rates to a teacher's features: the learnable piece between the two halves of a hybrid."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.taps import Tap

AdapterForm = Literal["conv1x1", "conv3x3", "norm"]
"""What mixes the rates' channels in front of the batch norm: a convolution, or nothing."""


class Adapter(nn.Module):
    """Firing rates into the teacher's feature space: resize, convolution, batch norm, the teacher's activation.

    Args:
        in_channels: of the student's block.
        tap: gives the channels C and, where the feature has passed one, the activation.
        form: of the convolution; "norm": there is none, so that each channel is scaled and shifted alone.

    Raises:
        ValueError: for another form, and for "norm" where the student's block has other channels than the tap.

    Takes (B, in_channels, h, w) and the size (H, W) of the teacher's feature, gives (B, C, H, W).
    """

    def __init__(self, in_channels: int, tap: Tap, form: AdapterForm = "conv1x1") -> None:
        super().__init__()
        channels = tap.shape[0]
        if form not in get_args(AdapterForm):
            raise ValueError(f"adapter must be one of {get_args(AdapterForm)}, found {form!r}")
        if form == "norm" and in_channels != channels:
            raise ValueError(
                f"tap {tap.name!r}: adapter must be conv1x1 or conv3x3 where the student's block has {in_channels} "
                f"channels and the teacher's {channels}, found 'norm'"
            )
        self.in_channels = in_channels
        self.form = form
        self.conv: nn.Module = nn.Identity()
        if form != "norm":
            kernel = {"conv1x1": 1, "conv3x3": 3}[form]
            self.conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False)
            nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.bn = nn.BatchNorm2d(channels)
        self.act = tap.activation if tap.activation is not None else nn.Identity()

    def forward(self, rate: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
        if tuple(rate.shape[2:]) != tuple(size):
            rate = F.interpolate(rate, tuple(size), mode="bilinear", align_corners=False)
        return self.act(self.bn(self.conv(rate)))
