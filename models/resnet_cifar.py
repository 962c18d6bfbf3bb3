"""The ResNet-18 for 32x32 images of Yu et al., NeurIPS 2024 (64-128-256-512 channels, 11.2 M parameters)."""

from __future__ import annotations

from torch import nn

from models.dynamics import NeuronConfig
from models.neuron import SpikingNeuron


class BasicBlock(nn.Module):
    """conv - norm - LIF - conv - norm, plus the shortcut, then LIF. (B, in, H, W) -> (B, out, H/stride, W/stride)."""

    def __init__(self, in_channels: int, channels: int, stride: int, neuron: NeuronConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.spike1 = SpikingNeuron(neuron)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))
        self.spike2 = SpikingNeuron(neuron)

    def forward(self, x):
        out = self.spike1(self.bn1(self.conv1(x)))
        return self.spike2(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNetCifar(nn.Module):
    """Stem `conv0`, four stages `layer1` to `layer4`, global average pool, `classifier`.

    Takes (B, in_chans, H, W), gives (B, num_classes); the strides of the stages are 1, 2, 2, 2.
    """

    def __init__(
        self, blocks: tuple[int, int, int, int], num_classes: int, in_chans: int, neuron: NeuronConfig
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        stem = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
        self.conv0 = nn.Sequential(stem, nn.BatchNorm2d(64), SpikingNeuron(neuron))
        self.feature_info = [{"num_chs": 64, "reduction": 1, "module": "conv0"}]
        in_channels = 64
        for stage, count in enumerate(blocks):
            channels, stride = 64 * 2**stage, 1 if stage == 0 else 2
            layer = [BasicBlock(in_channels, channels, stride, neuron)]
            layer += [BasicBlock(channels, channels, 1, neuron) for _ in range(count - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layer))
            self.feature_info.append({"num_chs": channels, "reduction": 2**stage, "module": f"layer{stage + 1}"})
            in_channels = channels
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(in_channels, num_classes)

    def forward(self, x):
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv0(x)))))
        return self.classifier(self.avg_pool(x).flatten(1))


def resnet18_cifar(num_classes: int, in_chans: int, neuron: NeuronConfig) -> ResNetCifar:
    """Two blocks a stage."""
    return ResNetCifar((2, 2, 2, 2), num_classes, in_chans, neuron)
