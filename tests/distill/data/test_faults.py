import logging
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from distill import cli
from distill.data import DataConfig, Preprocessing, Splits, eval_loader, load_data, train_loader
from distill.data.faults import LoaderProcessDied, loader_errors_explained

PRE = Preprocessing(input_size=(3, 4, 4), mean=(0.0,) * 3, std=(1 / 255,) * 3)
BROKEN = {1: b"no image", 2: None, 11: b""}  # the second is cut off in the middle


@pytest.fixture
def root(tmp_path):
    """train/ with classes a, b of six images each, of value 10 x index, and val/ with one good and one broken each."""
    for split, count in (("train", 6), ("val", 2)):
        for i in range(2 * count):
            path = tmp_path / split / "ab"[i // count] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4, 3), 10 * i, dtype=np.uint8)).save(path)
            if split == "train" and i in BROKEN:
                whole = path.read_bytes()
                path.write_bytes(whole[:50] if BROKEN[i] is None else BROKEN[i])
            if split == "val" and i % 2:
                path.write_bytes(path.read_bytes()[:50])
    return tmp_path


def load(root, **fields) -> Splits:
    return load_data(DataConfig(name="folder", root=str(root), on_corrupt="skip", **fields), PRE)


def names(skipped) -> list[str]:
    return [os.path.basename(name) for name in skipped]


def values(batches) -> list[tuple[int, int]]:
    """Value and label of each image."""
    return [
        (round(float(image.mean())), int(y))
        for images, labels in batches
        for image, y in zip(images, labels, strict=True)
    ]


def test_in_memory_broken_images_are_dropped_with_their_labels(root, caplog):
    with caplog.at_level(logging.WARNING):
        splits = load(root, in_memory=True)
    assert names(splits.train.skipped) == ["01.png", "02.png", "11.png"]
    assert names(splits.eval.skipped) == ["01.png", "03.png"]
    assert splits.train.labels.tolist() == [0] * 4 + [1] * 5
    found = values([(torch.stack([splits.train[i][0] for i in range(9)]), splits.train.labels)])
    assert found == [(10 * i, i // 6) for i in (0, 3, 4, 5, 6, 7, 8, 9, 10)]
    said = [record.message for record in caplog.records if "is left out" in record.message]
    assert len(said) == 5 and "b/11.png" in said[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_gives_its_place_to_the_next_that_can_be_read(root, workers):
    splits = load(root, in_memory=False)
    assert splits.train.skipped == ()  # nothing was read yet
    batches = list(eval_loader(splits.train, 4, workers=workers))
    stands = {1: 3, 2: 3, 11: 0}  # after the last comes the first
    assert values(batches) == [(10 * stands.get(i, i), stands.get(i, i) // 6) for i in range(12)]
    assert names(splits.train.skipped) == ["01.png", "02.png", "11.png"]  # also when other processes found them
    loaders = [train_loader(load(root, in_memory=False).train, 4, seed=0, workers=w) for w in (0, workers)]
    assert values(loaders[0]) == values(loaders[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_item_has_the_name_of_the_image_that_was_read_in_its_place(root, workers):
    train = load(root, in_memory=False).train
    assert names(train.names_of([1, 0])) == ["01.png", "00.png"]
    list(eval_loader(train, 4, workers=workers))
    assert names(train.names_of(range(12))) == [f"{ {1: 3, 2: 3, 11: 0}.get(i, i):02}.png" for i in range(12)]


def test_images_in_memory_keep_their_names(root):
    train = load(root, in_memory=True).train
    assert names(train.names_of(range(9))) == [f"{i:02}.png" for i in (0, 3, 4, 5, 6, 7, 8, 9, 10)]
    assert load_data(DataConfig(name="synthetic"), PRE).train.names_of([0]) == []


def test_single_items_and_augmented_ones_are_replaced_too(root):
    plain = load(root, in_memory=False).train
    assert (round(float(plain[2][0].mean())), plain[2][1]) == (30, 0)
    train = load(root, in_memory=False, random_resized_crop=True).train
    assert {int(train[(1, 11)][0].mean().round()), train[(1, 11)][1]} == {0}
    assert names(train.skipped) == ["11.png"]


def test_each_broken_image_is_said_once(root, caplog):
    train = load(root, in_memory=False).train
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            list(eval_loader(train, 4, workers=0))
    assert sum("01.png" in record.message for record in caplog.records) == 1
    assert len(caplog.records) == 3


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_broken_image_that_is_held_out_counts_as_nothing(root, in_memory):
    evaluation = load(root, in_memory=in_memory).eval
    assert values(eval_loader(evaluation, 4, workers=0)) == [(0, 0), (20, 1)]
    assert names(evaluation.skipped) == ["01.png", "03.png"]


def test_without_a_single_readable_image_there_is_nothing_to_do(root):
    for file in (root / "train").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 12 images can be read"):
        load(root, in_memory=True)
    with pytest.raises(ValueError, match="none of the 12 images can be read"):
        load(root, in_memory=False).train[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_by_default_a_broken_image_is_an_error_that_names_it(root, workers):
    train = load_data(DataConfig(name="folder", root=str(root), in_memory=False), PRE).train
    with pytest.raises(ValueError, match=r"cannot read the image .*a/01\.png: not in a format that Pillow knows"):
        list(eval_loader(train, 2, workers=workers))
    assert train.skipped == ()


def test_a_killed_loader_process_gives_one_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # waited for at the end
    dataset = load_data(DataConfig(name="synthetic"), PRE).train
    expected = r"died( \(pid \d+\))?, .*out of memory.*fewer data.workers"
    with pytest.raises(LoaderProcessDied, match=expected), loader_errors_explained():
        batches = iter(train_loader(dataset, 8, seed=0, workers=1))
        next(batches)
        os.kill(batches._workers[0].pid, signal.SIGKILL)
        time.sleep(60)  # the signal of its death ends this: torch raises wherever the main process is
    batches._shutdown_workers()


def test_a_batch_that_a_dead_process_had_promised_is_its_death_too():
    def _try_get_data():  # the name of torch's function that fetches a batch
        raise ConnectionResetError(104, "Connection reset by peer")

    with (
        pytest.raises(LoaderProcessDied, match=r"died, most likely.*torch says: .*reset by peer"),
        loader_errors_explained(),
    ):
        _try_get_data()
    with pytest.raises(ConnectionResetError), loader_errors_explained():
        raise ConnectionResetError("of anything else")


def test_a_script_ends_with_one_line_when_a_loader_process_dies(capsys):
    def main():
        raise RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: a process that loads images died (pid 12), most likely because" in line and "data.workers" in line


def test_a_script_ends_with_one_line_for_an_image_that_another_process_cannot_read(root, capsys):
    def main():
        list(
            eval_loader(load_data(DataConfig(name="folder", root=str(root), in_memory=False), PRE).train, 2, workers=1)
        )

    with pytest.raises(SystemExit):
        cli.run(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("a/01.png: not in a format that Pillow knows") and "error: cannot read the image" in line


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), loader_errors_explained():
        raise RuntimeError("shapes differ")
