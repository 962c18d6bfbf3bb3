"""Accuracy against energy: summary.json's "frontier", a row for each network and number of time steps."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from distill.energy import AnalogueCosts, Cost, adapter_cost, analogue_costs, hybrid_cost, spiking_costs
from distill.evaluation import at_timesteps
from distill.hybrid import HybridDistiller
from distill.processes import Agreement
from distill.schedules import Stage
from distill.session import Session
from models import SpikingNetwork
from models.io import replace_text

log = logging.getLogger(__name__)

ENERGY_IMAGES = 256
"""How many evaluation images spikes are counted on, at most."""

TEACHER, STUDENT = "teacher", "student"

Row = dict[str, Any]
"""{"network", "timesteps", "top1", ...}: see `row`."""


def row(network: str, timesteps: int | None, top1: float, cost: Cost) -> Row:
    """
    Args:
        network: "teacher", "hybrid/<tap>" or "student".
        timesteps: T; None for the teacher.
        top1: in percent.
    """
    return {"network": network, "timesteps": timesteps, "top1": top1, **cost.figures()}


def counted(accelerator: Accelerator, count: Callable[[], list[Row]]) -> list[Row]:
    """The rows that `count` makes; none, and a warning, where it fails: what was trained is not lost by it."""
    try:
        return Agreement(accelerator).together(count)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        log.warning("warning: energies could not be counted (%s): they are left out", reason)
        return []


def student_rows(
    accelerator: Accelerator, loader: DataLoader, student: SpikingNetwork, top1: Mapping[int, float]
) -> list[Row]:
    """The rows of a network that learned alone.

    Args:
        loader: of the images to count on, prepared.
        student: in evaluation mode.
        top1: in percent, by T.
    """
    rows = []
    for steps, value in top1.items():
        with at_timesteps(student, steps):
            rows.append(row(STUDENT, steps, value, spiking_costs(accelerator, loader, student).whole))
    return rows


def stage_rows(
    accelerator: Accelerator,
    loader: DataLoader,
    distiller: HybridDistiller,
    stage: Stage,
    teacher: AnalogueCosts,
    figures: Mapping[int, Mapping[str, float]],
) -> list[Row]:
    """The rows of the hybrids that a stage has trained, and of the student where it has; one pass for each T.

    Args:
        loader: of the images to count on, prepared.
        distiller: in evaluation mode.
        teacher: its costs, cut at the taps (`teacher_costs`).
        figures: the accuracies of the stage's evaluation (`evaluation.by_name`), by T.
    """
    student, names = distiller.student, distiller.student_taps
    parts = {tap.name: (tap, adapter) for tap, adapter in zip(distiller.taps, distiller.adapters, strict=True)}
    until = None if stage.student else names[stage.taps[0]]
    cuts = [names[tap] for tap in stage.taps] if stage.student else []
    rows = []
    for steps, found in figures.items():
        with at_timesteps(student, steps):
            spiking = spiking_costs(accelerator, loader, student, until, cuts)
        for name in stage.taps:
            tap, adapter = parts[name]
            front = spiking.up_to[names[name]] if stage.student else spiking.whole
            cost = hybrid_cost(tap, front, adapter_cost(adapter, tap), teacher)  # type: ignore[arg-type]
            rows.append(row(f"hybrid/{name}", steps, found[f"hybrid_top1/{name}"], cost))
        if stage.student:
            rows.append(row(STUDENT, steps, found["student_top1"], spiking.whole))
    return rows


class RowsOfStages:
    """The rows of the stages that have ended, kept beside their checkpoints where further stages follow.

    A progressive run goes on with the blocks of a hybrid whose own training has ended: its row is what it was then, as
    is the hybrid that was saved. Only the main process of a resumed run knows the rows of the stages before.

    Args:
        session: of the run; every process makes this, because the run's folder is opened here.
        kept: whether several stages follow one another.
    """

    def __init__(self, session: Session, kept: bool) -> None:
        folder = session.folder  # all processes open it, also those that write nothing here
        writes = kept and session.accelerator.is_main_process
        self._path = folder.checkpoints / "frontier.json" if writes else None
        self.all: list[Row] = []
        if self._path is not None and self._path.exists():
            self.all = json.loads(self._path.read_text())

    def add(self, rows: Sequence[Row]) -> None:
        """Further rows, or the same anew."""
        known = {(r["network"], r["timesteps"]): r for r in [*self.all, *rows]}
        self.all = list(known.values())
        if self._path is not None:
            replace_text(self._path, json.dumps(self.all, indent=2) + "\n")


def teacher_costs(distiller: HybridDistiller, images: Tensor) -> AnalogueCosts:
    """Of one image.

    Args:
        images: (B, C, H, W), as the teacher sees them; one is enough.
    """
    return analogue_costs(distiller.teacher, images[:1], [tap.name for tap in distiller.taps])


def in_order(rows: Sequence[Row], taps: Sequence[str]) -> list[Row]:
    """Teacher, hybrids in the order of their taps, student; each by T."""
    names = [TEACHER, *[f"hybrid/{tap}" for tap in taps], STUDENT]
    return sorted(rows, key=lambda r: (names.index(r["network"]), r["timesteps"] or 0))
