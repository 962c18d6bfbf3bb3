"""The loop counts optimizer steps; what it does to a linear network is worked out by hand."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, TensorDataset
from toy_runs import forget_accelerate, metrics_of, timeless

from distill import TrainConfig
from distill.backward import once
from distill.data.loaders import EpochSampler
from distill.loop import NonFiniteLossError, fit, make_optimizer, unwrap, warmup_cosine
from distill.runs import Checkpoints, RunFolder

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


def cross_entropy(logits, labels):
    return {"total": F.cross_entropy(logits, labels)}


def train(tmp_path, config, model=None, losses=cross_entropy, images=IMAGES, resume=False, evaluate=lambda model: {}):
    """Returns the trained network and what `fit` returned."""
    forget_accelerate()
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    tmp_path.mkdir(exist_ok=True)
    result = fit(
        stage="student",
        accelerator=accelerator,
        model=linear() if model is None else model,
        backward=once(losses),
        loader=DataLoader(data_of(images), config.batch_size),
        evaluate=evaluate,
        config=config,
        folder=RunFolder(tmp_path),
        resume=resume,
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


def test_batches_that_are_left_over_make_a_step_of_their_own(tmp_path, learning_rates):
    config = config_of(epochs=2, batch_size=2, accumulate=3)  # 4 batches an epoch: a step of 3 and one of 1
    train(tmp_path, config)
    assert learning_rates == pytest.approx([0.1 * share for share in HALF_COSINE[:4]], abs=1e-12)
    assert [line["steps"] for line in metrics_of(tmp_path)] == [2, 4]


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


def test_the_network_is_in_training_mode_in_each_epoch(tmp_path):
    modes = []
    network = linear()
    network.register_forward_hook(lambda module, args, output: modes.append(module.training))
    train(tmp_path, config_of(epochs=2, batch_size=8), model=network)
    assert modes == [True, True]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_its_parts_and_keeps_the_last_checkpoint(tmp_path, bad):
    calls = itertools.count()

    def losses(logits, labels):
        worse = bad if next(calls) >= 2 else 1.0  # in the second epoch
        loss = F.cross_entropy(logits, labels)
        return {"total": loss * worse, "student_ce": loss, "student_kd": loss * worse}

    with pytest.raises(NonFiniteLossError, match=r"in epoch 2 of the student \(.*student_kd (nan|inf)") as raised:
        train(tmp_path, config_of(epochs=5), losses=losses)
    for part in (f"total {bad:g}", "student_ce ", "train.lr (0.1)", "train.clip (now None)"):
        assert part in str(raised.value)
    epochs, path = Checkpoints(RunFolder(tmp_path), "student").latest()
    assert epochs == 1 and (path / "model.safetensors").is_file()
    assert [line["epoch"] for line in metrics_of(tmp_path)] == [1]


def test_the_newest_checkpoint_is_the_only_one(tmp_path):
    train(tmp_path, config_of(epochs=3))
    assert [path.name for path in (tmp_path / "checkpoints" / "student").iterdir()] == ["epoch_0003"]


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
    assert result.evaluation is None and result.seconds == pytest.approx(first.seconds)
    assert len(metrics_of(tmp_path)) == 2


def test_resuming_where_nothing_was_saved_starts_at_the_first_epoch(tmp_path, learning_rates):
    train(tmp_path, config_of(epochs=2), resume=True)
    assert len(learning_rates) == 4 and len(metrics_of(tmp_path)) == 2


def test_fewer_images_than_a_batch_are_refused(tmp_path):
    forget_accelerate()
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    loader = DataLoader(data_of(3), 4, drop_last=True)
    with pytest.raises(ValueError, match=r"fewer training images .*1 x batch_size 4"):
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
