import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState
from PIL import Image

from distill.data import (
    DataConfig,
    ImageSet,
    Preprocessing,
    eval_loader,
    load_data,
    prepare_loader,
    sample_indices,
    skip_batches,
    skipped_images,
    train_loader,
)
from distill.data.transforms import CropFlipTransform

ROOT = Path(__file__).parents[3]
COUNT = 22
PRE = Preprocessing(input_size=(3, 6, 6), mean=(0.5,) * 3, std=(0.25,) * 3)


class Recorded:
    """Noise images that remember which of them were read."""

    def __init__(self):
        self.images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (COUNT, 3, 6, 6), dtype=np.uint8))
        self.read: list[int] = []

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> torch.Tensor:
        self.read.append(index)
        return self.images[index]


def image_set() -> ImageSet:
    """The label of an image is its index, so a batch tells which samples it holds."""
    return ImageSet(Recorded(), np.arange(COUNT), CropFlipTransform(PRE, 3, 0.5), 0, False)


def same(left: list, right: list) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for pair in zip(left, right, strict=True) for a, b in zip(*pair, strict=True)
    )


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_left_of_an_epoch_equals_that_of_an_uninterrupted_pass(accelerator, processes, workers):
    for process in range(processes):
        loader = prepare_data_loader(
            train_loader(image_set(), 2, seed=0, workers=workers), num_processes=processes, process_index=process
        )
        loader.set_epoch(1)
        whole, next_epoch = list(loader), list(loader)
        for skipped in (0, 2, len(loader)):
            loader.set_epoch(1)
            rest = skip_batches(loader, skipped)
            assert len(rest) == len(whole) - skipped
            assert same(list(rest), whole[skipped:])
            loader.set_epoch(2)
            assert same(list(loader), next_epoch)  # what was skipped is skipped once


def test_skipped_images_are_not_read():
    dataset = image_set()
    loader = train_loader(dataset, 4, seed=0, workers=0)
    rest = [int(label) for _, labels in skip_batches(loader, 3) for label in labels]
    assert dataset._images.read == rest
    assert len(rest) == 8


@pytest.mark.parametrize("skipped", [-1, 6])
def test_more_batches_than_there_are_cannot_be_skipped(skipped):
    with pytest.raises(ValueError, match=rf"skipped is {skipped}; the 5 batches of a pass allow 0 to 5"):
        skip_batches(train_loader(image_set(), 4, seed=0, workers=0), skipped)


@pytest.mark.parametrize("make", [train_loader, eval_loader])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_images_of_a_batch_are_known_without_reading_it(accelerator, make, processes):
    options = {"seed": 0} if make is train_loader else {}
    for process in range(processes):
        loader = prepare_data_loader(
            make(image_set(), 5, workers=0, **options), num_processes=processes, process_index=process
        )
        loader.set_epoch(2)
        for batch, (_, labels) in enumerate(loader):
            assert sample_indices(loader, 2, batch, process, processes) == labels.tolist()


def check_in_every_process(folder: Path) -> None:
    """Run by torchrun: writes the remaining batches of this process, and those of the pass that was not interrupted."""
    accelerator = Accelerator(cpu=True)
    loader = prepare_loader(accelerator, train_loader(image_set(), 2, seed=0, workers=1))
    loader.set_epoch(3)
    whole = list(loader)
    loader.set_epoch(3)
    rest = list(skip_batches(loader, 2))
    for index in range(12):
        (folder / "images/train" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            Image.new("RGB", (6, 6)).save(folder / "images/train" / "ab"[index % 2] / f"{index:02}.png")
    if accelerator.is_main_process:
        for broken in ("a/02.png", "b/11.png"):
            (folder / "images/train" / broken).write_bytes(b"")
    accelerator.wait_for_everyone()
    config = DataConfig(
        name="folder", root=str(folder / "images"), eval_split="train", in_memory=False, on_corrupt="skip"
    )
    splits = load_data(config, PRE)
    list(prepare_loader(accelerator, train_loader(splits.train, 6, seed=0, workers=1)))
    skipped = [os.path.basename(name) for name in splits.train.skipped]
    everyone = [os.path.basename(name) for name in skipped_images(accelerator, splits.train)]
    own = sample_indices(train_loader(splits.train, 6, seed=0), 0, 0, accelerator.process_index, 2)
    torch.save(
        {"whole": whole, "rest": rest, "skipped": skipped, "everyone": everyone, "own": own},
        folder / f"{accelerator.process_index}.pt",
    )
    accelerator.end_training()


def test_two_processes_resume_where_they_were(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    found = [torch.load(tmp_path / f"{process}.pt", weights_only=True) for process in range(2)]
    for process in found:
        assert len(process["whole"]) == 5  # 11 batches of two
        assert same(process["rest"], process["whole"][2:])
        assert process["everyone"] == ["02.png", "11.png"]
        # in the order of their paths, a/00, a/02, ..., b/11, these are files 1 and 11
        assert process["skipped"] == [name for i, name in ((1, "02.png"), (11, "11.png")) if i in process["own"]]
    labels = [int(label) for process in found for _, batch in process["whole"] for label in batch]
    assert len(set(labels)) == 20


if __name__ == "__main__":
    check_in_every_process(Path(sys.argv[1]))
