"""Stopping an image as soon as the network is sure: accuracy against the steps that are spent.

After step t the network's answer is the mean of its logits so far. An image stops at the first step at which the
margin, the largest less the second largest probability of the softmax of that mean, reaches a threshold; at the last
step in any case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from distill.hybrid_network import Hybrid, running_mean
from distill.preparation import channels_last
from models import SpikingNetwork
from models.layout import at_least_float32


@torch.no_grad()
def early_exit(
    accelerator: Accelerator, loader: DataLoader, network: SpikingNetwork | Hybrid, thresholds: Sequence[float]
) -> list[dict[str, float]]:
    """Accuracy and steps of each threshold, at the network's T.

    Args:
        loader: prepared, of (images, labels).
        network: in evaluation mode.
        thresholds: of the margin, in (0, 1].

    Returns:
        for each threshold "threshold", "top1" in percent, "mean_steps" in [1, T].
    """
    columns = []
    for images, labels in loader:
        with accelerator.autocast():
            logits = cumulative_logits(network, channels_last(images))
        steps = torch.stack([exit_step(logits, threshold) for threshold in thresholds], dim=1)  # (B, thresholds)
        predicted = logits.argmax(2).T.gather(1, steps - 1)
        found = torch.stack([(predicted == labels[:, None]).float(), steps.float()], dim=2)
        columns.append(accelerator.gather_for_metrics(found).cpu())
    right, steps = torch.cat(columns).double().mean(0).unbind(1)
    return [
        {"threshold": threshold, "top1": 100 * r, "mean_steps": s}
        for threshold, r, s in zip(thresholds, right.tolist(), steps.tolist(), strict=True)
    ]


def exit_step(logits: Tensor, threshold: float) -> Tensor:
    """The step after which each image stops, from 1 to T, (B,).

    Args:
        logits: the mean of the logits up to each step, (T, B, K).
    """
    first, second = logits.softmax(2).topk(2, dim=2).values.unbind(2)
    sure = first - second >= threshold
    sure[-1] = True
    return sure.int().argmax(0) + 1


def cumulative_logits(network: SpikingNetwork | Hybrid, images: Tensor) -> Tensor:
    """The network's answer after each step, (T, B, K), at least float32: the last is that of a whole pass.

    Of a hybrid it is that of the teacher's blocks on the mean rate so far, which run anew after each step.

    Args:
        images: (B, C, H, W), or event frames (T, B, C, H, W).
    """
    if isinstance(network, Hybrid):
        return cast(Hybrid, network).cumulative_logits(images)  # mypy thinks of networks that are both
    return running_mean(at_least_float32(network(images, per_step=True)))
