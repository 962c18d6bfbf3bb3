"""A program: what two processes (gloo) do about images that one of them cannot read, and what they keep of a training;
for test_fault_processes.py.

    python fault_program.py FOLDER

FOLDER/JOB.RANK.txt is what a process of a job printed, FOLDER/JOB.RANK.json what it noted, FOLDER/JOB.json the job's
exit statuses. The images are in FOLDER/photos, a run of one process is in FOLDER/alone.
"""

import functools
import itertools
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from process_program import forked, note, rank
from torch import nn
from torch.utils.data import DataLoader
from toy_runs import start, tiny
from toy_states import states

from distill import DataConfig, TrainConfig, cli
from distill.backward import once
from distill.data import Preprocessing, load_data, train_loader
from distill.data.files import ImageFile
from distill.frontier import counted, student_rows
from distill.loop import fit
from distill.runs import RunFolder
from models import create_snn
from models.compiling import compilable, compile_kernels

PRE = Preprocessing(input_size=(1, 4, 4), mean=(0.5,), std=(0.25,))
CLASSES = ("10", "2")  # in alphabetical order, of which a warning says that timm has another
BROKEN = ("val/10/1.png", "val/2/0.png")  # the second and the seventh of twelve: one for each of two processes


def make_photos(folder: Path) -> None:
    for split in ("train", "val"):
        for label in CLASSES:
            (folder / split / label).mkdir(parents=True)
            for number in range(6):
                Image.new("L", (4, 4), 10 * number).save(folder / split / label / f"{number}.png")
    for name in BROKEN:
        (folder / name).write_bytes(b"")


def data_of(folder: Path, **fields) -> DataConfig:
    return DataConfig(name="folder", root=str(folder.parent / "photos"), **fields)


def decoding() -> list[str]:
    """The images that are decoded from now on."""
    decoded: list[str] = []
    undecoded = ImageFile.undecoded

    def noted(file: ImageFile) -> Image.Image:
        decoded.append(str(file))
        return undecoded(file)

    ImageFile.undecoded = noted  # type: ignore[method-assign]
    return decoded


def kernel(values: torch.Tensor) -> torch.Tensor:
    return values + 1


def together(folder: Path) -> None:
    """Both processes leave out what either finds; then a loss that is no number, on the process of rank 1 alone."""
    accelerator = start(tiny(folder)).accelerator
    decoded = decoding()
    splits = load_data(data_of(folder, on_corrupt="skip", in_memory=False), PRE)
    figures = {"decoded": len(decoded), "held_out": len(splits.eval), "skipped": splits.eval.skipped}

    def fails(*_, **__):
        raise RuntimeError("no compiler here")

    torch.compile = fails
    compile_kernels(True)
    compilable(kernel)(torch.ones(2))

    def losses(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"total": F.cross_entropy(logits, labels) * (math.nan if rank() == 1 else 1.0)}

    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    error = ""
    try:
        fit(
            stage="student",
            accelerator=accelerator,
            model=network,
            backward=once(losses),
            loader=train_loader(splits.train, 3, seed=0, workers=0),
            evaluate=lambda model: {},
            config=TrainConfig(epochs=1, batch_size=3, max_skipped_steps=0),
            folder=RunFolder(folder),
            resume=False,
        )
    except RuntimeError as found:
        error = str(found)
    note(folder, figures | {"error": error})


def energies(folder: Path) -> None:
    """Counting fails on the process of rank 1 alone, in its second batch, and before the first; both count again."""
    accelerator = start(tiny(folder)).accelerator
    snn = create_snn("resnet18_cifar", 3, 2, 1, width=8).eval()
    images = [(torch.full((1, 8, 8), float(i)), 0) for i in range(8)]
    loader = accelerator.prepare(DataLoader(images, 2))
    forward, calls = type(snn).forward, itertools.count()

    def hiccup(network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if next(calls) == 1 and rank() == 1:
            raise ValueError("out of luck")
        return forward(network, batch)

    type(snn).forward = hiccup

    def count(fails: bool) -> list:
        if fails and rank() == 1:
            raise ValueError("no costs of the teacher")
        return student_rows(accelerator, loader, snn, {2: 50.0})

    found = [len(counted(accelerator, functools.partial(count, fails))) for fails in (False, True, False)]
    note(folder, {"rows": found})


def apart(folder: Path) -> None:
    """The process of rank 1 cannot read an image that the other one can."""
    start(tiny(folder))
    undecoded = ImageFile.undecoded

    def hiccup(file: ImageFile) -> Image.Image:
        if rank() == 1 and file.path.endswith("train/2/3.png"):
            raise OSError("stale file handle")
        return undecoded(file)

    ImageFile.undecoded = hiccup  # type: ignore[method-assign]
    try:
        cli.run(lambda: load_data(data_of(folder, on_corrupt="skip", in_memory=True), PRE))
    finally:
        dist.barrier()  # a launcher keeps the count of who has failed; here the process of rank 0 does, and must wait


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    make_photos(folder / "photos")
    forked(folder, "together", 2, together)
    forked(folder, "energies", 2, energies)
    forked(folder, "apart", 2, apart)
    forked(folder, "states", 2, states)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
