"""The loop counts optimizer steps; what it does to a linear network is worked out by hand."""

import dataclasses
import errno
import itertools
import json
import logging
import math
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, Subset, TensorDataset
from toy_runs import forget_accelerate, metrics_of, rewrite_manifest, timeless

from distill import TrainConfig
from distill.backward import once
from distill.checkpoints import Checkpoints
from distill.data.loaders import EpochSampler
from distill.interruption import INTERRUPTION, Preempted
from distill.loop import fit
from distill.optimizers import make_optimizer, warmup_cosine
from distill.preparation import unwrap
from distill.runs import RunFolder, Saving
from distill.steps import NonFiniteLossError
from models import SpikingNeuron, create_snn

IMAGES = 8
HALF_COSINE = [1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0.0]  # at 0, 1/4, 1/2, 3/4 and 1 of the way


def config_of(**changes):
    defaults = dict(epochs=1, batch_size=4, optimizer="momentum", lr=0.1, momentum=0.0, weight_decay=0.0)
    return TrainConfig(**{**defaults, **changes})


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()


def data_of(images=IMAGES):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(images, 1, 2, 2, generator=generator, dtype=torch.float64)
    return TensorDataset(pixels, torch.randint(0, 3, (images,), generator=generator))


class Keyed(TensorDataset):
    """Indexed by what `EpochSampler` yields."""

    def __getitem__(self, key):
        return super().__getitem__(key[1])


class InOrder(EpochSampler):
    """The images of each epoch in their own order."""

    def order(self, epoch):
        return np.arange(len(self))


def loader_of(batch_size, images, sampler, **options):
    """With a generator of its own, as `distill.data.train_loader` makes it: a pass draws a seed for its workers."""
    data = Keyed(*data_of(images).tensors)
    return DataLoader(data, batch_size, sampler=sampler, generator=torch.Generator(), **options)


def in_order(batch_size, images=IMAGES):
    return loader_of(batch_size, images, InOrder(images, 0))


def shuffled(batch_size, images):
    return loader_of(batch_size, images, EpochSampler(images, 3), drop_last=True)


def cross_entropy(logits, labels):
    return {"total": F.cross_entropy(logits, labels)}


class Stopped(Exception):
    """Raised by a test in the middle of a training."""


def train(tmp_path, config, model=None, losses=cross_entropy, images=IMAGES, resume=False, evaluate=lambda model: {},
          score=None, saving=None, stop_after=None, loader=None, scaler=None):  # fmt: skip
    """Returns the trained network and what `fit` returned; with `stop_after` the network after so many epochs."""
    forget_accelerate()
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    accelerator.scaler = scaler
    tmp_path.mkdir(exist_ok=True)
    model = linear() if model is None else model
    if stop_after is not None:
        epochs = itertools.count(1)

        def evaluate(model):
            if next(epochs) == stop_after:
                raise Stopped
            return {}

        with pytest.raises(Stopped):
            train(tmp_path, config, model, losses, images, resume, evaluate, score, saving, loader=loader)
        return model, None
    result = fit(
        stage="student",
        accelerator=accelerator,
        model=model,
        backward=once(losses),
        loader=in_order(config.batch_size, images) if loader is None else loader,
        evaluate=evaluate,
        config=config,
        folder=RunFolder(tmp_path, saving),
        resume=resume,
        score=score,
    )
    return accelerator.unwrap_model(result.model), result


@pytest.fixture
def learning_rates():
    """Of each optimizer step that is taken."""
    rates = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, args, kwargs: rates.append(optimizer.param_groups[0]["lr"])
    )
    yield rates
    handle.remove()


def test_the_learning_rate_rises_linearly_and_falls_along_half_a_cosine():
    factor = warmup_cosine(config_of(warmup_steps=3), steps=7)
    assert [factor(step) for step in range(8)] == pytest.approx([1 / 4, 2 / 4, 3 / 4, *HALF_COSINE], abs=1e-12)
    assert factor(9) == pytest.approx(0.0, abs=1e-12)


def test_the_cosine_ends_at_the_smallest_learning_rate():
    factor = warmup_cosine(config_of(lr=0.4, min_lr=0.1), steps=4)
    expected = [0.1 + 0.3 * share for share in HALF_COSINE]
    assert [0.4 * factor(step) for step in range(5)] == pytest.approx(expected, abs=1e-12)


def test_a_warm_up_longer_than_the_training_only_rises():
    factor = warmup_cosine(config_of(warmup_steps=100), steps=3)
    assert [factor(step) for step in range(3)] == pytest.approx([1 / 4, 2 / 4, 3 / 4])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_schedule_counts_optimizer_steps(tmp_path, learning_rates, accumulate):
    # 8 images in batches of 4 / accumulate: two steps an epoch either way, 6 in all, 2 of them to warm up
    config = config_of(epochs=3, batch_size=4 // accumulate, accumulate=accumulate, lr=0.8, warmup_steps=2)
    train(tmp_path, config)
    expected = [0.8 * share for share in (1 / 3, 2 / 3, *HALF_COSINE[:4])]
    assert learning_rates == pytest.approx(expected, abs=1e-12)
    lines = metrics_of(tmp_path)
    assert [line["steps"] for line in lines] == [2, 4, 6]
    assert [line["lr"] for line in lines] == pytest.approx(expected[::2], abs=1e-12)


def test_batches_that_fill_no_step_are_left_out(tmp_path, learning_rates):
    config = config_of(epochs=2, batch_size=2, accumulate=3)  # 4 batches an epoch: a step of 3, one is left
    train(tmp_path, config)
    assert learning_rates == pytest.approx([0.1, 0.05], abs=1e-12)  # half a cosine over two steps
    assert [(line["steps"], line["images"]) for line in metrics_of(tmp_path)] == [(1, 6), (2, 6)]


@pytest.mark.parametrize("clip", [None, 0.01])
def test_two_batches_of_four_accumulate_to_one_of_eight(tmp_path, clip):
    common = dict(epochs=3, clip=clip, momentum=0.9, weight_decay=0.01)
    whole, _ = train(tmp_path / "whole", config_of(batch_size=8, **common))
    halves, _ = train(tmp_path / "halves", config_of(batch_size=4, accumulate=2, **common))
    start = linear()[1].weight
    assert (whole[1].weight - start).abs().max() > 1e-4
    torch.testing.assert_close(halves[1].weight, whole[1].weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(halves[1].bias, whole[1].bias, rtol=0, atol=1e-12)
    losses = [[line["loss/total"] for line in metrics_of(tmp_path / name)] for name in ("whole", "halves")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # summed in float32


def test_one_step_of_gradient_descent(tmp_path):
    start = linear()
    images, labels = data_of().tensors
    F.cross_entropy(start(images), labels).backward()
    network, _ = train(tmp_path, config_of(batch_size=8, lr=0.5))
    expected = start[1].weight - 0.5 * start[1].weight.grad
    torch.testing.assert_close(network[1].weight, expected, rtol=0, atol=1e-12)


def test_clipping_bounds_the_norm_of_all_gradients_together(tmp_path):
    def steep(logits, labels):
        return {"total": 1000 * F.cross_entropy(logits, labels)}

    def moved(**changes):
        network, _ = train(tmp_path / f"{changes}", config_of(batch_size=8, lr=1.0, **changes), losses=steep)
        moves = [a - b for a, b in zip(network.parameters(), linear().parameters(), strict=True)]
        return torch.cat([move.flatten() for move in moves]).norm().item()

    assert moved() > 100
    assert moved(clip=0.25) == pytest.approx(0.25, rel=1e-5)


def test_weight_decay_leaves_biases_and_norms_alone():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    optimizer = make_optimizer(network, config_of(weight_decay=0.5))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(network[0].weight)] == 0.5
    assert [decay[id(p)] for p in (network[0].bias, network[1].weight, network[1].bias)] == [0.0] * 3


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw", "lamb"])
def test_timm_optimizers_are_made_by_name(name):
    optimizer = make_optimizer(linear(), config_of(optimizer=name, lr=0.25, momentum=0.75))
    assert optimizer.param_groups[0]["lr"] == 0.25
    if name in ("sgd", "momentum"):
        assert optimizer.param_groups[0]["momentum"] == 0.75
        assert optimizer.param_groups[0]["nesterov"] == (name == "sgd")


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"optimizer: timm knows no 'sgdd'"):
        make_optimizer(linear(), config_of(optimizer="sgdd"))


def test_sgd_without_momentum_is_either_made_or_refused_for_what_it_is():
    try:
        optimizer = make_optimizer(linear(), config_of(optimizer="sgd", momentum=0.0))
    except ValueError as error:
        assert "momentum" in str(error) and "knows no optimizer" not in str(error)
    else:
        assert optimizer.param_groups[0]["momentum"] == 0.0


def test_metrics_have_one_line_an_epoch_with_means_over_images(tmp_path):
    def losses(logits, labels):
        loss = F.cross_entropy(logits, labels)
        return {"total": loss, "part": logits.new_tensor(float(len(labels)))}

    seen = []

    def evaluate(model):
        seen.append(model.training)
        return {"top1": 50.0}

    _, result = train(tmp_path, config_of(epochs=2, batch_size=5, lr=1e-12), losses=losses, evaluate=evaluate)
    lines = metrics_of(tmp_path)
    assert [(line["stage"], line["epoch"], line["top1"]) for line in lines] == [("student", n, 50.0) for n in (1, 2)]
    images, labels = data_of().tensors
    expected = F.cross_entropy(linear()(images), labels).item()
    for line in lines:
        assert line["loss/total"] == pytest.approx(expected, rel=1e-6)
        assert line["loss/part"] == pytest.approx((5 * 5 + 3 * 3) / 8)  # batches of 5 and 3
        assert line["images_per_second"] > 0
    assert seen == [False, False] and not result.model.training and result.evaluation == {"top1": 50.0}
    assert result.seconds > 0 and result.images == 2 * IMAGES


@pytest.mark.parametrize("part", [False, True], ids=["all", "a part"])
def test_frozen_norms_keep_their_statistics_and_learn_their_weights(tmp_path, part):
    forget_accelerate()
    torch.manual_seed(0)
    first, second = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    network = nn.Sequential(nn.Flatten(), first, second, nn.Linear(4, 3)).double()
    first.running_mean.fill_(0.25)
    modes = []
    first.register_forward_hook(lambda module, args, out: modes.append((module.training, network.training)))
    (tmp_path / "r").mkdir()
    fit(stage="student", accelerator=Accelerator(cpu=True, step_scheduler_with_optimizer=False), model=network,
        backward=once(cross_entropy), loader=in_order(4), evaluate=lambda model: {},
        config=config_of(epochs=2, freeze_norms=True), folder=RunFolder(tmp_path / "r"), resume=False,
        norms_of=first if part else None)  # fmt: skip
    assert modes == [(False, True)] * 4
    assert torch.equal(first.running_mean, torch.full((4,), 0.25, dtype=torch.float64))
    assert not torch.equal(first.weight, torch.ones(4, dtype=torch.float64))
    assert torch.equal(second.running_mean, torch.zeros(4, dtype=torch.float64)) != part


def test_the_network_is_in_training_mode_in_each_epoch(tmp_path):
    modes = []
    network = linear()
    network.register_forward_hook(lambda module, args, output: modes.append(module.training))
    train(tmp_path, config_of(epochs=2, batch_size=8), model=network)
    assert modes == [True, True]


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
        train(tmp_path, config_of(), linear().float(), Overflow(*range(1, 99)), loader=loader, scaler=scaler)
    for part in ("images [51]", "no checkpoint was written before", "run.mixed_precision (bf16 or no)", "e-11"):
        assert part in str(e.value), part


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


def test_fewer_images_than_a_batch_are_refused(tmp_path):
    forget_accelerate()
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    loader = DataLoader(data_of(3), 4, drop_last=True)
    with pytest.raises(ValueError, match=r"fewer training images .*1 x batch_size 4\)"):
        fit(
            stage="student",
            accelerator=accelerator,
            model=linear(),
            backward=once(cross_entropy),
            loader=loader,
            evaluate=lambda model: {},
            config=config_of(),
            folder=RunFolder(tmp_path),
            resume=False,
        )


def test_unwrapping_leaves_nothing_of_autocast_on_the_network():
    forget_accelerate()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    network = nn.Linear(4, 3)
    wrapped = accelerator.prepare(network)
    assert "forward" in vars(wrapped)
    found = unwrap(accelerator, wrapped)
    assert found is network and "forward" not in vars(found) and found(torch.ones(1, 4)).dtype == torch.float32


def test_a_training_goes_on_with_the_data_where_the_one_before_ended(tmp_path):
    config = config_of(epochs=1, accumulate=2)
    seen = {}

    class Indices(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, key):  # EpochSampler's
            return torch.tensor(key, dtype=torch.float64), 0

    def run(name, **options):
        forget_accelerate()
        accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
        rows = seen.setdefault(name, [])

        def backward(accelerator, model, images, labels, step):
            rows.append((step, images.tolist()))
            loss = model(images).square().mean()
            accelerator.backward(loss)
            return {"total": loss.detach()}

        loader = DataLoader(Indices(), 2, sampler=EpochSampler(8, 3))
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir()
        fit(stage="student", accelerator=accelerator, model=nn.Linear(2, 1).double(), backward=backward, loader=loader,
            evaluate=lambda model: {}, folder=folder, resume=False, **options)  # fmt: skip

    run("whole", config=dataclasses.replace(config, epochs=3))
    run("behind", config=config, epochs_before=2)
    assert len(seen["behind"]) == 4 and seen["behind"] == seen["whole"][8:] != seen["whole"][:4]
    assert [step for step, _ in seen["behind"]] == [4, 4, 5, 5]  # two passes a step, two steps an epoch
    assert {epoch for _, keys in seen["behind"] for epoch, _ in keys} == {2.0}


CUTS = [pytest.param(steps, id=f"after step {steps}") for steps in (1, 2, 3, 4, 5, 7)]


class Cut:
    """A loss that stops the training when so many forward passes are behind it."""

    def __init__(self, passes):
        self.left = passes

    def __call__(self, logits, labels):
        if self.left == 0:
            raise Stopped
        self.left -= 1
        return cross_entropy(logits, labels)


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


def test_firing_rates_are_logged_and_dead_layers_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    snn = create_snn("resnet18_cifar", 3, 2, 1, width=8)
    silent = next(name for name, module in snn.named_modules() if isinstance(module, SpikingNeuron))
    norm = next(module for module in snn.modules() if isinstance(module, nn.BatchNorm2d))
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.fill_(-1.0)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8) % 3)
    train(tmp_path, config_of(lr=1e-9), model=snn, loader=DataLoader(data, 4))
    (line,) = metrics_of(tmp_path)
    rates = {name: value for name, value in line.items() if name.startswith("firing_rate/")}
    assert len(rates) == sum(isinstance(module, SpikingNeuron) for module in snn.modules())
    assert rates[f"firing_rate/{silent}"] == 0.0 and all(0 <= rate <= 1 for rate in rates.values())
    assert f"in epoch 1 layer {silent} is almost silent" in caplog.text


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
