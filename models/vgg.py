"""The VGGs of Yu et al., NeurIPS 2024: convolutions with biases, norms, neurons, and average pools between stages.

A pool opens the stage behind it, so that each stage gives spikes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from models.resnet import Neuron, scaled


class VGG(nn.Module):
    """Stages `stage1`, `stage2`, ..., then `avg_pool` and a linear `classifier`.

    Takes (B, in_chans, H, W), gives (B, num_classes); stage1 keeps the size of the image, each later one halves it.
    Convolutions start from N(0, 0.5^2) with biases of 0, as in the authors' code. In front of a batch norm the scale
    of a weight w changes no output, only the learning rate: w turns by an angle of about lr |grad| / |w|, and |grad|
    goes with 1/|w|. The authors' linear layers start from N(0, 0.5^2), too. No norm takes that scale away, and a fresh
    network is confidently wrong, its loss far above that of chance; here they start as PyTorch's do.

    Args:
        stages: channels of the convolutions of each stage.
        in_chans: channels of the images.
        avg_pool: what stands between the last stage and the classifier; it gives maps of `side` x `side`.
        side: see `avg_pool`.
        num_classes: what the classifier gives.
        neuron: makes a layer of neurons.
        image_size: the H and W of the only images that are taken; None for any.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        in_chans: int,
        avg_pool: nn.Module,
        side: int,
        num_classes: int,
        neuron: Neuron,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.image_size = image_size
        self.stages = [f"stage{index + 1}" for index in range(len(stages))]
        self.feature_info = []
        for index, (name, channels) in enumerate(zip(self.stages, stages, strict=True)):
            self.add_module(name, _stage(in_chans, channels, index > 0, neuron))
            in_chans = channels[-1]
            self.feature_info.append({"num_chs": in_chans, "reduction": 2**index, "module": name})
        self.avg_pool = avg_pool
        self.classifier = nn.Linear(in_chans * side**2, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.5)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # ours have one

    def forward(self, x):
        height, width = x.shape[-2:]
        if self.image_size is not None and (height, width) != (self.image_size, self.image_size):
            allowed = f"{self.image_size}x{self.image_size}"
            raise ValueError(f"the network takes images of {allowed} pixels, found {height}x{width}")
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.classifier(self.avg_pool(x).flatten(1))


def _stage(in_channels: int, channels: Sequence[int], pool: bool, neuron: Neuron) -> nn.Sequential:
    stage = nn.Sequential()
    if pool:
        stage.add_module("pool", nn.AvgPool2d(2))
    for i, out_channels in enumerate(channels, start=1):
        stage.add_module(f"conv{i}", nn.Conv2d(in_channels, out_channels, 3, padding=1))
        stage.add_module(f"bn{i}", nn.BatchNorm2d(out_channels))
        stage.add_module(f"spike{i}", neuron())
        in_channels = out_channels
    return stage


def _scaled_stages(stages: Sequence[Sequence[int]], width: int | None) -> list[list[int]]:
    return [scaled(channels, width, 64) for channels in stages]


_VGG11 = ((64,), (128, 256), (512, 512), (512,), (512, 512))
_VGG13 = ((64, 64), (128, 128), (256, 256), (512, 512, 512), (512,))
_VGGSNN = ((64, 128), (256, 256), (512, 512), (512, 512))


def vgg11_cifar(num_classes: int, in_chans: int, width: int | None, neuron: Neuron) -> VGG:
    """Eight convolutions, a global average pool: 11.0 M parameters."""
    return VGG(_scaled_stages(_VGG11, width), in_chans, nn.AdaptiveAvgPool2d(1), 1, num_classes, neuron)


def vgg13_cifar(num_classes: int, in_chans: int, width: int | None, neuron: Neuron) -> VGG:
    """Ten convolutions, a global average pool: 9.4 M parameters."""
    return VGG(_scaled_stages(_VGG13, width), in_chans, nn.AdaptiveAvgPool2d(1), 1, num_classes, neuron)


def vggsnn_cifar(num_classes: int, in_chans: int, width: int | None, neuron: Neuron) -> VGG:
    """Eight convolutions, an average pool to 3x3 whatever the size of the image: 9.3 M parameters.

    The features of `vggsnn_dvs`, after Deng et al., "Temporal Efficient Training" (ICLR 2022).
    """
    return VGG(_scaled_stages(_VGGSNN, width), in_chans, nn.AdaptiveAvgPool2d(3), 3, num_classes, neuron)


def vggsnn_dvs(num_classes: int, in_chans: int, width: int | None, neuron: Neuron) -> VGG:
    """For frames of events of 48x48 pixels, four average pools to 3x3: 9.3 M parameters.

    The VGGSNN of Deng et al., "Temporal Efficient Training" (ICLR 2022).
    """
    return VGG(_scaled_stages(_VGGSNN, width), in_chans, nn.AvgPool2d(2), 3, num_classes, neuron, image_size=48)
