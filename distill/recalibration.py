"""Batch-norm statistics estimated anew, as another number of time steps wants them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill.hybrid_network import Hybrid
from distill.preparation import channels_last
from models import SpikingNetwork
from models.feedback import AverageNorm


@contextlib.contextmanager
def recalibrated(
    accelerator: Accelerator, network: SpikingNetwork | Hybrid, batches: Iterable[Tensor]
) -> Iterator[int]:
    """In here the batch norms have the statistics of these images at the network's T; its own come back after it.

    Yields the number of images. Running means and variances are the means over all batches, each with equal weight. Of
    a hybrid they are those of the spiking blocks and of the adapter; the frozen teacher's stay. Inside of a feedback
    loop steps are normalised with the statistics so far, as in its training (`models.feedback.AverageNorm`): in the
    first batch with those that the network has.

    Args:
        network: in evaluation mode.
        batches: images (B, C, H, W) or event frames (T, B, C, H, W), the same on all processes, at least one batch.

    Raises:
        ValueError: for a network without batch norms that have running statistics.
    """
    norms = _norms_with_statistics(network)
    if not norms:
        raise ValueError(f"recalibrate: {type(network).__name__} has no batch norms with running statistics")
    kept = [(m.momentum, {name: buffer.clone() for name, buffer in m.named_buffers(recurse=False)}) for m in norms]
    try:
        yield _estimate(accelerator, network, norms, batches)
    finally:
        for norm, (momentum, buffers) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            for name, buffer in buffers.items():
                norm.get_buffer(name).copy_(buffer)


@torch.no_grad()
def _estimate(
    accelerator: Accelerator,
    network: SpikingNetwork | Hybrid,
    norms: list[nn.modules.batchnorm._BatchNorm],
    batches: Iterable[Tensor],
) -> int:
    count = 0
    spiking: Any = network.student if isinstance(network, Hybrid) else network
    for norm in norms:
        norm.training = True  # alone: all other modules stay in evaluation mode
    # norms of a feedback loop learn the statistics of averages, which passes of training alone are made of: the network
    # itself chooses the pass by its own mode
    spiking.training = any(isinstance(norm, AverageNorm) for norm in norms)
    try:
        for number, images in enumerate(batches, 1):
            for norm in norms:
                norm.momentum = 1 / number  # the mean over all batches so far: the first replaces what was there
            with accelerator.autocast():
                logits = network(channels_last(images))
            count += len(logits)
    finally:
        spiking.training = False
        for norm in norms:
            norm.training = False
    return count


def _norms_with_statistics(network: SpikingNetwork | Hybrid) -> list[nn.modules.batchnorm._BatchNorm]:
    """Those of all parts but the frozen teacher."""
    parts: list[Any] = [network.student, network.adapter] if isinstance(network, Hybrid) else [network]
    modules = [module for part in parts for module in part.modules()]
    return [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
