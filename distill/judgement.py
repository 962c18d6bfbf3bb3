"""All figures of some networks in one pass over the data: top-1, top-5, calibration, agreement, firing rates.

Calibration error: the expected calibration error (Guo et al., ICML 2017, equation 3) with 15 bins of equal width,

    ECE = sum_b n_b / n |accuracy(b) - confidence(b)|

where the confidence of an image is the largest probability of its softmax, and bin b holds those in ((b-1)/15, b/15].
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distill.evaluation import TEACHER
from distill.firing import ImageRates
from distill.interruption import INTERRUPTION
from distill.preparation import channels_last

BINS = 15


class Figures(NamedTuple):
    """Of one network over all images."""

    top1: float
    """In percent."""
    top5: float
    """In percent: the label is among the five largest logits; with fewer classes always."""
    ece: float
    """Expected calibration error, in [0, 1]."""
    confidence: float
    """Mean of the largest probability, in [0, 1]."""
    agreement: float | None
    """Predictions that are the teacher's, in percent; None where there is no teacher, and for itself."""


class Judgement(NamedTuple):
    """What one pass over the data said."""

    figures: dict[str, Figures]
    """Of each network, by name."""
    firing_rates: dict[str, float]
    """Of the layers of the network that was asked for, in [0, 1]."""
    images: int


@torch.no_grad()
def judge(
    accelerator: Accelerator,
    loader: DataLoader,
    logits_of: Callable[[Tensor], Mapping[str, Tensor]],
    spiking: nn.Module | None = None,
) -> Judgement:
    """Looks at several networks in one pass; each image counts once, however many processes there are.

    Args:
        loader: a prepared loader of (images, labels).
        logits_of: from images (B, C, H, W), or event frames (T, B, C, H, W), to logits (B, K) by name; the name
            `evaluation.TEACHER` is that of the teacher, with which the others are compared.
        spiking: a network, or hybrid, that `logits_of` runs, whose firing rates are wanted.
    """
    rates = None if spiking is None else ImageRates(spiking)
    names: list[str] = []
    columns, fired = [], []
    for images, labels in loader:
        INTERRUPTION.leave_if_asked(accelerator, "an evaluation")
        with accelerator.autocast(), contextlib.nullcontext() if rates is None else rates.recorded():
            logits = logits_of(channels_last(images))
        names = list(logits)
        teacher = logits[TEACHER].argmax(1) if TEACHER in logits else None
        of_batch = torch.stack([_columns(values, labels, teacher) for values in logits.values()], dim=1)
        columns.append(accelerator.gather_for_metrics(of_batch).cpu())
        if rates is not None:
            fired.append(accelerator.gather_for_metrics(rates.of_images()).cpu())
    table = torch.cat(columns)
    figures = {name: _figures(table[:, i], name, TEACHER in names) for i, name in enumerate(names)}
    mean = [] if rates is None else torch.cat(fired).double().mean(0).tolist()
    return Judgement(figures, dict(zip([] if rates is None else rates.names, mean, strict=True)), len(table))


def _columns(logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
    """Right, among the first five, confidence, as the teacher: (B, 4), float32."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    predicted = logits.argmax(1)
    same = predicted == (predicted if teacher is None else teacher)
    confidence = logits.float().softmax(1).amax(1)
    among = (best == labels[:, None]).any(1)
    return torch.stack([(predicted == labels).float(), among.float(), confidence, same.float()], dim=1)


def _figures(table: Tensor, name: str, compared: bool) -> Figures:
    right, among, confidence, same = table.double().unbind(1)
    agreement = 100 * same.mean().item() if compared and name != TEACHER else None
    return Figures(
        100 * right.mean().item(),
        100 * among.mean().item(),
        calibration_error(confidence, right),
        confidence.mean().item(),
        agreement,
    )


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Expected calibration error with `BINS` bins of equal width, in [0, 1].

    Args:
        confidence: largest probability of each image, in [0, 1], (N,).
        right: 1 where the prediction is right, else 0, (N,).
    """
    gap = torch.zeros(BINS, dtype=torch.float64)
    places = ((confidence.double() * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    gap.index_add_(0, places, right.double() - confidence.double())
    return gap.abs().sum().item() / len(confidence)
