"""Feedback networks of seconds."""

from __future__ import annotations

import torch
from torch import nn
from toy_networks import spiking

from models import FeedbackConfig, FeedbackLoop, NeuronConfig, SpikingNetwork, SpikingNeuron
from models.feedback import AverageNorm, Current
from models.feedback_networks import FeedbackNetwork

IF = NeuronConfig(leak=1.0, threshold=1.0)
T = 4


def one_pixel(timesteps: int = T, algorithm: str = "ide") -> SpikingNetwork:
    """A loop of two layers of one neuron each, whose every spike can be written down.

    W_x = W_1 = 1, F = 1/2, no biases, threshold 1. An image of 1/2:

        step           1     2     3     4
        v_1 before   0.5   1.0   1.0   1.0      0.5, then 0.5 + 0.5, then 0.5 and 0.5 of the feedback
        layer 1        -     x     x     x
        layer 2        -     x     x     x
    """
    config = FeedbackConfig(batch_norm=False, dropout=0.0, head_start=0.0).resolved(algorithm)
    one = lambda: nn.Conv2d(1, 1, 1, bias=False)  # noqa: E731
    back = nn.ConvTranspose2d(1, 1, 1, bias=False)
    maps = [Current(one(), None, 0.0)]
    loop = FeedbackLoop(Current(one(), None, 0.0), maps, Current(back, None, 0.0), lambda: SpikingNeuron(IF), config)
    network = FeedbackNetwork(nn.Identity(), loop, channels=1, side=1, reduction=1, num_classes=3)
    for parameter in network.parameters():
        nn.init.ones_(parameter)
    nn.init.constant_(back.weight, 0.5)
    return spiking(network.double(), timesteps, algorithm, in_chans=1).eval()


def with_stem(timesteps: int = 3, algorithm: str = "ide", bound: float = 0.2) -> SpikingNetwork:
    """A spiking convolution in front of a loop of two layers; maps of half the image's size, three channels, five
    classes."""
    torch.manual_seed(0)
    neuron = NeuronConfig(leak=1.0, threshold=0.5)
    config = FeedbackConfig(bound=bound).resolved(algorithm)

    def current(conv: nn.Module) -> Current:
        return Current(conv, AverageNorm(8, 1.0) if config.batch_norm else None, 0.0)

    stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), SpikingNeuron(neuron))
    loop = FeedbackLoop(
        current(nn.Conv2d(8, 8, 3, padding=1)),
        [current(nn.Conv2d(8, 8, 3, padding=1))],
        Current(nn.Conv2d(8, 8, 3, padding=1, bias=False), None, 0.0),
        lambda: SpikingNeuron(neuron),
        config,
    )
    return spiking(FeedbackNetwork(stem, loop, 8, side=2, reduction=2, num_classes=5), timesteps, algorithm)
