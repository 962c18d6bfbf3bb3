"""Steps whose loss or gradient is no number: skipped, written down, and after too many the end."""

import dataclasses
import itertools
import json
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from toy_runs import metrics_of
from toy_training import config_of, cross_entropy, data_of, linear, train

from distill.checkpoints import Checkpoints
from distill.runs import Saving
from distill.steps import NonFiniteLossError


class BadSteps:
    """A loss that is no number in some steps of a training, counted from 0."""

    def __init__(self, *steps, bad=math.nan):
        self.calls, self.steps, self.bad = itertools.count(), steps, bad

    def __call__(self, logits, labels):
        loss = F.cross_entropy(logits, labels)
        worse = self.bad if next(self.calls) in self.steps else 1.0
        return {"total": loss * worse, "student_ce": loss, "student_kd": loss * worse}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_stays_no_number_names_its_parts_and_images_and_leaves_a_checkpoint(tmp_path, bad):
    with pytest.raises(NonFiniteLossError, match=r"in step 4 \(epoch 2\) of the student \(.*student_kd (nan|inf)") as e:
        train(tmp_path, config_of(epochs=5, max_skipped_steps=1), losses=BadSteps(*range(2, 99), bad=bad))
    for part in (f"total {bad:g}", "student_ce ", "2 times in a row", "images [4, 5, 6, 7]", "train.lr (0.1)"):
        assert part in str(e.value)
    found = Checkpoints(tmp_path / "checkpoints" / "student").newest()
    assert (found.epochs, found.batches) == (1, 2)
    weights = load_file(found.path / "model.safetensors")
    expected, _ = train(tmp_path / "one", config_of(epochs=5), stop_after=1)
    assert torch.equal(weights["1.weight"], expected[1].weight)  # of the last good step
    assert [line["epoch"] for line in metrics_of(tmp_path)] == [1]


def test_all_images_of_a_bad_step_are_kept_in_a_file_that_is_named(tmp_path):
    with pytest.raises(NonFiniteLossError) as e:
        train(tmp_path, config_of(batch_size=40, accumulate=2, max_skipped_steps=0), losses=BadSteps(3), images=160)
    path = tmp_path / "bad_steps" / "student_2.json"
    assert f"{[*range(80, 144)]} ... ({path} has all 80" in str(e.value)  # 64 are shown
    found = json.loads(path.read_text())
    assert (found["stage"], found["epoch"], found["step"], len(found["processes"])) == ("student", 1, 2, 1)
    assert found["processes"][0]["images"] == [*range(80, 160)] and "total nan" in found["processes"][0]["loss"]


def test_a_bad_step_is_skipped_with_all_that_it_did(tmp_path, caplog):
    caplog.set_level(logging.INFO)

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()

    states = []
    for name, losses, images in (("bad", BadSteps(1), 8), ("short", cross_entropy, 4)):  # steps of 4 images
        loader = DataLoader(Subset(data_of(), range(images)), 4)
        model, _ = train(tmp_path / name, config_of(lr=0.5), network(), losses, loader=loader, stop_after=1)
        states.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert "in step 2 (epoch 1) of the student (total nan" in caplog.text and "images [4, 5, 6, 7]" in caplog.text


def test_skipped_steps_are_counted_and_leave_the_means_alone(tmp_path):
    train(tmp_path, config_of(epochs=2, lr=1e-12), losses=BadSteps(1))
    first, second = metrics_of(tmp_path)
    images, labels = data_of().tensors
    assert first["skipped_steps"] == 1 and "skipped_steps" not in second
    assert first["loss/total"] == pytest.approx(F.cross_entropy(linear()(images[:4]), labels[:4]).item(), rel=1e-6)


def test_a_gradient_that_is_no_number_is_skipped_too(tmp_path):
    def losses(logits, labels):
        return {"total": (logits - logits.detach()).square().sum().sqrt()}  # 0, with a gradient 0/0

    with pytest.raises(NonFiniteLossError, match="total 0"):
        train(tmp_path, config_of(max_skipped_steps=0), losses=losses)


class Overflow:
    """A loss that is a number, with gradients that are none in some of the steps."""

    def __init__(self, *steps):
        self.steps, self.calls = steps, itertools.count()

    def __call__(self, logits, labels):
        parts = cross_entropy(logits, labels)
        if next(self.calls) in self.steps:
            parts["total"] = parts["total"] + (logits - logits.detach()).square().sum().sqrt()  # 0, with 0/0
        return parts


def test_a_step_that_the_scaler_skips_leaves_no_trace_but_in_the_log(tmp_path, caplog):
    """On a CPU the scaler of float16 does for other types, too: only its numbers are not needed."""
    caplog.set_level(logging.INFO)

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3))

    data = TensorDataset(data_of(16).tensors[0].float(), data_of(16).tensors[1])
    loader, scaler = DataLoader(data, 4), torch.amp.GradScaler("cpu")
    config = config_of(max_skipped_steps=0, ema=0.9)
    model, _ = train(tmp_path, config, network(), Overflow(0, 1, 2, 3), loader=loader, scaler=scaler)
    for name, before in network().state_dict().items():
        assert torch.equal(model.state_dict()[name], before), name
    (line,) = metrics_of(tmp_path)
    progress = json.loads((tmp_path / "checkpoints" / "student" / "epoch_0001" / "progress_0.json").read_text())
    assert (line["skipped_steps"], progress["averaged"], progress["overflowed_in_a_row"]) == (4, 0, 4)
    assert caplog.text.count("the gradient overflows float16 in step 1 (epoch 1) of the student (total ") == 1
    assert "the loss is scaled by 32768 now" in caplog.text and caplog.text.count("overflows") == 1
    train(tmp_path, dataclasses.replace(config, epochs=2), network(), loader=loader, scaler=scaler, resume=True)
    progress = json.loads((tmp_path / "checkpoints" / "student" / "epoch_0002" / "progress_0.json").read_text())
    assert (progress["averaged"], progress["overflowed_in_a_row"]) == (4, 0)


def test_gradients_that_no_scale_makes_numbers_end_the_training(tmp_path):
    scaler = torch.amp.GradScaler("cpu")
    data = TensorDataset(data_of(80).tensors[0].float(), data_of(80).tensors[1])
    loader = DataLoader(data, 1)
    with pytest.raises(NonFiniteLossError, match=r"in step 52 \(epoch 1\) of the .*, 51 times in a row") as e:
        train(tmp_path, config_of(), linear().float(), Overflow(*range(1, 99)), loader=loader, scaler=scaler,
              saving=Saving(steps=1))  # fmt: skip
    (kept,) = (tmp_path / "checkpoints" / "student").iterdir()
    assert kept.name == "epoch_0000_batch_00000001", "none with a scale that was brought down for nothing"
    for part in ("images [51]", str(kept), "run.mixed_precision (bf16 or no)", "e-11"):
        assert part in str(e.value), part
