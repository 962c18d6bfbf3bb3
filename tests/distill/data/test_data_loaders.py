import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from accelerate.state import AcceleratorState
from PIL import Image
from torch.utils.data import default_collate

from distill.data import DataConfig, ImageSet, Preprocessing, eval_loader, load_data, train_loader
from distill.data.loaders import EpochSampler
from distill.data.transforms import CropFlipTransform, EvalTransform

COUNT = 22
PRE = Preprocessing(input_size=(3, 6, 6), mean=(0.5,) * 3, std=(0.25,) * 3)


def image_set(seed=0, in_memory=True, augment=True) -> ImageSet:
    """22 noise images; the label of an image is its index, so a batch tells which samples it holds."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (COUNT, 3, 6, 6), dtype=np.uint8))
    transform = CropFlipTransform(PRE, 3, 0.5) if augment else EvalTransform(PRE)
    return ImageSet(images, np.arange(COUNT), transform, seed, in_memory)


def epochs(loader, count=2) -> list:
    """The batches of some epochs of a bare loader, in order."""
    batches = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        batches += list(loader)
    return batches


def same(left: list, right: list) -> bool:
    assert len(left) == len(right) > 0
    return all(torch.equal(a, b) for pair in zip(left, right, strict=True) for a, b in zip(*pair, strict=True))


def labels(batches: list) -> list[int]:
    return [int(label) for _, batch in batches for label in batch]


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_sampler_yields_each_image_once_with_its_epoch():
    sampler = EpochSampler(COUNT, seed=0)
    sampler.set_epoch(3)
    pairs = list(sampler)
    assert {epoch for epoch, _ in pairs} == {3}
    assert sorted(index for _, index in pairs) == list(range(COUNT))
    assert [index for _, index in pairs] != list(range(COUNT))
    assert list(sampler) == pairs  # nothing advances by itself
    assert len(sampler) == COUNT


def test_the_order_differs_between_epochs_and_seeds():
    orders = set()
    for seed in range(3):
        for epoch in range(3):
            sampler = EpochSampler(COUNT, seed)
            sampler.set_epoch(epoch)
            orders.add(tuple(index for _, index in sampler))
    assert len(orders) == 9


@pytest.mark.parametrize("augmentation", ["tensors", "timm"])
def test_workers_change_nothing(augmentation, tmp_path):
    dataset = image_set()
    if augmentation == "timm":
        for split in ("train", "val"):
            for i in range(12):
                folder = tmp_path / split / "ab"[i % 2]
                folder.mkdir(parents=True, exist_ok=True)
                Image.effect_noise((9, 9), 50 + i).save(folder / f"{i}.png")
        config = DataConfig(
            name="folder", root=str(tmp_path), in_memory=False, auto_augment="rand-m9-mstd0.5", random_erasing=0.5
        )
        dataset = load_data(config, PRE).train
    alone, helped = (epochs(train_loader(dataset, 4, seed=0, workers=workers)) for workers in (0, 2))
    assert same(alone, helped)
    assert not same(alone[: len(alone) // 2], alone[len(alone) // 2 :])  # the second epoch is another


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_batch_made_at_once_holds_the_items_bit_by_bit(augment, in_memory):
    dataset = image_set(augment=augment)
    if not in_memory:
        dataset._images = list(dataset._images)
    keys = [(epoch, index) for epoch in range(3) for index in (5, 0, 21, 5)]
    images, labels = dataset.collate(dataset.__getitems__(keys))
    assert (images.dtype, labels.dtype, labels.tolist()) == (torch.float32, torch.int64, [5, 0, 21, 5] * 3)
    assert torch.equal(images, torch.stack([dataset[key][0] for key in keys]))
    anyones = default_collate(dataset.__getitems__(keys))  # as of a loader that knows nothing of this
    assert torch.equal(anyones[0], images) and torch.equal(anyones[1], labels)
    stored = torch.stack([*dataset._images])
    assert torch.equal(stored, torch.stack([*image_set()._images]))  # nothing was changed in place
    with pytest.raises(IndexError, match="index is 22"):
        dataset.__getitems__([(0, 0), (0, 22)])


def test_another_seed_gives_other_crops_and_another_order():
    first = epochs(train_loader(image_set(), 4, seed=0, workers=0))
    other_order = epochs(train_loader(image_set(), 4, seed=1, workers=0))
    other_crops = epochs(train_loader(image_set(seed=1), 4, seed=0, workers=0))
    assert labels(first) != labels(other_order)
    assert labels(first) == labels(other_crops)
    assert not same(first, other_crops)


@pytest.mark.parametrize("workers", [0, 2])
def test_accelerate_keeps_the_sampler_and_advances_the_epoch(accelerator, workers):
    expected = epochs(train_loader(image_set(), 4, seed=0, workers=0))
    prepared = accelerator.prepare(train_loader(image_set(), 4, seed=0, workers=workers))
    assert same(expected, list(prepared) + list(prepared))


@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_share_an_epoch_without_overlap(accelerator, workers):
    # 22 images in batches of 2: 11 batches, of which two processes take 5 each
    unsharded = epochs(train_loader(image_set(), 2, seed=0, workers=0), count=2)
    loaders = [
        prepare_data_loader(
            train_loader(image_set(), 2, seed=0, workers=workers), num_processes=2, process_index=process
        )
        for process in range(2)
    ]
    for epoch in range(2):
        shards = [list(loader) for loader in loaders]
        together = [batch for pair in zip(*shards, strict=True) for batch in pair]
        assert same(together, unsharded[11 * epoch : 11 * epoch + 10])
        assert len(set(labels(together))) == 20


@pytest.mark.parametrize("processes", [1, 2])
def test_resuming_within_an_epoch_continues_it(accelerator, processes):
    def prepared(process):
        return prepare_data_loader(
            train_loader(image_set(), 2, seed=0, workers=0), num_processes=processes, process_index=process
        )

    for process in range(processes):
        through = prepared(process)
        list(through)
        second_epoch = list(through)
        resumed = prepared(process)
        resumed.set_epoch(1)
        assert same(list(skip_first_batches(resumed, 2)), second_epoch[2:])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_leaves_the_global_generators_alone(accelerator, workers):
    loaders = [train_loader(image_set(), 4, seed=0, workers=workers), eval_loader(image_set(), 4, workers=workers)]
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for loader in [*loaders, *accelerator.prepare(*loaders)]:
        list(loader)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.get_rng_state().tolist() == before[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generators_do_not_matter(workers):
    results = []
    for seed in (0, 1):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        results.append(epochs(train_loader(image_set(), 4, seed=0, workers=workers)))
    assert same(*results)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_in_order_and_complete(workers):
    batches = list(eval_loader(image_set(augment=False), 4, workers=workers))
    assert [len(batch) for _, batch in batches] == [4, 4, 4, 4, 4, 2]
    assert labels(batches) == list(range(COUNT))
    images, classes = batches[0]
    assert (images.shape, images.dtype, classes.dtype) == ((4, 3, 6, 6), torch.float32, torch.int64)
    assert torch.equal(images[3], image_set(augment=False)[3][0])


def test_training_drops_the_incomplete_batch():
    loader = train_loader(image_set(), 4, seed=0, workers=0)
    assert len(loader) == 5
    assert [len(batch) for _, batch in loader] == [4] * 5


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more than this machine has CPUs
def test_without_a_number_images_in_memory_have_no_workers_and_others_one_a_cpu_up_to_eight(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(3), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert train_loader(image_set(), 4, seed=0, workers=None).num_workers == 0
    assert train_loader(image_set(in_memory=False), 4, seed=0, workers=None).num_workers == 3
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(64), raising=False)
    assert eval_loader(image_set(in_memory=False), 4, workers=None).num_workers == 8
    for processes, expected in (("16", 4), ("100", 1)):  # of a launcher, on this machine
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert eval_loader(image_set(in_memory=False), 4, workers=None).num_workers == expected


def test_a_set_smaller_than_a_batch_and_other_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="batch_size is 23; the 22 training images allow 1 to 22"):
        train_loader(image_set(), 23, seed=0, workers=0)
    with pytest.raises(ValueError, match="batch_size is 0; allowed: integers from 1 up"):
        eval_loader(image_set(), 0, workers=0)
    with pytest.raises(ValueError, match="workers is -1; allowed: integers from 0 up"):
        eval_loader(image_set(), 4, workers=-1)
    with pytest.raises(ValueError, match="seed is -1"):
        train_loader(image_set(), 4, seed=-1, workers=0)
