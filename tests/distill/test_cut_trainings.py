"""A training that is cut off, or asked to stop, ends where a whole one does."""

import itertools
import os
import signal

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from toy_runs import timeless
from toy_training import Cut, Stopped, config_of, cross_entropy, shuffled, train

from distill.checkpoints import Checkpoints
from distill.interruption import INTERRUPTION, Preempted
from distill.runs import Saving

CUTS = [pytest.param(steps, id=f"after step {steps}") for steps in (1, 2, 3, 4, 5, 7)]


@pytest.mark.parametrize("ema", [None, 0.9], ids=["plain", "averaged"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("steps", CUTS)
def test_a_training_that_was_cut_within_an_epoch_ends_like_a_whole_one(tmp_path, steps, accumulate, ema):
    batch_size = 4 // accumulate  # four steps an epoch, an image is left
    config = config_of(epochs=2, batch_size=batch_size, accumulate=accumulate, momentum=0.9, ema=ema)
    saving = Saving(steps=2)

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).double()

    def noise(model):  # an evaluation that draws numbers
        return {"noise": torch.randn(()).item(), "bias": model[3].bias.sum().item()}

    def run(name, **options):
        loader = shuffled(batch_size, 4 * 4 + 1)
        return train(tmp_path / name, config, network(), evaluate=noise, saving=saving, loader=loader, **options)

    torch.manual_seed(1)
    whole, _ = run("whole")
    torch.manual_seed(1)
    with pytest.raises(Stopped):
        run("cut", losses=Cut(steps * accumulate))
    torch.manual_seed(99)
    resumed, _ = run("cut", resume=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "cut")


@pytest.mark.parametrize("when", ["step", "evaluation", "whole evaluation"])
def test_sigterm_leaves_a_checkpoint_within_the_step(tmp_path, when):
    config = config_of(epochs=2, momentum=0.9)
    whole, _ = train(tmp_path / "whole", config)
    calls = itertools.count(1)

    def losses(logits, labels):
        if when == "step" and next(calls) == 3:  # the first step of the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return cross_entropy(logits, labels)

    def evaluate(model):
        if "evaluation" in when and next(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            if when == "evaluation":  # as `distill.evaluation.top1` does at each batch
                INTERRUPTION.leave_if_asked(Accelerator(cpu=True), "an evaluation")
        return {}

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="75") as raised:
        train(tmp_path / "cut", config, losses=losses, evaluate=evaluate)
    assert raised.value.code == 75 and "checkpoints/student" in raised.value.message
    assert signal.getsignal(signal.SIGTERM) == before
    found = Checkpoints(tmp_path / "cut" / "checkpoints" / "student").newest()
    places = {"step": (1, 1), "evaluation": (0, 2), "whole evaluation": (1, 0)}
    assert (found.epochs, found.batches) == places[when]
    resumed, _ = train(tmp_path / "cut", config, resume=True)
    assert torch.equal(resumed[1].weight, whole[1].weight)
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "cut")


def test_a_request_between_two_trainings_is_not_forgotten(tmp_path):
    with INTERRUPTION.listening():
        train(tmp_path / "first", config_of())
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted, match="75"):
            train(tmp_path / "second", config_of(epochs=3))
    found = Checkpoints(tmp_path / "second" / "checkpoints" / "student").newest()
    assert (found.epochs, found.batches) == (0, 1)
    train(tmp_path / "third", config_of())  # the next run starts without one


def test_a_resumed_training_without_an_epoch_left_keeps_its_checkpoint_when_it_is_stopped(tmp_path):
    train(tmp_path, config_of())
    path = Checkpoints(tmp_path / "checkpoints" / "student").newest().path
    before = (path / "manifest.json").read_text()

    def evaluate(model):
        os.kill(os.getpid(), signal.SIGTERM)
        INTERRUPTION.leave_if_asked(Accelerator(cpu=True), "an evaluation")

    with pytest.raises(Preempted, match="75"):
        train(tmp_path, config_of(), evaluate=evaluate, resume=True)
    assert (path / "manifest.json").read_text() == before


def test_before_an_evaluation_that_may_be_killed_what_was_trained_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.loop.LONG", 0.0)
    config = config_of(epochs=2, momentum=0.9)
    whole, _ = train(tmp_path / "whole", config)
    calls = itertools.count(1)

    def killed(model):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", config, evaluate=killed)
    found = Checkpoints(tmp_path / "cut" / "checkpoints" / "student").newest()
    assert (found.epochs, found.batches) == (1, 2)  # all of the second epoch
    resumed, _ = train(tmp_path / "cut", config, resume=True)
    assert torch.equal(resumed[1].weight, whole[1].weight)
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "cut")
