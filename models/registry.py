"""Spiking networks by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable

from torch import nn

from models.dsr import DSRConfig, DSRNeuron
from models.dynamics import NeuronConfig
from models.encoding import PoissonEncoder
from models.feedback import FEEDBACK_ALGORITHMS, FEEDBACK_NEURON, FeedbackConfig
from models.feedback_networks import feedback_alexnet, feedback_cifarnet, feedback_convnet
from models.network import SpikingNetwork, as_spiking
from models.neuron import SpikingNeuron
from models.preact_resnet import preact_resnet34
from models.resnet_cifar import resnet18_cifar, resnet19_cifar
from models.sew_resnet import sew_resnet18, sew_resnet34, sew_resnet50
from models.vgg import vgg11_cifar, vgg13_cifar, vggsnn_cifar, vggsnn_dvs

Builder = Callable[[int, int, int | None, Callable[[], nn.Module]], nn.Module]
"""From the number of classes, channels of the images, width and a factory of neurons to a network."""

_NETWORKS: dict[str, Builder] = {
    builder.__name__: builder
    for builder in (
        *(resnet18_cifar, resnet19_cifar, vgg11_cifar, vgg13_cifar, vggsnn_cifar, vggsnn_dvs),
        *(sew_resnet18, sew_resnet34, sew_resnet50, preact_resnet34),
    )
}

FEEDBACK_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    builder.__name__: builder for builder in (feedback_convnet, feedback_alexnet, feedback_cifarnet)
}
"""Those with a feedback loop; a builder takes its settings, too."""


def list_snns() -> list[str]:
    """The names that `create_snn` takes."""
    return sorted([*_NETWORKS, *FEEDBACK_NETWORKS])


def create_snn(
    name: str,
    num_classes: int = 10,
    timesteps: int = 4,
    in_chans: int = 3,
    neuron: NeuronConfig | None = None,
    algorithm: str = "rate_m",
    width: int | None = None,
    encoder: PoissonEncoder | None = None,
    dsr: DSRConfig | None = None,
    feedback: FeedbackConfig | None = None,
) -> SpikingNetwork:
    """Makes a spiking network with fresh weights.

    Args:
        name: one of `list_snns()`.
        num_classes: number of logits.
        timesteps: T, at least 1.
        in_chans: channels of the images.
        neuron: the neurons' constants; None for the paper's.
        algorithm: the gradient in training, one of `models.ALGORITHMS`.
        width: channels of the first stage, to which all others keep their proportion; None for the paper's.
        encoder: of images; None for the same image at each step.
        dsr: the neurons of ``algorithm="dsr"``, in place of `neuron`; None for their defaults.
        feedback: the loop of a feedback network and its backward pass; None for those of the algorithm's paper.

    Raises:
        ValueError: for an unknown name or algorithm, fewer than one step, class or channel.
    """
    if name not in list_snns():
        close = difflib.get_close_matches(name, list_snns(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown spiking network {name!r}, known are {list_snns()}{hint}")
    if num_classes < 1 or in_chans < 1:
        raise ValueError(f"num_classes and in_chans must be at least 1, found {num_classes} and {in_chans}")
    if name in FEEDBACK_NETWORKS and algorithm not in FEEDBACK_ALGORITHMS:
        raise ValueError(
            f"{name} has a feedback loop: algorithm must be one of {FEEDBACK_ALGORITHMS}, found {algorithm!r}"
        )
    neuron = neuron or (FEEDBACK_NEURON if name in FEEDBACK_NETWORKS else NeuronConfig())
    dsr = dsr or DSRConfig()
    spec = {
        "kind": "network",
        "name": name,
        "num_classes": num_classes,
        "timesteps": timesteps,
        "in_chans": in_chans,
        "neuron": dataclasses.asdict(neuron),
        "algorithm": algorithm,
        "width": width,
        "encoder": None if encoder is None else dataclasses.asdict(encoder),
        "dsr": dataclasses.asdict(dsr),
    }
    make = (lambda: DSRNeuron(dsr)) if algorithm == "dsr" else (lambda: SpikingNeuron(neuron))
    if name in FEEDBACK_NETWORKS:
        feedback = (feedback or FeedbackConfig()).resolved(algorithm)
        spec["feedback"] = dataclasses.asdict(feedback)
        network = FEEDBACK_NETWORKS[name](num_classes, in_chans, width, make, feedback)
    else:
        network = _NETWORKS[name](num_classes, in_chans, width, make)
    return as_spiking(network, timesteps=timesteps, algorithm=algorithm, in_chans=in_chans, encoder=encoder, spec=spec)
