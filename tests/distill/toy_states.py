"""What two processes keep of a training, and what each has of its own: a job of fault_program.py."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from process_program import note, rank
from torch import nn
from toy_runs import start, tiny
from toy_training import Cut, Stopped, config_of, cross_entropy, linear, shuffled

from distill import loop
from distill.backward import Losses, once
from distill.batch_size import batch_that_fits
from distill.loop import fit
from distill.preparation import unwrap
from distill.runs import RunFolder, Saving
from models import create_snn


class Noise(nn.Module):
    """Draws numbers in training, and keeps them: what dropout does."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.drawn.append(torch.rand(()).item())
        return x


def trained(
    folder: Path,
    epochs: int,
    resume: bool = False,
    saving: Saving | None = None,
    losses: Losses = cross_entropy,
    noise: Noise | None = None,
) -> list[list[float]]:
    """A linear network's weights after so many epochs of two steps, those of a checkpoint among them."""
    accelerator = start(tiny(folder)).accelerator
    network = linear()
    if noise is not None:
        network.append(noise)
    if resume:
        nn.init.zeros_(network[1].weight)  # those of the checkpoint count
    folder.mkdir(exist_ok=True)
    result = fit(
        stage="student",
        accelerator=accelerator,
        model=network,
        backward=once(losses),
        loader=shuffled(8 // accelerator.num_processes, 16),
        evaluate=lambda model: {},
        # as many images a step on any number of processes
        config=config_of(epochs=epochs, batch_size=8 // accelerator.num_processes, momentum=0.9, ema=0.5),
        folder=RunFolder(folder, saving),
        resume=resume,
    )
    return unwrap(accelerator, result.model)[1].weight.tolist()


def continued(folder: Path, epochs: int) -> list[list[float]]:
    return trained(folder, epochs, resume=True, saving=Saving(allow_changed=("processes", "batch_size")))


def draws(folder: Path) -> list[list[float]]:
    """Of a run of two epochs; of the same run that was cut in its last step but one, and what it has drawn then."""
    whole, cut, again = Noise(), Noise(), Noise()
    trained(folder / "whole", 2, noise=whole)
    with contextlib.suppress(Stopped):
        trained(folder / "cut", 2, saving=Saving(steps=1), losses=Cut(2), noise=cut)
    trained(folder / "cut", 2, resume=True, noise=again)
    return [whole.drawn, cut.drawn, again.drawn]


def own_disks(folder: Path) -> str:
    """The main process does not see what the other one writes."""
    try:
        trained(folder / f"disk{rank()}", 1)
    except ValueError as error:
        return str(error)
    return ""


def skipped_before(folder: Path) -> list[int]:
    """Steps skipped in a row, as a resumed run knows them."""
    found, resume = [], loop._Fit._resume

    def noted(fit: loop._Fit) -> None:
        resume(fit)
        found.append(fit.progress.skipped_in_a_row)

    loop._Fit._resume = noted
    continued(folder, 2)
    loop._Fit._resume = resume
    return found


def growth(folder: Path) -> dict[str, Any]:
    """What becomes of a loop that grows on the process of rank 1 alone, which holds smaller batches, too."""
    accelerator = start(tiny(folder)).accelerator
    network = create_snn("feedback_convnet", 3, 2, 1, width=8, algorithm="ide").double().train()
    loop = network.get_submodule("loop")
    gains: list[float] = []

    def of_small_device(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if rank() == 1 and len(labels) > 4:
            raise RuntimeError("CUDA out of memory.")
        return cross_entropy(logits, labels)

    def growing(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        gains.append(loop.feedback.linear.weight.norm().item())
        if rank() == 1:
            loop.excess.fill_(1.0 + len(gains))
        return cross_entropy(logits, labels)

    config = config_of(batch_size=8, accumulate=1, lr=1e-12, find_batch_size=True)
    images = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    config = batch_that_fits(accelerator, network, once(of_small_device), images, config, None)
    folder.mkdir(exist_ok=True)
    fit(
        stage="student",
        accelerator=accelerator,
        model=network,
        backward=once(growing),
        loader=shuffled(config.batch_size, 16),
        evaluate=lambda model: {},
        config=replace(config, accumulate=1),  # two steps
        folder=RunFolder(folder),
        resume=False,
    )
    return {"gains": gains, "batch": [config.batch_size, config.accumulate]}


def states(folder: Path) -> None:
    """Of trainings of both processes, and of those in the folders `alone` and `skipping` that one process began."""
    alone = folder.with_name("alone")
    found = {
        "two": trained(folder / "two", 2),
        "of_one": [continued(alone, epochs) for epochs in (2, 3)],  # as it was, and an epoch later
        "skipped": skipped_before(folder.with_name("skipping")),
        "draws": draws(folder),
        "growth": growth(folder / "growth"),
        "own_disks": own_disks(folder),
    }
    note(folder, found)
