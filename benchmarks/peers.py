"""Other implementations of the same training step, with the same neuron: leak 0.2, threshold 1, soft reset.

authors: the repository of Yu et al., NeurIPS 2024, as it is, with the SpikingJelly that it asks for.
spikingjelly: backpropagation through time as SpikingJelly 2 does it, with its own layers in multi-step mode.

Shapes: T steps, B images, C channels.
"""

from __future__ import annotations

import importlib
import math
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.contestants import Contestant, Settings

GET_AUTHORS = "git clone https://github.com/Tab-ct/rate-based-backpropagation DIR"
GET_SJ14 = "pip install --no-deps --target DIR spikingjelly==0.0.0.0.14"
LEAK = 0.2
"""Of a membrane after one step; the authors write it as the sigmoid of log(1/4)."""


def authors(settings: Settings) -> Contestant:
    """The authors' ResNet-18 in multi-step mode: rate-based ("rate_m") or BPTT ("bptt").

    The images are repeated T times, as in their scripts; the rate-based hooks and the neurons clear their own state.
    """
    _check("authors", settings, ("rate_m", "bptt"))
    if settings.width is not None:
        raise ValueError(f"the authors' networks have one width, found width {settings.width}")
    repository = _folder("--authors-path", settings.authors_path, "model/model_setting.py", GET_AUTHORS)
    sj14 = _folder("--sj14-path", settings.sj14_path, "spikingjelly-0.0.0.0.14.dist-info", GET_SJ14)
    assert "spikingjelly" not in sys.modules, "another SpikingJelly is imported already"
    sys.path[:0] = [str(sj14), str(repository)]
    theirs, setting = importlib.import_module("model"), importlib.import_module("model.model_setting")
    rate_based = settings.algorithm == "rate_m"
    network = theirs.resnet18(
        v_reset=None,
        thresh=1.0,
        decay=torch.tensor(math.log(LEAK / (1 - LEAK))),
        detach_reset=True,
        rate_flag=rate_based,
    )
    prepare = setting.rate_model_setting if rate_based else setting.bptt_model_setting
    prepare(network, time_step=settings.timesteps, step_mode="m")
    versions = {
        "python": platform.python_version(),
        "torch": version("torch"),
        "spikingjelly": version("spikingjelly"),
        "authors": machine.output("git", "-C", str(repository), "rev-parse", "HEAD")[:12] or "unknown commit",
    }
    return Contestant(
        network=network,
        logits=lambda images, part: network(images.repeat(settings.timesteps, 1, 1, 1)),
        versions=versions,
    )


def spikingjelly(settings: Settings) -> Contestant:
    """The ResNet-18 of `models.resnet_cifar` in SpikingJelly's layers, in multi-step mode, backend "torch"."""
    from spikingjelly.activation_based import functional

    from distill.report import versions

    _check("spikingjelly", settings, ("bptt",))
    network = _sj_resnet18(settings.width or 64)
    functional.set_step_mode(network, "m")

    def logits(images: Tensor, part: int) -> Tensor:
        stream = images.unsqueeze(0).repeat(settings.timesteps, 1, 1, 1, 1)  # (T, B, C, H, W)
        return network(stream).mean(0)

    return Contestant(network=network, logits=logits, finish=lambda: functional.reset_net(network), versions=versions())


def _sj_resnet18(width: int, num_classes: int = 10) -> nn.Module:
    """Stem, four stages of two blocks, global average pool, classifier: (T, B, 3, H, W) -> (T, B, classes)."""
    from spikingjelly.activation_based import layer, neuron, surrogate

    def lif() -> nn.Module:
        return neuron.LIFNode(
            tau=1 / (1 - LEAK),
            decay_input=False,
            v_reset=None,
            surrogate_function=surrogate.Sigmoid(alpha=4.0),
            detach_reset=True,
        )

    def conv_norm(entering: int, leaving: int, kernel: int, stride: int) -> list[nn.Module]:
        conv = layer.Conv2d(entering, leaving, kernel, stride, padding=kernel // 2, bias=False)
        return [conv, layer.BatchNorm2d(leaving)]

    class Block(nn.Module):
        def __init__(self, entering: int, leaving: int, stride: int) -> None:
            super().__init__()
            second = conv_norm(leaving, leaving, 3, 1)
            self.residual = nn.Sequential(*conv_norm(entering, leaving, 3, stride), lif(), *second)
            same = stride == 1 and entering == leaving
            self.shortcut = nn.Identity() if same else nn.Sequential(*conv_norm(entering, leaving, 1, stride))
            self.fire = lif()

        def forward(self, x: Tensor) -> Tensor:
            return self.fire(self.residual(x) + self.shortcut(x))

    layers: list[nn.Module] = [*conv_norm(3, width, 3, 1), lif()]
    entering = width
    for stage in range(4):
        leaving = width * 2**stage
        layers += [Block(entering, leaving, 1 if stage == 0 else 2), Block(leaving, leaving, 1)]
        entering = leaving
    return nn.Sequential(*layers, layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(entering, num_classes))


def _check(peer: str, settings: Settings, algorithms: tuple[str, ...]) -> None:
    if settings.network != "resnet18_cifar":
        raise ValueError(f"peer {peer} has network 'resnet18_cifar', found {settings.network!r}")
    if settings.algorithm not in algorithms:
        raise ValueError(f"algorithm of peer {peer} must be one of {algorithms}, found {settings.algorithm!r}")


def _folder(option: str, path: Path | None, holds: str, how_to_get: str) -> Path:
    if path is None:
        raise FileNotFoundError(f"{option} DIR is needed; to get it: {how_to_get}")
    if not (path / holds).exists():
        raise FileNotFoundError(f"{option} {path} holds no {holds}; to get it: {how_to_get}")
    return path
