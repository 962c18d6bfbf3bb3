"""The fields of a schedule (`distill.schedules`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distill.checks import check


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the student's blocks take the place of the teacher's."""

    name: Literal["joint", "progressive", "stochastic"] = "joint"
    """joint: all hybrids and the student in every step (Yang et al., CVPR 2025); progressive: stage i trains the
    hybrid up to tap i and runs nothing of the student behind it, the last stage is the whole student; stochastic: the
    student and one hybrid, drawn for each step, the same on all processes."""
    epochs: list[int] | None = None
    """progressive: epochs of each stage, one for each tap and one for the whole student; None: equal shares of
    train.epochs, the last stage takes what is left over."""
    restart_lr: bool = True
    """progressive: each stage has warm-up and cosine of its own; false: one for all stages together."""
    freeze: bool = False
    """progressive: the blocks of earlier stages stay as they are."""

    def __post_init__(self) -> None:
        if self.name != "progressive":
            allowed = f"none with {self.name}: only progressive has stages"
            check(self.epochs is None, "epochs", self.epochs, allowed)
            check(not self.freeze, "freeze", self.freeze, f"false with {self.name}: only progressive has stages")
            check(self.restart_lr, "restart_lr", self.restart_lr, f"true with {self.name}, which has one stage")
        if self.epochs is not None:
            check(min(self.epochs, default=0) >= 1, "epochs", self.epochs, "at least 1 for each stage")
