"""A program: what two processes (gloo) keep of a training, and what each has of its own; for test_state_processes.py.

    python state_program.py FOLDER

FOLDER/alone is a run of one process. FOLDER/JOB.RANK.txt is what a process of a job printed, FOLDER/JOB.RANK.json what
it noted, FOLDER/JOB.json the job's exit statuses.
"""

import sys
from pathlib import Path

import torch
from process_program import forked, note, rank
from test_loop import config_of, cross_entropy, linear, shuffled
from torch import nn
from toy_runs import start, tiny

from distill.backward import once
from distill.loop import fit
from distill.preparation import unwrap
from distill.runs import RunFolder, Saving


def trained(folder: Path, epochs: int, resume: bool = False, saving: Saving | None = None) -> list[list[float]]:
    """A linear network's weights after so many epochs of two steps, those of a checkpoint among them."""
    accelerator = start(tiny(folder)).accelerator
    network = linear()
    if resume:
        nn.init.zeros_(network[1].weight)  # those of the checkpoint count
    folder.mkdir(exist_ok=True)
    result = fit(
        stage="student",
        accelerator=accelerator,
        model=network,
        backward=once(cross_entropy),
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


def two(folder: Path) -> None:
    note(folder, trained(folder, 2))


def of_one(folder: Path) -> None:
    """The run of one process: as it was, and for an epoch more."""
    alone = folder.with_name("alone")
    note(folder, [continued(alone, epochs) for epochs in (2, 3)])


def own_disks(folder: Path) -> None:
    """The main process does not see what the other one writes."""
    try:
        trained(folder / str(rank()), 1)
    except ValueError as error:
        note(folder, str(error))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    forked(folder, "two", 2, two)
    forked(folder, "of_one", 2, of_one)
    forked(folder, "own_disks", 2, own_disks)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
