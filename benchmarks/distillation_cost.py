"""The training steps that `benchmarks/distillation_step.py` compares, and what is counted of each, not timed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import models
from benchmarks.measure import saved_bytes
from distill import HybridDistiller, LossConfig, distillation_losses
from distill.losses import cross_entropy
from distill.schedules import drawn_tap
from models.compiling import uncompiled

TAPS = ("layer1", "layer2", "layer3")
VARIANTS = ("standalone", "logit KD", "joint", "stochastic")
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp64": None}


class Variant:
    """One kind of training step, with a network and an optimizer of its own, on fixed images and labels.

    Args:
        name: one of `VARIANTS`.
        teacher: shared by all; each has its own spiking twin of it.
        images, labels: (B, 3, H, W) and (B,).
    """

    def __init__(
        self, name: str, teacher: nn.Module, images: Tensor, labels: Tensor, timesteps: int, precision: str
    ) -> None:
        self.name, self.teacher, self.images, self.labels = name, teacher, images, labels
        self.autocast = AUTOCAST[precision]
        twin = models.spiking_twin(teacher, timesteps, input_size=tuple(images.shape[1:]))
        taps = list(TAPS) if name in ("joint", "stochastic") else []
        # taps are checked on two different images
        probes = images[:2] if len(images) > 1 else torch.cat([images, images.flip(3)])
        network = twin if name == "standalone" else HybridDistiller(teacher, twin, taps, images=probes)
        self.network = network.to(memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9)
        self.draws = [(tap,) for tap in TAPS] if name == "stochastic" else [tuple(taps)]
        """The sets of taps that a step may have."""

    def loss(self, active: Sequence[str]) -> Tensor:
        enabled, device = self.autocast is not None, self.images.device.type
        with torch.autocast(device, dtype=self.autocast, enabled=enabled):
            out = self.network(self.images) if self.name == "standalone" else self.network(self.images, active=active)
        if self.name == "standalone":
            return cross_entropy(out.float(), self.labels)
        return distillation_losses(out, self.labels, LossConfig())["total"]

    def step(self, number: int) -> float:
        """zero_grad, forward, loss, backward and SGD; in seconds."""
        active = (drawn_tap(0, number, TAPS),) if self.name == "stochastic" else self.draws[0]
        started = self._clock()
        self.optimizer.zero_grad()
        self.loss(active).backward()
        self.optimizer.step()
        return self._clock() - started

    def _clock(self) -> float:
        if self.images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def macs(run: Callable[[], object]) -> int:
    """Multiply-accumulates of the convolutions and matrix products that a function runs, forward and backward."""
    with FlopCounterMode(display=False) as counter, uncompiled():
        run()
    return counter.get_total_flops() // 2


def equivalents(variant: Variant) -> list[float]:
    """Cost of a step in forward passes of the analogue network, for each set of taps that it may have."""
    with torch.no_grad():
        unit = macs(lambda: variant.teacher(variant.images))
    found = [macs(lambda active=active: variant.loss(active).backward()) / unit for active in variant.draws]
    variant.optimizer.zero_grad()
    return found


@dataclass(frozen=True)
class TeacherGraph:
    """What a step's forward pass keeps of the teacher for the backward pass, its parameters left out.

    Args:
        front: bytes saved in front of the first active tap, where nothing needs a gradient.
        front_modules: modules there whose output has a graph.
        behind: bytes saved behind it.
    """

    front: int
    front_modules: tuple[str, ...]
    behind: int


def teacher_graph(variant: Variant, active: Sequence[str]) -> TeacherGraph:
    """Looks at every pass of the teacher in one forward pass of the step."""
    teacher, part = variant.teacher, ""
    counters: dict[str, list[Callable[[], int]]] = {"front": [], "behind": []}
    grown: list[str] = []
    handles = []
    with contextlib.ExitStack() as counting:

        def enter(name: str) -> None:
            nonlocal part
            counting.close()
            part = name
            if name:
                counters[name].append(counting.enter_context(saved_bytes(teacher)))

        def note(name: str) -> Callable:
            return lambda module, args, out: grown.append(name) if part == "front" and out.requires_grad else None

        handles += [m.register_forward_hook(note(name)) for name, m in teacher.named_modules() if name]
        handles.append(teacher.register_forward_pre_hook(lambda *_: enter("front")))
        if active:  # the distiller's own hook, which injects the rows, comes behind this one
            handles.append(teacher.get_submodule(active[0]).register_forward_hook(lambda *_: enter("behind")))
        handles.append(teacher.register_forward_hook(lambda *_: enter("")))
        loss = variant.loss(active)
    found = {name: sum(count() for count in counts) for name, counts in counters.items()}
    del loss  # what it keeps is counted while it is there
    for handle in handles:
        handle.remove()
    return TeacherGraph(found["front"], tuple(dict.fromkeys(grown)), found["behind"])


def saved_by(variant: Variant, active: Sequence[str]) -> int:
    """Bytes that the graph of one forward pass keeps for the backward pass, without parameters."""
    with saved_bytes(nn.ModuleList([variant.network, variant.teacher])) as count:
        loss = variant.loss(active)
    found = count()
    del loss
    return found
