"""SEW ResNets (Fang et al., NeurIPS 2021, arXiv 2102.04159): the shortcut is added behind the neurons, spike to spike.

The sum of spikes (their g = ADD) counts in {0, 1, 2, ...}: what a block gives is no longer binary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import nn

from models.resnet import Neuron, ResNet, scaled


class SEWBlock(nn.Module):
    """conv - norm - LIF twice, plus the shortcut. (B, in, H, W) -> (B, out, H/stride, W/stride)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, bias: bool, neuron: Neuron) -> None:
        super().__init__()
        self.conv1 = conv_norm_neuron(in_channels, channels, 3, stride, bias, neuron)
        self.conv2 = conv_norm_neuron(channels, channels, 3, 1, bias, neuron)
        self.shortcut = _shortcut(in_channels, channels, stride, bias, neuron)

    def forward(self, x):
        return self.conv2(self.conv1(x)) + self.shortcut(x)


class SEWBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 conv - norm - LIF, a quarter of the channels inside, plus the shortcut; shapes as `SEWBlock`."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, bias: bool, neuron: Neuron) -> None:
        super().__init__()
        inner = channels // self.expansion
        self.conv1 = conv_norm_neuron(in_channels, inner, 1, 1, bias, neuron)
        self.conv2 = conv_norm_neuron(inner, inner, 3, stride, bias, neuron)
        self.conv3 = conv_norm_neuron(inner, channels, 1, 1, bias, neuron)
        self.shortcut = _shortcut(in_channels, channels, stride, bias, neuron)

    def forward(self, x):
        return self.conv3(self.conv2(self.conv1(x))) + self.shortcut(x)


def conv_norm_neuron(
    in_channels: int, channels: int, kernel: int, stride: int, bias: bool, neuron: Neuron
) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), neuron())


def _shortcut(in_channels: int, channels: int, stride: int, bias: bool, neuron: Neuron) -> nn.Sequential:
    if stride == 1 and in_channels == channels:
        return nn.Sequential()
    return conv_norm_neuron(in_channels, channels, 1, stride, bias, neuron)


def he_normal(network: nn.Module) -> None:
    """The convolutions' weights as torchvision's ResNets start (He et al. 2015, fan out), and so both papers'."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def sew_resnet18(num_classes: int, in_chans: int, width: int | None, neuron: Neuron) -> ResNet:
    """Fang et al.'s, no biases in the convolutions: 11.7 M parameters with 1000 classes."""
    return _sew_resnet(SEWBlock, (2, 2, 2, 2), False, num_classes, in_chans, width, neuron)


def sew_resnet34(num_classes: int, in_chans: int, width: int | None, neuron: Neuron) -> ResNet:
    """Yu et al.'s (NeurIPS 2024), whose convolutions have biases where Fang et al.'s have none: 21.8 M parameters
    with 1000 classes, 8512 of them these biases, which the batch norms behind them cancel in training."""
    return _sew_resnet(SEWBlock, (3, 4, 6, 3), True, num_classes, in_chans, width, neuron)


def sew_resnet50(num_classes: int, in_chans: int, width: int | None, neuron: Neuron) -> ResNet:
    """Fang et al.'s, no biases in the convolutions: 25.6 M parameters with 1000 classes."""
    return _sew_resnet(SEWBottleneck, (3, 4, 6, 3), False, num_classes, in_chans, width, neuron)


def _sew_resnet(
    block: type[SEWBlock] | type[SEWBottleneck],
    blocks: Sequence[int],
    bias: bool,
    num_classes: int,
    in_chans: int,
    width: int | None,
    neuron: Neuron,
) -> ResNet:
    stem_channels, *channels = scaled((64, *(block.expansion * c for c in (64, 128, 256, 512))), width, 64)
    conv0 = conv_norm_neuron(in_chans, stem_channels, 7, 2, bias, neuron)
    conv0.append(nn.MaxPool2d(3, stride=2, padding=1))
    network = ResNet(
        conv0,
        stem_channels,
        functools.partial(block, bias=bias, neuron=neuron),
        channels,
        blocks,
        lambda features: nn.Linear(features, num_classes),
        num_classes,
        stem_reduction=4,
    )
    he_normal(network)
    return network
