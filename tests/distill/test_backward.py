"""Forward and backward passes of one batch: gradients, optimizer steps and processes, in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from online_toy import Online, batch, cross_entropy
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, TensorDataset
from toy_runs import forget_accelerate

from distill import SnnLossConfig, TrainConfig
from distill.backward import each_step, once
from distill.loop import fit
from distill.runs import RunFolder
from distill.snn_training import backward_of
from models import create_snn

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def accelerator():
    forget_accelerate()
    return Accelerator(cpu=True, step_scheduler_with_optimizer=False)


def by_hand(images, labels, timesteps):
    """The sum over the steps of each step's own gradient, the membrane before it a constant; and the losses."""
    weight = Online().linear.weight.detach()
    membrane, total, losses = torch.zeros(len(images), 3, dtype=torch.float64), torch.zeros_like(weight), []
    for _ in range(timesteps):
        leaf = weight.clone().requires_grad_()
        current = 0.5 * membrane + images.flatten(1) @ leaf.T
        loss = F.cross_entropy(current, labels)
        (gradient,) = torch.autograd.grad(loss, leaf)
        total, membrane = total + gradient / timesteps, current.detach()
        losses.append(loss.item())
    return total, sum(losses) / timesteps


def test_the_steps_gradients_add_up_to_that_of_the_mean_loss(accelerator):
    images, labels = batch()
    model = Online()
    parts = each_step(cross_entropy, 3)(accelerator, model, images, labels, 0)
    gradient, loss = by_hand(images, labels, 3)
    torch.testing.assert_close(model.linear.weight.grad, gradient, rtol=0, atol=1e-12)
    assert parts["total"].item() == pytest.approx(loss, abs=1e-12) and not parts["total"].requires_grad
    assert model.steps == [0, 1, 2]


def test_once_gives_the_model_its_options_and_detached_parts(accelerator):
    class Model(nn.Linear):
        def forward(self, x, *, per_step=False):
            self.per_step = per_step
            return super().forward(x)

    model = Model(4, 3).double()
    images, labels = batch()
    parts = once(cross_entropy, per_step=True)(accelerator, model, images.flatten(1), labels, 0)
    assert model.per_step is True and not parts["total"].requires_grad and model.weight.grad.abs().max() > 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_optimizer_moves_once_a_batch_however_many_steps_it_has(accelerator, tmp_path, accumulate):
    gradients = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, args, kwargs: gradients.append(optimizer.param_groups[0]["params"][0].grad.clone())
    )
    images, labels = batch(8)
    try:
        fit(
            stage="student",
            accelerator=accelerator,
            model=Online(),
            backward=each_step(cross_entropy, 3),
            loader=DataLoader(TensorDataset(images, labels), 4 // accumulate),
            evaluate=lambda model: {},
            config=TrainConfig(
                epochs=1, batch_size=4, accumulate=accumulate, lr=1e-12, optimizer="momentum", weight_decay=0.0
            ),
            folder=RunFolder(tmp_path),
            resume=False,
        )
    finally:
        handle.remove()
    assert len(gradients) == 2  # 8 images, 4 of them a step of the optimizer
    for found, start in zip(gradients, (0, 4), strict=True):
        expected, _ = by_hand(images[start : start + 4], labels[start : start + 4], 3)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("algorithm", ["ottt", "sltt"])
@pytest.mark.parametrize("loss", ["ce", "tet"])
def test_a_spiking_network_gets_the_gradients_of_its_steps(accelerator, algorithm, loss):
    def network():
        torch.manual_seed(0)
        return create_snn("resnet18_cifar", 3, 2, 1, algorithm=algorithm, width=4).double().train()

    images, labels = torch.rand(2, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 2])
    trained, other = network(), network()
    backward_of(SnnLossConfig(name=loss), algorithm, 2)(accelerator, trained, images, labels, 0)
    for step in range(2):
        logits = other(images, step=step)
        ce, mse = F.cross_entropy(logits, labels), (logits - 1).square().mean()
        ((ce if loss == "ce" else 0.95 * ce + 0.05 * mse) / 2).backward()
    for name, parameter in trained.named_parameters():
        torch.testing.assert_close(parameter.grad, other.get_parameter(name).grad, rtol=1e-9, atol=1e-12)
    assert trained.classifier.weight.grad.abs().max() > 0


def test_tet_of_backpropagation_through_time_sees_each_step(accelerator):
    torch.manual_seed(0)
    snn = create_snn("resnet18_cifar", 3, 2, 1, algorithm="bptt", width=4).double().train()
    images, labels = torch.rand(2, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 2])
    parts = backward_of(SnnLossConfig(name="tet"), "bptt", 2)(accelerator, snn, images, labels, 0)
    with torch.no_grad():
        steps = snn(images, per_step=True)
    assert steps.shape == (2, 2, 3)
    expected = sum(F.cross_entropy(step, labels).item() for step in steps) / 2
    assert parts["ce"].item() == pytest.approx(expected, abs=1e-9)


def test_two_processes_exchange_the_sum_of_all_steps_once(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    command = [sys.executable, *launcher, str(Path(__file__).with_name("online_toy.py")), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    images, labels = batch(8)
    expected = sum(by_hand(images[i::2], labels[i::2], 3)[0] for i in range(2)) / 2
    for rank in range(2):
        found, exchanges = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert exchanges == 1
