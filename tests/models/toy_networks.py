"""Ten-line networks with spiking neurons, each around one thing that blocks do. They run on plain tensors, too."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, DropPath
from timm.layers.pool2d_same import MaxPool2dSame
from torch import nn

from models import NeuronConfig, SpikingNeuron
from models.network import SpikingNetwork, as_spiking
from models.spiketrain import SpikeTrain
from models.tape import Tape


def spiking(network: nn.Module, timesteps: int, algorithm: str = "rate_m", in_chans: int = 3) -> SpikingNetwork:
    """A copy of a toy network as a `SpikingNetwork`."""
    return as_spiking(
        copy.deepcopy(network), timesteps=timesteps, algorithm=algorithm, in_chans=in_chans, spec={"kind": "toy"}
    )


def generic(network: nn.Module) -> nn.Module:
    """In float64, with batch norms that are not the identity and statistics that are not those of no data."""
    network = network.double()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.affine:
                nn.init.uniform_(module.weight, 0.7, 1.6)
                nn.init.uniform_(module.bias, -0.2, 0.6)
            if module.running_mean is not None:
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.02, 0.2)  # about what convolutions of spikes have: all layers fire
    return network


def without_norms(network: nn.Module) -> nn.Module:
    """Every batch norm becomes nothing (timm's: its activation), with weights large enough that all layers fire."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(module, name, getattr(child, "act", None) or nn.Identity())
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, 0.3 / fan_in, 2 / fan_in**0.5)
    return network


@torch.no_grad()
def calibrated(snn: SpikingNetwork, images: torch.Tensor) -> SpikingNetwork:
    """In evaluation mode, with the running statistics of these images: every layer fires, and not all the time."""
    norms = [m for m in snn.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    snn.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    logits = snn.eval()(images)
    assert (logits.std(0) > 1e-6).all(), "logits that do not depend on the image tell nothing"
    return snn


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Head(nn.Sequential):
    def __init__(self, channels: int, classes: int = 5) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(channels, classes))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, neuron: NeuronConfig) -> None:
        super().__init__()
        self.conv1, self.spike1 = conv_bn(inputs, outputs, 3, stride), SpikingNeuron(neuron)
        self.conv2, self.spike2 = conv_bn(outputs, outputs), SpikingNeuron(neuron)
        self.shortcut = nn.Identity() if stride == 1 else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x):
        return self.spike2(self.conv2(self.spike1(self.conv1(x))) + self.shortcut(x))


class Residual(nn.Sequential):
    """Identity and 1x1 shortcuts, max, average and global pooling."""

    def __init__(self, neuron: NeuronConfig) -> None:
        super().__init__(
            conv_bn(3, 6),
            SpikingNeuron(neuron),
            Block(6, 6, 1, neuron),
            nn.MaxPool2d(3, 2, 1),
            Block(6, 8, 2, neuron),
            nn.AvgPool2d(2, 1),
            conv_bn(8, 8),
            SpikingNeuron(neuron),
            Head(8),
        )


class PreActivation(nn.Module):
    """Batch norm of a residual sum, and of a sum of sums."""

    def __init__(self, neuron: NeuronConfig) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        self.spikes = nn.ModuleList(SpikingNeuron(neuron) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(3))
        self.head = Head(6)

    def forward(self, x):
        x = self.stem(x)
        for norm, spike, conv in zip(self.norms[:3], self.spikes[:3], self.convs, strict=True):
            x = x + conv(spike(norm(x)))
        return self.head(self.spikes[3](self.norms[3](x)))


class ConvolutionKinds(nn.Sequential):
    """Bias, groups, strides, dilation, oblong kernels, "same" (even and lopsided) and "valid" padding."""

    def __init__(self, neuron: NeuronConfig) -> None:
        def layer(*args, **kwargs):
            return nn.Sequential(nn.Conv2d(*args, **kwargs), nn.BatchNorm2d(args[1]), SpikingNeuron(neuron))

        super().__init__(
            layer(3, 6, 3, padding="same"),
            layer(6, 6, 4, padding="same", dilation=(1, 3)),
            layer(6, 6, (2, 3), padding="same", groups=3),
            layer(6, 6, 3, padding="same", dilation=2, groups=2, bias=False),
            layer(6, 6, 3, stride=(2, 1), padding=(2, 1), dilation=(2, 1)),
            layer(6, 6, 3, padding=1, groups=6),
            layer(6, 8, (1, 2), padding="valid", stride=(1, 2)),
            Head(8),
        )


class Masks(nn.Module):
    """Dropout of elements and channels, stochastic depth, dropout in front of the classifier."""

    def __init__(self, neuron: NeuronConfig) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 8), nn.Dropout2d(0.3), SpikingNeuron(neuron))
        self.conv1, self.conv2 = conv_bn(8, 8), conv_bn(8, 8)
        self.spike1, self.spike2 = SpikingNeuron(neuron), SpikingNeuron(neuron)
        self.drop, self.drop_path = nn.Dropout(0.5), DropPath(0.4)
        self.pool, self.last, self.fc = nn.AdaptiveAvgPool2d(1), nn.Dropout(0.5, inplace=True), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.spike1(x + self.drop_path(self.conv1(self.drop(x))))
        x = self.spike2(self.conv2(x))
        return self.fc(self.last(self.pool(x).flatten(1)))


class Shapes(nn.Module):
    """cat, chunk, split, slices, reshapes, interpolation, padding, means, linear layers on tokens."""

    def __init__(self, neuron: NeuronConfig) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 8), SpikingNeuron(neuron))
        self.a, self.b, self.c = conv_bn(4, 4), conv_bn(4, 4, 1), conv_bn(3, 2)
        self.spike_a, self.spike_b = SpikingNeuron(neuron), SpikingNeuron(neuron)
        self.merge = nn.Sequential(conv_bn(12, 6), SpikingNeuron(neuron))
        self.pad = nn.ZeroPad2d((1, 0, 2, 1))
        self.token, self.norm, self.spike_t = nn.Linear(6, 8), nn.BatchNorm1d(8), SpikingNeuron(neuron)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        first, second = x.chunk(2, dim=1)
        first, second = self.spike_a(self.a(first)), self.spike_b(self.b(second))
        three, two, rest = torch.split(first, [2, 1, 1], 1)
        mixed = self.c(torch.cat([three, rest], 1))
        x = torch.cat([second, mixed, two, x[:, 2:6], x[:, :1]], dim=1)
        x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear", align_corners=False)
        x = F.pad(x, (0, 1, 1, 0), value=0.25)
        x = self.merge(self.pad(x))
        tokens = self.token(x.flatten(2).transpose(1, 2))  # (B, H*W, C)
        tokens = self.spike_t(self.norm(tokens.permute(0, 2, 1)))
        batch, channels, _ = tokens.shape
        folded = tokens.reshape(batch, channels // 2, -1).mean(2, keepdim=True).squeeze(2)
        pooled = torch.cat([folded, tokens.mean(-1), tokens.view(batch, 4, -1).sum(2) / 128], 1)
        return self.fc(pooled.unsqueeze(1).flatten(1))


class Sums(nn.Module):
    """Layer scale, products with numbers, long sums, one train twice, `+=` that must not change its left side."""

    def __init__(self, neuron: NeuronConfig) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 6), SpikingNeuron(neuron))
        self.convs = nn.ModuleList(conv_bn(6, 6) for _ in range(6))
        self.spikes = nn.ModuleList(SpikingNeuron(neuron) for _ in range(4))
        self.gamma = nn.Parameter(torch.rand(6, 1, 1) + 0.5)
        self.beta = nn.Parameter(torch.rand(1, 6, 1, 1))
        self.register_buffer("offset", torch.rand(6, 1, 1))
        self.head = Head(6)

    def forward(self, x):
        x = self.stem(x)
        y = self.convs[0](x) * self.gamma
        y += x
        x = self.spikes[0](y + self.beta)  # y is used again, and so is x
        y = self.convs[1](x) + self.convs[2](x) + self.convs[3](x) + self.convs[4](x) + x + y
        z = self.spikes[1](0.5 * y)
        z = self.spikes[2](self.gamma * z + z + self.offset - x / 4)
        z = torch.sub(self.convs[5](z), x, alpha=0.5) + sum([x, z])
        return self.head(self.spikes[3](1.0 - torch.add(z, -1.0)) + torch.mul(z, 0.125))


class Poolings(nn.Sequential):
    """Max pooling of spikes with padding (of -inf, too) and overlap, of normalised currents, adaptive; averages."""

    def __init__(self, neuron: NeuronConfig) -> None:
        super().__init__(
            conv_bn(3, 6),
            nn.MaxPool2d(3, 1, 1),
            SpikingNeuron(neuron),
            nn.MaxPool2d(3, 2, 1, ceil_mode=True),
            MaxPool2dSame(2, 1),
            conv_bn(6, 6),
            nn.MaxPool2d(2, 1),
            SpikingNeuron(neuron),
            nn.AvgPool2d(3, 1, 1, count_include_pad=False),
            conv_bn(6, 8),
            SpikingNeuron(neuron),
            nn.AdaptiveMaxPool2d(3),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(1),
            nn.Linear(32, 5),
        )


class Norms(nn.Module):
    """Without weights, without running statistics, with a cumulative average, twice in a row, timm's with its act."""

    def __init__(self, neuron: NeuronConfig) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6, affine=False),
            SpikingNeuron(neuron),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.BatchNorm2d(6, track_running_stats=False, eps=1e-3),
            SpikingNeuron(neuron),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.BatchNorm2d(6, momentum=None),
            nn.BatchNorm2d(6, momentum=0.7, eps=0.5),  # not nearly what the norm before it is
            SpikingNeuron(neuron),
            nn.Conv2d(6, 6, 3, padding=1),
        )
        self.norm_act = BatchNormAct2d(6, act_layer=nn.ReLU)
        self.norm_act.act = SpikingNeuron(neuron)
        self.fc1, self.norm1, self.spike1 = nn.Linear(6, 12), nn.BatchNorm1d(12), SpikingNeuron(neuron)
        self.fc2 = nn.Linear(12, 5)

    def forward(self, x):
        x = self.norm_act(self.features(x)).mean((2, 3))
        return self.fc2(self.spike1(self.norm1(self.fc1(x))))


class SharedNeuron(nn.Module):
    """One neuron module called twice a step, as in code with a single `self.relu`."""

    def __init__(self, neuron: NeuronConfig) -> None:
        super().__init__()
        self.a, self.b, self.head = conv_bn(3, 6), conv_bn(6, 6), Head(6)
        self.spike = SpikingNeuron(neuron)

    def forward(self, x):
        return self.head(self.spike(self.b(self.spike(self.a(x)))))


class StepByStep(nn.Module):
    """Inference of a part of a network a time step at a time, each on a train of one step, as feedback loops do it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        tape, outputs = Tape(timesteps=1), []
        for step in x.stream:
            tape.rewind()
            outputs.append(self.inner(SpikeTrain.constant(step, 1, "plain_step", tape)).folded)
        return x.derive(torch.cat(outputs), x.timesteps)


def whole_and_stepped(toy: str, timesteps: int, images: torch.Tensor) -> tuple[SpikingNetwork, SpikingNetwork]:
    """A toy network and the same as the part `inner` of one that runs it a step at a time; `calibrated` on images."""
    network = generic(TOYS[toy](NeuronConfig()))
    whole = calibrated(spiking(network, timesteps), images)
    network.load_state_dict(whole.state_dict())
    return whole, spiking(StepByStep(network), timesteps).eval()


TOYS = {
    toy.__name__: toy
    for toy in (Residual, PreActivation, ConvolutionKinds, Masks, Shapes, Sums, Poolings, Norms, SharedNeuron)
}
