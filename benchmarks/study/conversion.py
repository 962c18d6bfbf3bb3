"""Rows without training: a teacher converted into a spiking network, in a run folder as the others have it.

    python -m benchmarks.study.conversion --config RECIPE [--help]

Each number of time steps has a conversion of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.calibration import converted, logits_after
from distill import cli, session
from distill.config import DistillConfig
from distill.data import eval_loader, load_data, prepare_loader, sample_loader, skipped_images
from distill.energy import analogue_costs
from distill.evaluation import TEACHER, top1
from distill.frontier import ENERGY_IMAGES, Row, row, student_rows
from distill.report import table, versions
from distill.results import student_results
from distill.students import calibration_batches, make_student, probe_images
from distill.teachers import build_teacher, teacher_preprocessing
from models import SpikingNetwork


@dataclass(frozen=True, kw_only=True)
class ConversionConfig(DistillConfig):
    """Converts a teacher into a spiking network; nothing is trained, and what the fields say of training is unused."""

    converter: Literal["calibrate", "spikingjelly"] = "calibrate"
    """calibrate: a twin that starts as student.init says; spikingjelly: SpikingJelly's converter, whose neurons are
    integrate-and-fire with thresholds at percentile 99.9 of the activations."""


@dataclass(frozen=True)
class _Job:
    """What both converters work with."""

    config: ConversionConfig
    accelerator: Accelerator
    data: Any
    preprocessing: Any
    teacher: nn.Module
    images: Tensor
    """(B, C, H, W), a few."""
    loader: DataLoader
    """Of the evaluation images, prepared."""
    sample: DataLoader
    """Of those that spikes are counted on."""

    @property
    def timesteps(self) -> list[int]:
        own = self.config.student.timesteps
        return sorted({own, *self.config.eval_timesteps})

    def calibration_images(self) -> Iterator[Tensor]:
        count = self.config.init.calibration_images
        yield from calibration_batches(self.data, count, self.config.run.seed, self.accelerator.device)


def run(config: ConversionConfig, started: session.Session) -> dict[str, Any]:
    """Converts, evaluates, and writes summary.json; returns it."""
    began = time.perf_counter()
    accelerator, workers, batch = started.accelerator, config.data.workers, config.train.batch_size
    preprocessing = teacher_preprocessing(config.teacher)
    data = load_data(config.data, preprocessing, config.run.seed, config.student.timesteps)
    teacher = build_teacher(config.teacher, len(data.classes)).to(accelerator.device).eval()
    images = probe_images(data, accelerator.device)
    job = _Job(
        config,
        accelerator,
        data,
        preprocessing,
        teacher,
        images,
        prepare_loader(accelerator, eval_loader(data.eval, batch, workers=workers)),
        prepare_loader(accelerator, sample_loader(data.eval, ENERGY_IMAGES, batch)),
    )
    with torch.no_grad():
        reference = top1(accelerator, job.loader, lambda images: {TEACHER: teacher(images)})[TEACHER]
        first = row("teacher", None, reference, analogue_costs(teacher, images[:1]).whole)
        summary = (_calibrated if config.converter == "calibrate" else _spikingjelly)(job, first)
    summary |= {
        "teacher_top1": reference,
        "skipped_images": list(skipped_images(accelerator, data.train, data.eval)),
        "seconds": time.perf_counter() - began,
    }
    started.folder.write_summary(summary)
    print(table(summary))
    return summary


def _calibrated(job: _Job, teacher: Row) -> dict[str, Any]:
    own = job.config.student.timesteps
    found: dict[int, float] = {}
    agreement: dict[int, float] = {}
    rows: list[Row] = [teacher]
    seconds = {}
    twins: dict[int, SpikingNetwork] = {}
    for steps in job.timesteps:
        began = time.perf_counter()
        twin = _twin(job, steps)
        seconds[steps] = time.perf_counter() - began
        figures = top1(
            job.accelerator,
            job.loader,
            lambda images, twin=twin: {"student_top1": twin(images), TEACHER: job.teacher(images)},
        )
        found[steps], agreement[steps] = figures["student_top1"], figures["student_agreement"]
        rows += student_rows(job.accelerator, job.sample, twin, {steps: found[steps]})
        twins = {own: twin} if steps == own else twins
    results = student_results(job.accelerator, job.loader, twins[own], found, rows, seconds[own], images=0)
    return {**results, "student_agreement": agreement[own]}


def _twin(job: _Job, steps: int) -> SpikingNetwork:
    student = replace(job.config.student, timesteps=steps)
    return make_student(
        student,
        job.teacher,
        len(job.data.classes),
        job.images,
        job.preprocessing,
        job.config.init,
        job.calibration_images(),
        say=False,
    ).eval()


def _spikingjelly(job: _Job, teacher: Row) -> dict[str, Any]:
    """Its network counts the steps itself: one pass gives the logits after all of them. Energies are not estimated."""
    own, steps = job.config.student.timesteps, job.timesteps
    began = time.perf_counter()
    network = converted(job.teacher, job.calibration_images())
    seconds = time.perf_counter() - began
    found = top1(
        job.accelerator,
        job.loader,
        lambda images: {str(step): logits for step, logits in logits_after(network, images, steps).items()},
    )
    with _spikes(network) as rates:
        for images, _ in job.sample:
            logits_after(network, images, [own])
    each = {name: sum(values) / len(values) for name, values in rates.items()}
    return {
        "student_top1": found[str(own)],
        "student_top1_by_timesteps": {step: found[str(step)] for step in steps},
        "timesteps": own,
        "algorithm": "SpikingJelly's converter",
        "mean_firing_rate": sum(each.values()) / len(each),
        "firing_rates": each,
        "frontier": [teacher],
        "energy_assumptions": [],
        "train_seconds": seconds,
        "images_per_second": 0.0,
        "versions": versions(),
    }


@contextmanager
def _spikes(network: nn.Module) -> Iterator[dict[str, list[float]]]:
    """Collects the shares of neurons that fire, of each layer in each step."""
    from spikingjelly.activation_based.neuron import BaseNode

    rates: dict[str, list[float]] = {}

    def note(name: str):
        return lambda module, args, out: rates.setdefault(name, []).append((out != 0).float().mean().item())

    nodes = [(name, module) for name, module in network.named_modules() if isinstance(module, BaseNode)]
    handles = [module.register_forward_hook(note(name)) for name, module in nodes]
    try:
        yield rates
    finally:
        for handle in handles:
            handle.remove()


def main() -> None:
    config, resume, text, allow_changed = cli.parse(ConversionConfig, None)
    run(config, session.start(config.run, resume, text, allow_changed))


if __name__ == "__main__":
    cli.run(main)
