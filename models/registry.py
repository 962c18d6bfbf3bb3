"""Spiking networks by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable

from torch import nn

from models.dynamics import NeuronConfig
from models.network import SpikingNetwork, as_spiking
from models.resnet_cifar import resnet18_cifar

_NETWORKS: dict[str, Callable[[int, int, NeuronConfig], nn.Module]] = {"resnet18_cifar": resnet18_cifar}


def list_snns() -> list[str]:
    """The names that `create_snn` takes."""
    return sorted(_NETWORKS)


def create_snn(
    name: str,
    num_classes: int = 10,
    timesteps: int = 4,
    in_chans: int = 3,
    neuron: NeuronConfig | None = None,
    algorithm: str = "rate_m",
) -> SpikingNetwork:
    """Makes a spiking network with fresh weights.

    Args:
        name: one of `list_snns()`.
        num_classes: number of logits.
        timesteps: T, at least 1.
        in_chans: channels of the images.
        neuron: the neurons' constants; None for the paper's.
        algorithm: the gradient in training, one of `models.ALGORITHMS`.

    Raises:
        ValueError: for an unknown name or algorithm, fewer than one step, class or channel.
    """
    if name not in _NETWORKS:
        close = difflib.get_close_matches(name, _NETWORKS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown spiking network {name!r}, known are {list_snns()}{hint}")
    if num_classes < 1 or in_chans < 1:
        raise ValueError(f"num_classes and in_chans must be at least 1, found {num_classes} and {in_chans}")
    neuron = neuron or NeuronConfig()
    spec = {
        "kind": "network",
        "name": name,
        "num_classes": num_classes,
        "timesteps": timesteps,
        "in_chans": in_chans,
        "neuron": dataclasses.asdict(neuron),
        "algorithm": algorithm,
    }
    network = _NETWORKS[name](num_classes, in_chans, neuron)
    return as_spiking(network, timesteps=timesteps, algorithm=algorithm, in_chans=in_chans, spec=spec)
