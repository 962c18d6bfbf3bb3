"""Networks of seconds, and what the formats are given of them."""

from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from toy_networks import calibrated, conv_bn, spiking

from distill.export import ExportConfig, Job
from models import NeuronConfig, SpikingNetwork, SpikingNeuron, create_snn, save_snn

EXTRA = {"input_size": [1, 8, 8], "mean": [0.3], "std": [0.4], "classes": list("0123456789")}


class Small(nn.Module):
    """Two convolutions with a residual sum, average pooling, a linear layer."""

    def __init__(self, neuron: NeuronConfig, inputs: int = 1) -> None:
        super().__init__()
        self.stem, self.conv = conv_bn(inputs, 8, 3, 2), conv_bn(8, 8)
        self.spike1, self.spike2 = SpikingNeuron(neuron), SpikingNeuron(neuron)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 10)

    def forward(self, x):
        x = self.spike1(self.stem(x))
        x = self.spike2(self.conv(x) + x)
        return self.fc(self.pool(x).flatten(1))


def small(timesteps: int = 3, **neuron) -> SpikingNetwork:
    snn = spiking(Small(NeuronConfig(**{"leak": 0.5, "threshold": 0.7} | neuron)), timesteps, in_chans=1)
    return calibrated(snn, images(16))


def same_padding() -> nn.Module:
    """The first stages of an EfficientNet whose padding depends on the size of the image."""
    ann = timm.create_model("tf_efficientnet_lite0", num_classes=10)
    del ann.blocks[2:]
    ann.conv_head, ann.bn2, ann.classifier = nn.Identity(), nn.Identity(), nn.Linear(24, 10)
    return ann


def images(count: int, size: tuple[int, int, int] = (1, 8, 8)) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(1))


def saved(folder: Path, **neuron) -> Path:
    """A student's folder as a run leaves it, of digits."""
    snn = create_snn("vgg11_cifar", 10, 2, 1, NeuronConfig(threshold=0.7, **neuron), width=8)
    save_snn(calibrated(snn, images(32, (1, 16, 16))), folder, EXTRA | {"input_size": [1, 16, 16]})
    return folder


def job(network, samples: Tensor, folder: Path, format: str) -> Job:
    return Job(network, samples, folder, ExportConfig(model="student", out="out", format=format))
