"""The frame that every ResNet here is built in, and the rule by which `width` scales a network's channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

Neuron = Callable[[], nn.Module]
"""Makes one layer of neurons; called once for each layer of a network."""


def scaled(channels: Sequence[int], width: int | None, paper_width: int) -> list[int]:
    """Channel counts of a network whose first stage has `width` channels where the paper's has `paper_width`.

    Raises:
        ValueError: for a `width` that is neither None (the paper's) nor an integer of at least 1.
    """
    if width is None:
        return list(channels)
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise ValueError(f"width must be an integer of at least 1 or None, found {width!r}")
    counts = [count * width // paper_width for count in channels]
    if 0 in counts:
        raise ValueError(f"width {width} leaves a layer without channels: {list(channels)} would become {counts}")
    return counts


class ResNet(nn.Module):
    """Stem `conv0`, stages `layer1`, `layer2`, ..., global average pool, `classifier`.

    Takes (B, in_chans, H, W), gives (B, num_classes); the first stage keeps the stem's size, each later one halves it.

    Args:
        stem: (B, in_chans, H, W) -> (B, stem_channels, H/stem_reduction, W/stem_reduction).
        stem_channels: channels that the stem gives.
        block: makes a block of the given input channels, output channels and stride.
        channels: what each stage gives.
        blocks: how many blocks each stage has.
        classifier: makes the classifier of that many features.
        num_classes: what the classifier gives.
        stem_reduction: how many times smaller the stem makes an image.
    """

    def __init__(
        self,
        stem: nn.Module,
        stem_channels: int,
        block: Callable[[int, int, int], nn.Module],
        channels: Sequence[int],
        blocks: Sequence[int],
        classifier: Callable[[int], nn.Module],
        num_classes: int,
        stem_reduction: int = 1,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv0 = stem
        self.feature_info = [{"num_chs": stem_channels, "reduction": stem_reduction, "module": "conv0"}]
        self.stages = [f"layer{stage + 1}" for stage in range(len(blocks))]
        in_channels, reduction = stem_channels, stem_reduction
        for name, out_channels, count in zip(self.stages, channels, blocks, strict=True):
            stride = 1 if name == "layer1" else 2
            layer = [block(in_channels, out_channels, stride)]
            layer += [block(out_channels, out_channels, 1) for _ in range(count - 1)]
            self.add_module(name, nn.Sequential(*layer))
            in_channels, reduction = out_channels, reduction * stride
            self.feature_info.append({"num_chs": out_channels, "reduction": reduction, "module": name})
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = classifier(in_channels)

    def forward(self, x):
        x = self.conv0(x)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.classifier(self.avg_pool(x).flatten(1))
