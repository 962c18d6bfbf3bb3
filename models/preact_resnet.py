"""The pre-activation ResNet-34 of Yu et al., NeurIPS 2024: LIF - conv - norm in place of conv - norm - LIF.

As in the MS-ResNet of Hu et al. (arXiv 2112.08954) the shortcut carries currents, not spikes, from the stem to the
classifier: what the stages give has both signs.
"""

from __future__ import annotations

import functools

from torch import nn

from models.resnet import Neuron, ResNet, scaled
from models.sew_resnet import he_normal


class PreActBlock(nn.Module):
    """LIF - conv - norm twice, plus the shortcut. (B, in, H, W) -> (B, out, H/stride, W/stride)."""

    def __init__(self, in_channels: int, channels: int, stride: int, neuron: Neuron) -> None:
        super().__init__()
        self.spike1 = neuron()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.spike2 = neuron()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            # of the current, not of the spikes as in He et al.'s pre-activation blocks: as in the authors' network
            conv = nn.Conv2d(in_channels, channels, 1, stride)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x):
        return self.bn2(self.conv2(self.spike2(self.bn1(self.conv1(self.spike1(x)))))) + self.shortcut(x)


def preact_resnet34(num_classes: int, in_chans: int, width: int | None, neuron: Neuron) -> ResNet:
    """64-128-256-512 channels, 3-4-6-3 blocks: 21.8 M parameters with 1000 classes.

    Its convolutions have biases, as in the authors' code, which the batch norms behind them cancel in training. No
    neurons stand behind the stem and none in front of the classifier.
    """
    channels = scaled((64, 128, 256, 512), width, 64)
    conv = nn.Conv2d(in_chans, channels[0], 7, stride=2, padding=3)
    network = ResNet(
        nn.Sequential(conv, nn.BatchNorm2d(channels[0]), nn.MaxPool2d(3, stride=2, padding=1)),
        channels[0],
        functools.partial(PreActBlock, neuron=neuron),
        channels,
        (3, 4, 6, 3),
        lambda features: nn.Linear(features, num_classes),
        num_classes,
        stem_reduction=4,
    )
    he_normal(network)
    return network
