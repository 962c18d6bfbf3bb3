"""Format torch_export: an ExportedProgram of all T steps, for any number of images."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.export.agreement import check_of, close, dtype_of, exact, in_float64
from distill.export.job import Check, Job
from distill.export.plain import plain_network
from distill.export.sources import spiking_network
from distill.export.unrolled import Unrolled
from models import SpikingNetwork

PROGRAM = "network.pt2"


def export(job: Job) -> Check:
    """Writes network.pt2; the check loads it, in float64 and as it is.

    Raises:
        ValueError: for a network that is not a spiking one up to its logits.
        UnsupportedOperationError: for one that has no plain form.
    """
    network = spiking_network(job)
    _write(job.folder, job, network)
    double = in_float64(network)
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), job, double)
        in_double = exact(job, double, load(Path(folder)))
    return check_of(in_double, close(job, load(job.folder), "torch_export"))


def load(folder: Path) -> nn.Module:
    return torch.export.load(folder / PROGRAM).module()


def _write(folder: Path, job: Job, network: SpikingNetwork) -> None:
    unrolled, example, shapes = unrolled_network(job, network)
    torch.export.save(torch.export.export(unrolled, (example,), dynamic_shapes=shapes), folder / PROGRAM)


def unrolled_network(job: Job, network: SpikingNetwork) -> tuple[nn.Module, Tensor, tuple[Any, ...]]:
    """What torch's exporters take: the module, an example of its input, and which of its axes is free."""
    unrolled = Unrolled(plain_network(network, tuple(job.samples.shape[-3:])), network.timesteps).eval()
    example = job.samples[:, :2] if job.takes_frames else job.samples[:2]
    batch = torch.export.Dim("batch", min=1, max=2**16)
    return unrolled, example.to(dtype_of(network)).clone(), ({1 if job.takes_frames else 0: batch},)
