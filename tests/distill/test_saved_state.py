"""What a checkpoint keeps, and what a training that goes on from it may change."""

import errno
import itertools
import json
import logging
import math
import os

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from toy_runs import metrics_of, rewrite_manifest, timeless
from toy_training import Cut, Stopped, config_of, cross_entropy, train

from distill.checkpoints import Checkpoints
from distill.runs import RunFolder, Saving


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    scores = iter([10.0, 30.0, 20.0, 30.0, 5.0, 7.0])
    train(tmp_path, config_of(epochs=6), evaluate=lambda model: {"top1": next(scores)}, score="top1")
    names = {path.name for path in (tmp_path / "checkpoints" / "student").iterdir()}
    assert names == {"epoch_0004", "epoch_0005", "epoch_0006"}


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path, optimizer):
    config = config_of(epochs=4, optimizer=optimizer, momentum=0.9, warmup_steps=3, accumulate=2, batch_size=2)
    whole, _ = train(tmp_path / "whole", config)

    class Stop(Exception):
        pass

    calls = itertools.count(1)

    def stop(model):
        if next(calls) == 3:
            raise Stop
        return {}

    with pytest.raises(Stop):
        train(tmp_path / "cut", config, evaluate=stop)
    other = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()  # other weights: those of the checkpoint count
    resumed, _ = train(tmp_path / "cut", config, model=other, resume=True)
    assert torch.equal(resumed[1].weight, whole[1].weight) and torch.equal(resumed[1].bias, whole[1].bias)
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "cut") and len(metrics_of(tmp_path / "cut")) == 4


def test_resuming_a_finished_training_trains_no_more(tmp_path, learning_rates):
    config = config_of(epochs=2)
    whole, first = train(tmp_path, config)
    learning_rates.clear()
    again, result = train(tmp_path, config, resume=True)
    assert learning_rates == [] and torch.equal(again[1].weight, whole[1].weight)
    assert result.evaluation == first.evaluation and result.seconds == pytest.approx(first.seconds)
    assert len(metrics_of(tmp_path)) == 2


def test_resuming_where_nothing_was_saved_starts_at_the_first_epoch(tmp_path, learning_rates):
    train(tmp_path, config_of(epochs=2), resume=True)
    assert len(learning_rates) == 4 and len(metrics_of(tmp_path)) == 2


def test_metrics_that_cannot_be_written_end_the_run_with_the_last_good_checkpoint(tmp_path, monkeypatch):
    real, calls = RunFolder.append_metrics, itertools.count(1)

    def append(self, values):
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, values)

    monkeypatch.setattr(RunFolder, "append_metrics", append)
    with pytest.raises(OSError, match=r"metrics could not be written.*No space left.*last good .*epoch_0001; continue"):
        train(tmp_path, config_of(epochs=3))


def test_a_full_disk_is_said_and_the_training_goes_on(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    real, calls = Accelerator.save_state, itertools.count(1)

    def save_state(self, path):
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, path)

    monkeypatch.setattr(Accelerator, "save_state", save_state)
    train(tmp_path, config_of(epochs=3))
    assert len(metrics_of(tmp_path)) == 3
    names = {path.name for path in (tmp_path / "checkpoints" / "student").iterdir()}
    assert names == {"epoch_0001", "epoch_0003"}
    assert "no checkpoint could be written (OSError: [Errno 28] No space left" in caplog.text
    assert f"the last good checkpoint is {tmp_path / 'checkpoints' / 'student' / 'epoch_0001'}" in caplog.text


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path, caplog):
    config = config_of(epochs=3, momentum=0.9)
    whole, _ = train(tmp_path / "whole", config)
    train(tmp_path / "cut", config, stop_after=3)
    newest = Checkpoints(tmp_path / "cut" / "checkpoints" / "student").newest()
    assert newest.epochs == 2
    os.truncate(newest.path / "optimizer.bin", 10)
    resumed, _ = train(tmp_path / "cut", config, resume=True)
    assert "optimizer.bin has another checksum" in caplog.text
    assert torch.equal(resumed[1].weight, whole[1].weight)
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "cut")


def test_a_checkpoint_of_two_processes_is_refused_unless_it_is_allowed(tmp_path):
    config = config_of(epochs=3)
    train(tmp_path, config, stop_after=2)
    rewrite_manifest(Checkpoints(tmp_path / "checkpoints" / "student").newest().path, processes=2)
    with pytest.raises(ValueError, match=r"is of 2 process\(es\), now there are 1"):
        train(tmp_path, config, resume=True)
    train(tmp_path, config, resume=True, saving=Saving(allow_changed=("processes",)))
    assert [line["epoch"] for line in metrics_of(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("name", ["progress_0.json", "random_states_0.pkl"])
def test_within_an_epoch_each_process_goes_on_from_its_own_place(tmp_path, name):
    with pytest.raises(Stopped):
        train(tmp_path, config_of(epochs=3), losses=Cut(3), saving=Saving(steps=1))
    newest = Checkpoints(tmp_path / "checkpoints" / "student").newest()
    assert (newest.epochs, newest.batches) == (1, 1)
    (newest.path / name).unlink()
    files = json.loads((newest.path / "manifest.json").read_text())["files"]
    rewrite_manifest(newest.path, files={kept: value for kept, value in files.items() if kept != name})
    with pytest.raises(ValueError, match=f"process 0 of 1 does not find .*{name}: all machines must see the same"):
        train(tmp_path, config_of(epochs=3), resume=True)


def test_each_checkpoint_is_written_under_a_name_of_its_own(tmp_path, monkeypatch):
    """Other machines may still take the last one's name for the checkpoint that it has become."""
    names, save_state = [], Accelerator.save_state
    monkeypatch.setattr(Accelerator, "save_state", lambda self, path: names.append(path) or save_state(self, path))
    train(tmp_path, config_of(epochs=3))
    assert len(set(names)) == 3 and all("/unfinished_" in name for name in names)


def test_settings_that_are_allowed_to_change_count_from_the_checkpoint_on(tmp_path, learning_rates):
    train(tmp_path, config_of(epochs=4, lr=0.1, momentum=0.9, weight_decay=0.125), stop_after=3)
    learning_rates.clear()
    changed = config_of(epochs=6, lr=0.4, momentum=0.5, weight_decay=0.25)
    found = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: found.append(optimizer.param_groups[-1]))
    train(tmp_path, changed, resume=True)
    handle.remove()
    # two epochs of two steps are behind it: the steps 4 to 11 of half a cosine over 12
    assert learning_rates == pytest.approx([0.2 * (1 + math.cos(math.pi * n / 12)) for n in range(4, 12)], abs=1e-12)
    assert {group["momentum"] for group in found} == {0.5} and {group["weight_decay"] for group in found} == {0.25}


@pytest.mark.parametrize("changes", [dict(batch_size=2), dict(batch_size=2, accumulate=2)])
def test_other_batches_go_on_at_the_end_of_an_epoch(tmp_path, changes, learning_rates):
    with pytest.raises(Stopped):
        train(tmp_path, config_of(epochs=3), losses=Cut(3), saving=Saving(steps=1))  # within the second epoch
    learning_rates.clear()
    train(tmp_path, config_of(**{**dict(epochs=3, batch_size=4), **changes}), resume=True)
    steps = 2 if "accumulate" in changes else 4
    assert len(learning_rates) == 2 * steps
    expected = [0.05 * (1 + math.cos(math.pi * n / (3 * steps))) for n in range(steps, 3 * steps)]
    assert learning_rates == pytest.approx(expected, abs=1e-12)


def test_a_first_epoch_of_other_batches_is_not_thrown_away(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, config_of(epochs=3), losses=Cut(1), saving=Saving(steps=1))
    path = tmp_path / "checkpoints" / "student"
    before = sorted(found.name for found in path.iterdir())
    with pytest.raises(ValueError, match=r"within the first epoch, whose batches are others now \(batch_size 4 -> 2\)"):
        train(tmp_path, config_of(epochs=3, batch_size=2), resume=True)
    assert sorted(found.name for found in path.iterdir()) == before == ["epoch_0000_batch_00000001"]


def test_a_step_has_all_its_batches_where_accumulation_was_changed(tmp_path):
    """7 batches an epoch: steps of 2 leave one over, and Accelerate's own count of passes stands at 6 then."""
    config, steps = dict(epochs=3, batch_size=2), []
    train(tmp_path, config_of(**config, accumulate=2), images=14, stop_after=2)

    def losses(logits, labels):
        steps.append("pass")
        return cross_entropy(logits, labels)

    handle = register_optimizer_step_pre_hook(lambda *_: steps.append("step"))
    train(tmp_path, config_of(**config, accumulate=4), losses=losses, images=14, resume=True)
    handle.remove()
    assert steps == [*["pass"] * 4, "step"] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight_decay=0.1), "does not fit what is trained now: .* cannot be continued"),
        (dict(optimizer="adamw"), "is of the optimizer 'momentum': start a new run"),
    ],
)
def test_what_cannot_be_continued_is_refused(tmp_path, change, message):
    train(tmp_path, config_of(epochs=3), stop_after=2)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, config_of(epochs=3, **change), resume=True)


def test_an_average_that_is_switched_on_later_starts_there(tmp_path):
    train(tmp_path, config_of(epochs=3), stop_after=2)
    train(tmp_path, config_of(epochs=3, ema=0.9), resume=True)
    assert [line["epoch"] for line in metrics_of(tmp_path)] == [1, 2, 3]
