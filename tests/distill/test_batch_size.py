"""A batch that fits is found without a trace; a device that is too small is played by a backward pass that refuses."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from toy_runs import distil, equal, forget_accelerate, timeless, tiny, weights_of

from distill import TrainConfig
from distill.backward import once
from distill.batch_size import batch_that_fits
from distill.checkpoints import Checkpoints

WANTED = TrainConfig(batch_size=64, accumulate=2, find_batch_size=True)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).train()


def small_device(most, seen, text="CUDA out of memory. Tried to allocate"):
    """The backward pass of a device that holds so many images."""

    def losses(logits, labels):
        seen.append(len(labels))
        if len(labels) > most:
            raise RuntimeError(text)
        return {"total": logits.square().mean()}

    return once(losses)


def find(most, config=WANTED, images=None, checkpoints=None, text="CUDA out of memory."):
    forget_accelerate()
    model, seen = network(), []
    images = torch.randn(3, 1, 2, 2) if images is None else images
    found = batch_that_fits(Accelerator(cpu=True), model, small_device(most, seen, text), images, config, checkpoints)
    return found, model, seen


@pytest.mark.parametrize(("most", "batch", "accumulate"), [(100, 64, 2), (63, 32, 4), (10, 8, 16), (2, 2, 64)])
def test_batches_are_halved_and_steps_keep_their_images(most, batch, accumulate):
    found, _, seen = find(most)
    assert (found.batch_size, found.accumulate) == (batch, accumulate)
    assert seen == [n for n in (64, 32, 16, 8, 4, 2) if n >= batch]
    assert dataclasses.replace(found, batch_size=64, accumulate=2) == WANTED


@pytest.mark.parametrize("text", ["CUDA out of memory.", "DefaultCPUAllocator: can't allocate memory"])
def test_it_leaves_nothing_behind(text):
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    images = torch.ones(3, 1, 2, 2)
    _, model, _ = find(10, images=images, text=text)
    torch.manual_seed(7)
    find(10, images=images, text=text)
    fresh = network()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True))
    torch.manual_seed(7)
    batch_that_fits(Accelerator(cpu=True), model, small_device(10, []), images, WANTED, None)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("channels_last", [True, False])
def test_it_is_tried_in_the_memory_format_of_the_training(channels_last):
    seen = []

    class Seeing(nn.Conv2d):
        def forward(self, images):
            seen.extend(x.is_contiguous(memory_format=torch.channels_last) for x in (images, self.weight))
            return super().forward(images)

    forget_accelerate()
    model, config = nn.Sequential(Seeing(3, 4, 3), nn.Flatten()), TrainConfig(batch_size=4, find_batch_size=True)
    config = dataclasses.replace(config, channels_last=channels_last)
    batch_that_fits(Accelerator(cpu=True), model, small_device(4, []), torch.randn(3, 3, 5, 5), config, None)
    assert seen == [channels_last] * 2


def test_event_frames_are_counted_along_their_second_axis():
    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, frames):
            assert frames.shape[0] == 5
            return self.linear(frames.mean(0).flatten(1))

    forget_accelerate()
    seen = []
    found = batch_that_fits(
        Accelerator(cpu=True), Frames(), small_device(16, seen), torch.randn(5, 3, 1, 2, 2), WANTED, None
    )
    assert seen == [64, 32, 16] and found.batch_size == 16


@pytest.mark.parametrize(
    ("most", "changes", "last"), [(1, {}, 2), (5, dict(batch_size=15), 15), (5, dict(batch_size=30), 15)]
)
def test_where_nothing_fits_it_says_so(most, changes, last):
    with pytest.raises(RuntimeError, match=f"no batch fits, the last one tried had {last} images"):
        find(most, dataclasses.replace(WANTED, **changes))


def test_another_error_is_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="something else"):
        find(1, text="something else")


def test_a_resumed_run_keeps_its_batch(tmp_path):
    checkpoints = Checkpoints(tmp_path)

    def fail_never(error):
        assert error is None

    checkpoints.save(1, 0, lambda path: None, fail_never, True, dict(batch_size=4, accumulate=32), "unfinished", [])
    found, _, seen = find(100, checkpoints=checkpoints)
    assert (found.batch_size, found.accumulate, seen) == (4, 32, [])


def test_a_resumed_run_takes_a_smaller_batch_that_is_asked_for(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    facts = dict(batch_size=64, accumulate=2)
    checkpoints.save(1, 0, lambda path: None, lambda error: None, True, facts, "unfinished", [])
    smaller = dataclasses.replace(WANTED, batch_size=32)
    assert find(100, smaller, checkpoints=checkpoints)[0] == smaller


def test_every_pass_that_a_step_may_have_is_tried():
    seen = []

    def backward(accelerator, model, images, labels, step):
        seen.append((step, len(labels)))
        if (step, len(labels)) == (5, 64):
            raise RuntimeError("CUDA out of memory.")

    forget_accelerate()
    found = batch_that_fits(Accelerator(cpu=True), network(), backward, torch.zeros(3, 1, 2, 2), WANTED, None, (0, 5))
    assert found.batch_size == 32 and seen == [(0, 64), (5, 64), (0, 32), (5, 32)]


def test_nothing_is_tried_unless_it_is_wanted():
    config = TrainConfig()
    assert find(0, config)[0] is config


def test_a_run_whose_batch_fits_is_the_same_run(tmp_path):
    for name, wanted in (("plain", False), ("found", True)):
        train = dict(epochs=1, batch_size=16, lr=0.05, find_batch_size=wanted)
        distil(tiny(tmp_path / name, train=train, teacher_train=train))
    assert equal(weights_of(tmp_path / "plain"), weights_of(tmp_path / "found"))
    assert timeless(tmp_path / "plain") == timeless(tmp_path / "found")
