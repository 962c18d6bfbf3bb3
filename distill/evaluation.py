"""Accuracy of what was trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from distill.hybrid import HybridOutput
from distill.interruption import INTERRUPTION
from distill.preparation import channels_last
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
    correct, count = torch.zeros((), dtype=torch.long, device=accelerator.device), 0
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
        correct, count = correct + hits.sum(0), count + len(hits)  # on the device: nothing waits for it
    return {name: 100 * hits / count for name, hits in zip(names, correct.tolist(), strict=True)}


def by_name(outputs: HybridOutput) -> dict[str, Tensor]:
    """The logits of a distiller under the names of the summary."""
    hybrids = {f"hybrid_top1/{tap}": logits for tap, logits in outputs.hybrid_logits.items()}
    student = {} if outputs.student_logits is None else {"student_top1": outputs.student_logits}
    return {TEACHER: outputs.teacher_logits, **hybrids, **student}


@contextlib.contextmanager
def at_timesteps(student: SpikingNetwork, timesteps: int) -> Iterator[None]:
    """A spiking network at another T, with its batch-norm statistics as they are; its own T comes back.

    Raises:
        ValueError: if it is none.
    """
    own = student.timesteps
    student.timesteps = timesteps
    try:
        yield
    finally:
        student.timesteps = own
