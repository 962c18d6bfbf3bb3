"""Which networks the formats that are made of a plain network take."""

from __future__ import annotations

from typing import Any

from distill.export.job import Job
from distill.hybrid_network import Hybrid
from models import SpikingNetwork


def spiking_network(job: Job) -> SpikingNetwork:
    """The network of a job, where it is a spiking one from the image to the logits.

    Raises:
        ValueError: for a hybrid, or a network that draws its input at random where none is given as frames.
    """
    name, network = job.config.format, job.network
    if isinstance(network, Hybrid):
        tap: Any = network.tap
        raise ValueError(
            f"format {name} holds networks that spike up to their logits; this is a hybrid, whose part behind "
            f"{tap.name!r} is the analogue teacher's. Export the run's student, or use format snn"
        )
    if network.input_encoder is not None and not job.takes_frames:
        raise ValueError(
            "input must be frames for a network with a Poisson encoder, found images: the encoder draws its spikes "
            "anew in each call and stays outside of what is written"
        )
    return network
