"""Teachers of every shape, small: timm families without weights, and networks written by hand."""

import timm
import torch
from timm.models.vgg import VGG
from torch import nn

from models import NeuronConfig, SpikingNetwork, spiking_twin

SIZE = (3, 32, 32)
FAMILIES = {
    "resnet18": dict(channels=(4, 4, 8, 8)),
    "regnetx_002": dict(),
    "vgg": dict(cfg=[8, "M", 12, "M", 16, "M", 16], norm_layer=nn.BatchNorm2d, mlp_ratio=0.01),
    "mobilenetv2_035": dict(),
    "densenet121": dict(block_config=(2, 2, 2, 2), growth_rate=4),
    "convnext_atto": dict(depths=(1, 1, 2, 1), dims=(4, 8, 12, 16)),
}
RECTIFIED = {"resnet18", "regnetx_002", "vgg"}  # families whose features have just passed a ReLU


def teacher_of(family, dtype=torch.float32, seed=0):
    """Seven classes, in evaluation mode, with batch-norm statistics that are not those of the start."""
    torch.manual_seed(seed)
    kwargs = FAMILIES.get(family, {})
    network = VGG(num_classes=7, **kwargs) if family == "vgg" else timm.create_model(family, num_classes=7, **kwargs)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
    return network.to(dtype).eval()


def student_of(teacher, timesteps=2) -> SpikingNetwork:
    """The teacher's twin; of a ConvNeXt, whose layer norm does not spike, that of a ResNet."""
    if "ConvNeXt" in type(teacher).__name__:
        teacher = teacher_of("resnet18", next(teacher.parameters()).dtype)
    return spiking_twin(teacher, timesteps, input_size=SIZE)


def snn_of(threshold, timesteps=4) -> SpikingNetwork:
    """Three classes, images of 2 x 4 x 4; each of its neurons gets a current of 1 in each step and forgets nothing."""
    ann = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).eval()
    nn.init.zeros_(ann[0].weight)
    nn.init.ones_(ann[0].bias)
    return spiking_twin(ann, timesteps, NeuronConfig(leak=1.0, threshold=threshold), input_size=(2, 4, 4))


def student_taps_of(teacher, names):
    """ConvNeXt's stages at the ResNet's layers of about the same depth; else the same names."""
    if "ConvNeXt" not in type(teacher).__name__:
        return None
    return {name: f"layer{int(name[-1]) + 1}" for name in names}


def images_of(dtype=torch.float32, count=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *SIZE, generator=generator, dtype=torch.float64).to(dtype)


class Toy(nn.Module):
    """conv - ReLU - conv - ReLU - mean - linear, with hooks for trouble; (B, 3, H, W) -> (B, 5)."""

    num_classes = 5

    def __init__(self):
        super().__init__()
        self.first, self.act1 = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.second, self.act2 = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        self.unused = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.tail(self.act2(self.second(self.act1(self.first(x)))))

    def tail(self, x):
        return self.head(x.mean((2, 3)))


class Around(Toy):
    """A shortcut written by hand goes around `act2`."""

    def forward(self, x):
        x = self.act1(self.first(x))
        return self.tail(x + self.act2(self.second(x)))


class Twice(Toy):
    """`second` runs twice."""

    def forward(self, x):
        return self.tail(self.act2(self.second(self.second(self.act1(self.first(x))))))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(x), x


class YieldsPair(Toy):
    """`second` yields a tuple."""

    def __init__(self):
        super().__init__()
        self.second = Pair()

    def forward(self, x):
        return self.tail(self.act2(self.second(self.act1(self.first(x)))[0]))


class Functional(Toy):
    """Its first activation is a function: only the feature's sign tells."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(self.first)
        self.block.forward = lambda x: torch.relu(self.first(x))

    def forward(self, x):
        return self.tail(self.act2(self.second(self.block(x))))


class NotEmpty(Toy):
    """Reshapes its images in a way that a batch of none does not survive."""

    def forward(self, x):
        return super().forward(x.reshape(len(x), 3, -1).reshape(len(x), 3, 32, -1))
