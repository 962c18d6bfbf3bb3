"""The feedback networks of Xiao et al., NeurIPS 2021 (IDE) and Neural Networks 2023 (SPIDE).

s: stride 2; u: a transposed convolution of stride 2, which takes the feedback back to the first layer's size.

    feedback_convnet     64C5s (F64C5)                                      MNIST, N-MNIST
    feedback_alexnet     96C3s-256C3-384C3s-384C3-256C3 (F96C3u)            CIFAR
    feedback_cifarnet    128C3s-256C3-512C3s-1024C3-512C3 (F128C3u)         CIFAR
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from models.dynamics import NeuronConfig
from models.feedback import AverageNorm, Current, FeedbackConfig, FeedbackLoop
from models.resnet import Neuron, scaled


class FeedbackNetwork(nn.Module):
    """A `stem` (none in the papers' networks), a feedback `loop`, a pool and a linear `classifier` on the last layer.

    Takes (B, in_chans, H, W), gives (B, num_classes).

    Args:
        stem: what comes before the loop.
        loop: the loop.
        channels: that it gives.
        side: height and width of the maps that the classifier sees.
        reduction: how many times smaller than the images the loop's maps are.
        num_classes: what the classifier gives.
    """

    def __init__(
        self, stem: nn.Module, loop: FeedbackLoop, channels: int, side: int, reduction: int, num_classes: int
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stem = stem
        self.loop = loop
        self.avg_pool = nn.AdaptiveAvgPool2d(side)
        self.classifier = nn.Linear(channels * side**2, num_classes)
        self.feature_info = [{"num_chs": channels, "reduction": reduction, "module": "loop"}]

    def forward(self, x):
        return self.classifier(self.avg_pool(self.loop(self.stem(x))).flatten(1))


def feedback_convnet(
    num_classes: int, in_chans: int, width: int | None, neuron: Neuron, config: FeedbackConfig
) -> FeedbackNetwork:
    """One layer that feeds back on itself: 0.23 M parameters for MNIST."""
    (channels,) = scaled([64], width, 64)
    leak, _ = _constants(neuron)
    loop = FeedbackLoop(
        _current(nn.Conv2d(in_chans, channels, 5, stride=2, padding=2), leak, config),
        [],
        Current(_initialised(nn.Conv2d(channels, channels, 5, padding=2, bias=False)), None, config.dropout),
        neuron,
        config,
    )
    return FeedbackNetwork(nn.Identity(), loop, channels, config.readout_side or 14, 2, num_classes)


def feedback_alexnet(
    num_classes: int, in_chans: int, width: int | None, neuron: Neuron, config: FeedbackConfig
) -> FeedbackNetwork:
    """AlexNet-F: 3.7 M parameters for CIFAR-10."""
    return _deep(scaled([96, 256, 384, 384, 256], width, 96), num_classes, in_chans, neuron, config)


def feedback_cifarnet(
    num_classes: int, in_chans: int, width: int | None, neuron: Neuron, config: FeedbackConfig
) -> FeedbackNetwork:
    """CIFARNet-F: 11.8 M parameters for CIFAR-10."""
    return _deep(scaled([128, 256, 512, 1024, 512], width, 128), num_classes, in_chans, neuron, config)


def _deep(
    channels: Sequence[int], num_classes: int, in_chans: int, neuron: Neuron, config: FeedbackConfig
) -> FeedbackNetwork:
    """Five layers; the first and the third halve the maps.

    Without batch norm their weights start longer than in the authors' code: layers 2 to 5 keep the size of rates where
    rows have length theta sqrt(2), the initialisation of He et al., ICCV 2015, for a = clip(c / theta, 0, 1). At length
    1 rates fall to a third from layer to layer, and the last layers of a fresh network neither fire nor learn.
    """
    first, *others = channels
    leak, threshold = _constants(neuron)
    length = 1.0 if config.batch_norm else threshold * 2**0.5
    maps = [
        _current(nn.Conv2d(before, after, 3, stride=stride, padding=1), leak, config, length)
        for before, after, stride in zip(channels[:-1], others, (1, 2, 1, 1), strict=True)
    ]
    back = nn.ConvTranspose2d(channels[-1], first, 3, stride=2, padding=1, output_padding=1, bias=False)
    loop = FeedbackLoop(
        _current(nn.Conv2d(in_chans, first, 3, stride=2, padding=1), leak, config),
        maps,
        Current(_initialised(back), None, config.dropout),
        neuron,
        config,
    )
    return FeedbackNetwork(nn.Identity(), loop, channels[-1], config.readout_side or 8, 4, num_classes)


def _constants(neuron: Neuron) -> tuple[float, float]:
    """Leak and threshold."""
    config: NeuronConfig = neuron().config  # type: ignore[attr-defined, union-attr, assignment]
    return config.leak, config.threshold


def _current(conv: nn.Conv2d, leak: float, config: FeedbackConfig, length: float = 1.0) -> Current:
    norm = AverageNorm(conv.out_channels, leak) if config.batch_norm else None
    return Current(_initialised(conv, length), norm, config.dropout)


@torch.no_grad()
def _initialised(conv: nn.Conv2d | nn.ConvTranspose2d, length: float = 1.0) -> nn.Module:
    """Weights of a random direction and of a length for each channel that they give; no bias at first."""
    nn.init.uniform_(conv.weight, -1, 1)
    given = 1 if conv.transposed else 0
    others = [axis for axis in range(4) if axis != given]
    conv.weight *= length / torch.linalg.vector_norm(conv.weight, dim=others, keepdim=True)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
