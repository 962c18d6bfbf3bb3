"""Accuracy and firing rates of what was trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distill.firing import ImageRates
from distill.hybrid import HybridOutput
from distill.interruption import INTERRUPTION
from distill.loop import channels_last
from models import SpikingNetwork

TEACHER = "teacher_top1"


@torch.no_grad()
def top1(
    accelerator: Accelerator, loader: DataLoader, logits_of: Callable[[Tensor], Mapping[str, Tensor]]
) -> dict[str, float]:
    """Top-1 accuracy in percent of each of several networks, in one pass over the data.

    Args:
        loader: a prepared loader of (images, labels).
        logits_of: from images (B, C, H, W), or event frames (T, B, C, H, W), to logits (B, K) by name. Where
            "teacher_top1" is among the names, the others' shares of predictions that are the teacher's are given, too:
            "student_agreement" to "student_top1".

    Raises:
        Preempted: if a process of the run was asked to stop.
    """
    names: list[str] = []
    correct, count = torch.zeros(()), 0
    for images, labels in loader:
        INTERRUPTION.leave_if_asked(accelerator, "an evaluation")
        with accelerator.autocast():
            logits = logits_of(channels_last(images))
        predicted = {name: values.argmax(1) for name, values in logits.items()}
        columns = {name: found == labels for name, found in predicted.items()}
        if (teacher := predicted.pop(TEACHER, None)) is not None:
            columns |= {n.replace("top1", "agreement"): found == teacher for n, found in predicted.items()}
        names = list(columns)
        hits = accelerator.gather_for_metrics(torch.stack(list(columns.values()), dim=1))
        correct, count = correct + hits.sum(0).cpu(), count + len(hits)
    return {name: 100 * hits / count for name, hits in zip(names, correct.tolist(), strict=True)}


def by_name(outputs: HybridOutput) -> dict[str, Tensor]:
    """The logits of a distiller under the names of the summary."""
    hybrids = {f"hybrid_top1/{tap}": logits for tap, logits in outputs.hybrid_logits.items()}
    student = {} if outputs.student_logits is None else {"student_top1": outputs.student_logits}
    return {TEACHER: outputs.teacher_logits, **hybrids, **student}


def top1_by_timesteps(
    accelerator: Accelerator, loader: DataLoader, student: SpikingNetwork, timesteps: list[int]
) -> dict[int, float]:
    """Top-1 in percent of a spiking network at several numbers of time steps, with its batch-norm statistics as
    they are (those of the T it was trained with)."""
    own = student.timesteps
    found = {}
    try:
        for steps in timesteps:
            student.timesteps = steps
            found[steps] = top1(accelerator, loader, lambda images: {"student": student(images)})["student"]
    finally:
        student.timesteps = own
    return found


@torch.no_grad()
def firing_rates(accelerator: Accelerator, loader: DataLoader, student: nn.Module) -> dict[str, float]:
    """Share of the neurons that fire in a step of each layer that runs, in [0, 1], by module name.

    Args:
        student: a spiking network, or a hybrid of one.
    """
    rates = ImageRates(student)
    sums, count = torch.zeros(()), 0
    for images, _ in loader:
        with accelerator.autocast(), rates.recorded():
            student(channels_last(images))
        found = accelerator.gather_for_metrics(rates.of_images())
        sums, count = sums + found.sum(0).cpu(), count + len(found)
    return dict(zip(rates.names, (sums / count).tolist(), strict=True))
