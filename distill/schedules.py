"""When which hybrid trains: all at once, one block after the other, or one drawn for each step.

A schedule is a list of stages, each trained by one call of `distill.loop.fit`. A step is one update of the optimizer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator
from torch import Tensor, nn

from distill.backward import Backward, Losses
from distill.checks import check
from distill.hybrid import HybridDistiller
from distill.parts import Calls, trained_until
from distill.schedule_config import ScheduleConfig
from models.network import probing

STUDENT = "student"
"""The name of the stage in which the student runs to its end."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stretch of training.

    Args:
        name: names its checkpoints and metrics.
        taps: of the hybrids that train.
        student: whether the student runs to its end.
        draw: whether each step trains one of the hybrids, drawn anew, instead of all.
        epochs: of this stage.
        epochs_before: of the stages in front.
        lr_epochs: epochs of all stages together, where they share one learning rate curve; else None.
    """

    name: str
    taps: tuple[str, ...]
    student: bool
    draw: bool
    epochs: int
    epochs_before: int = 0
    lr_epochs: int | None = None


def stages_of(config: ScheduleConfig, taps: Sequence[str], epochs: int) -> list[Stage]:
    """The stages of a schedule.

    Args:
        taps: in the order in which they fire.
        epochs: of the whole training, where `config.epochs` does not say.

    Raises:
        ValueError: for another number of stages than there are, or fewer epochs than stages.
    """
    if config.name != "progressive" or not taps:
        draw = config.name == "stochastic" and bool(taps)
        if config.epochs is not None:
            check(len(config.epochs) == 1, "schedule.epochs", config.epochs, "one number: there are no taps")
            epochs = config.epochs[0]
        return [Stage(name=STUDENT, taps=tuple(taps), student=True, draw=draw, epochs=epochs)]
    count = len(taps) + 1
    lengths = config.epochs
    if lengths is None:
        allowed = f"at least {count} with schedule.name=progressive: one for each of {list(taps)} and the student"
        check(epochs >= count, "train.epochs", epochs, allowed)
        lengths = [epochs // count] * (count - 1) + [epochs - epochs // count * (count - 1)]
    check(len(lengths) == count, "schedule.epochs", lengths, f"{count} numbers, for {list(taps)} and the student")
    names = [f"stage{number + 1}_{tap}" for number, tap in enumerate(taps)] + [STUDENT]
    return [
        Stage(
            name=name,
            taps=(taps[number],) if number < len(taps) else (),
            student=number == len(taps),
            draw=False,
            epochs=lengths[number],
            epochs_before=sum(lengths[:number]),
            lr_epochs=None if config.restart_lr else sum(lengths),
        )
        for number, name in enumerate(names)
    ]


def prepare_stage(distiller: HybridDistiller, stage: Stage, images: Tensor, freeze: bool) -> None:
    """Leaves gradients to the parameters that have a part in the stage, and to no other.

    Args:
        images: (B, C, H, W), as the student sees them; one is enough.
        freeze: whether what the stages before trained stays as it is, its batch-norm statistics included.
    """
    names = [tap.name for tap in distiller.taps]
    student = distiller.student
    distiller.freeze([])
    distiller.requires_grad_(stage.student)
    for name, adapter in zip(names, distiller.adapters, strict=True):
        adapter.requires_grad_(name in stage.taps)
    parameters = dict(student.named_parameters())
    if not stage.student:
        for name in trained_until(student, distiller.student_taps[stage.taps[0]], images):
            parameters[name].requires_grad_(True)
    done = names[: names.index(stage.taps[0])] if not stage.student else names
    if freeze and done:
        tap = distiller.student_taps[done[-1]]
        for name in trained_until(student, tap, images):
            parameters[name].requires_grad_(False)
        with probing(student, timesteps=2):  # the feedback of a loop runs from the second step on
            ran = Calls(student, tap, lambda: student(images[:1])).began_before
        parts = tap.split(".")
        around = {".".join(parts[:end]) for end in range(len(parts))}  # what holds the tap goes on behind it
        distiller.freeze(module for name, module in student.named_modules() if name in ran and name not in around)


def end_stages(distiller: HybridDistiller) -> None:
    """Gives every parameter its gradient back."""
    distiller.freeze([])
    distiller.requires_grad_(True)


def drawn_tap(seed: int, step: int, taps: Sequence[str]) -> str:
    """The tap of a step: a function of seed and step, so that all processes and a resumed run draw the same."""
    return taps[int(np.random.default_rng((seed, step)).integers(len(taps)))]


def different_steps(seed: int, stage: Stage) -> list[int]:
    """Steps that together run all that a step of the stage may: where taps are drawn, the first of each."""
    if not stage.draw:
        return [0]
    first: dict[str, int] = {}
    for step in itertools.count():
        first.setdefault(drawn_tap(seed, step, stage.taps), step)
        if len(first) == len(stage.taps):
            break
    return list(first.values())


def hybrid_backward(stage: Stage, losses: Losses, seed: int) -> Backward:
    """The forward and backward pass of one batch in a stage.

    Args:
        losses: of a `HybridOutput` and the labels.
    """

    def backward(
        accelerator: Accelerator, model: nn.Module, images: Tensor, labels: Tensor, step: int
    ) -> dict[str, Tensor]:
        active = [drawn_tap(seed, step, stage.taps)] if stage.draw else list(stage.taps)
        parts = losses(model(images, active=active, student=stage.student), labels)
        accelerator.backward(parts["total"])
        return {name: value.detach() for name, value in parts.items()}

    return backward
