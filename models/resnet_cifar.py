"""The ResNets of Yu et al., NeurIPS 2024, for 32x32 images."""

from __future__ import annotations

import functools

from torch import nn

from models.resnet import Neuron, ResNet, scaled


class BasicBlock(nn.Module):
    """conv - norm - LIF - conv - norm, plus the shortcut, then LIF. (B, in, H, W) -> (B, out, H/stride, W/stride)."""

    def __init__(self, in_channels: int, channels: int, stride: int, neuron: Neuron) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.spike1 = neuron()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))
        self.spike2 = neuron()

    def forward(self, x):
        # in one expression: a name for the spikes in between would keep all their T steps in memory to its end
        return self.spike2(self.bn2(self.conv2(self.spike1(self.bn1(self.conv1(x))))) + self.shortcut(x))


def resnet18_cifar(num_classes: int, in_chans: int, width: int | None, neuron: Neuron) -> ResNet:
    """64-128-256-512 channels, two blocks a stage: 11.2 M parameters."""
    channels = scaled((64, 128, 256, 512), width, 64)
    return ResNet(
        _stem(in_chans, channels[0], neuron),
        channels[0],
        functools.partial(BasicBlock, neuron=neuron),
        channels,
        (2, 2, 2, 2),
        lambda features: nn.Linear(features, num_classes),
        num_classes,
    )


def resnet19_cifar(num_classes: int, in_chans: int, width: int | None, neuron: Neuron) -> ResNet:
    """128-256-512 channels, 3-3-2 blocks, two linear layers with neurons between them: 12.7 M parameters."""
    *channels, hidden = scaled((128, 256, 512, 256), width, 128)
    return ResNet(
        _stem(in_chans, channels[0], neuron),
        channels[0],
        functools.partial(BasicBlock, neuron=neuron),
        channels,
        (3, 3, 2),
        lambda features: nn.Sequential(nn.Linear(features, hidden), neuron(), nn.Linear(hidden, num_classes)),
        num_classes,
    )


def _stem(in_chans: int, channels: int, neuron: Neuron) -> nn.Sequential:
    conv = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), neuron())
