"""The loop counts optimizer steps; what it does to a linear network is worked out by hand."""

import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy_runs import forget_accelerate, metrics_of
from toy_training import HALF_COSINE, IMAGES, config_of, cross_entropy, data_of, in_order, linear, train

from distill.backward import once
from distill.data.loaders import EpochSampler
from distill.loop import fit
from distill.preparation import unwrap
from distill.runs import RunFolder
from models import SpikingNeuron, create_snn


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
    network, inside = nn.Sequential(nn.Linear(4, 3)), []
    network[0].register_forward_hook(lambda module, args, output: inside.append(output.dtype))
    wrapped = accelerator.prepare(network)
    assert "forward" in vars(wrapped)
    found = unwrap(accelerator, wrapped)
    assert found is network and "forward" not in vars(found) and found(torch.ones(1, 4)).dtype == torch.float32
    accelerator.prepare(network)(torch.ones(1, 4))  # by the next stage of a schedule
    assert inside == [torch.float32, torch.bfloat16]


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
