"""Batch-norm statistics of other images, for a while."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from toy_feedback import with_stem
from toy_networks import spiking
from toy_teachers import images_of, student_of, teacher_of

from distill import HybridDistiller
from distill.recalibration import recalibrated
from models import NeuronConfig, SpikingNeuron, create_snn


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.fire, self.head = norm, SpikingNeuron(NeuronConfig(leak=1.0)), nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.fire(self.norm(x)).mean((2, 3)))


def test_statistics_are_the_means_over_batches_of_all_steps_and_come_back():
    snn = spiking(Net(nn.BatchNorm2d(2, momentum=0.3)).double(), 3, in_chans=2).eval()
    before = copy.deepcopy(snn.state_dict())
    batches = [torch.rand(3, count, 2, 2, 2, dtype=torch.float64) * count for count in (4, 2)]  # frames of T = 3
    with recalibrated(Accelerator(cpu=True), snn, batches) as images:
        assert images == 6
        means = [batch.mean((0, 1, 3, 4)) for batch in batches]
        variances = [batch.transpose(0, 2).flatten(1).var(1) for batch in batches]
        torch.testing.assert_close(snn.norm.running_mean, sum(means) / 2)
        torch.testing.assert_close(snn.norm.running_var, sum(variances) / 2)
        assert not any(module.training for module in snn.modules())
    assert all(before[name].equal(value) for name, value in snn.state_dict().items())
    assert snn.norm.momentum == 0.3


def test_an_input_that_is_the_same_at_each_step_counts_at_each():
    images = torch.rand(4, 2, 3, 3, dtype=torch.float64)
    found = []
    for batch, steps in ((images, 2), (torch.stack([images] * 2), 2)):
        snn = spiking(Net(nn.BatchNorm2d(2)).double(), steps, in_chans=2).eval()
        with recalibrated(Accelerator(cpu=True), snn, [batch]):
            found.append((snn.norm.running_mean.clone(), snn.norm.running_var.clone()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_of_a_hybrid_the_teachers_norms_stay_and_the_others_move():
    teacher = teacher_of("resnet18", torch.float64)
    images = images_of(torch.float64, 4)
    distiller = HybridDistiller(teacher, student_of(teacher, 2), images=images)
    hybrid = distiller.hybrid("layer2").eval()
    before = copy.deepcopy(hybrid.state_dict())
    with recalibrated(Accelerator(cpu=True), hybrid, [images]):
        inside = hybrid.state_dict()
        assert all(inside[name].equal(before[name]) for name in before if name.startswith("teacher."))
        for name in ("student.bn1.running_mean", "student.layer2.1.bn2.running_var", "adapter.bn.running_mean"):
            assert not inside[name].equal(before[name]), name
        logits = hybrid(images)
    after = hybrid.state_dict()
    assert all(after[name].equal(before[name]) for name in before)
    assert not hybrid(images).allclose(logits)


@torch.no_grad()
def test_norms_of_a_feedback_network_have_the_statistics_of_averages():
    snn = create_snn("feedback_convnet", 5, 3, 1, algorithm="ide", width=8).double().eval()
    snn.loop.input_map.norm.running_mean.fill_(7.0)
    batches = [torch.randn(count, 1, 8, 8, dtype=torch.float64) for count in (4, 2)]
    currents = [snn.loop.input_map.linear(batch) for batch in batches]  # an image's average current is its current
    with recalibrated(Accelerator(cpu=True), snn, batches) as images:
        norm = snn.loop.input_map.norm
        torch.testing.assert_close(norm.running_mean, sum(x.mean((0, 2, 3)) for x in currents) / 2)
        torch.testing.assert_close(norm.running_var, sum(x.transpose(0, 1).flatten(1).var(1) for x in currents) / 2)
        assert images == 6 and not any(module.training for module in snn.modules())
    assert (snn.loop.input_map.norm.running_mean == 7).all()


@torch.no_grad()
def test_norms_inside_of_a_loop_have_those_of_its_measured_rates():
    snn, spikes = with_stem(timesteps=3).double().eval(), []
    handle = snn.loop.neurons[0].register_forward_hook(lambda module, args, output: spikes.append(output.folded))
    with recalibrated(Accelerator(cpu=True), snn, [torch.randn(4, 3, 8, 8, dtype=torch.float64)]):
        handle.remove()
        current = snn.loop.maps[0].linear(torch.stack(spikes).mean(0))  # three steps
        assert len(spikes) == 3 and current.std() > 0
        torch.testing.assert_close(snn.loop.maps[0].norm.running_mean, current.mean((0, 2, 3)))
        torch.testing.assert_close(snn.loop.maps[0].norm.running_var, current.transpose(0, 1).flatten(1).var(1))


def test_an_error_puts_everything_back():
    snn = spiking(Net(nn.BatchNorm2d(2)), 2, in_chans=2).eval()
    before = copy.deepcopy(snn.state_dict())
    with (
        pytest.raises(ValueError, match="channels"),
        recalibrated(Accelerator(cpu=True), snn, [torch.rand(1, 5, 2, 2)]),
    ):
        pass
    assert all(before[name].equal(value) for name, value in snn.state_dict().items())
    assert not snn.norm.training and snn.norm.momentum == 0.1


@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm2d(2, track_running_stats=False)])
def test_a_network_without_running_statistics_is_refused(norm):
    snn = spiking(Net(norm), 2, in_chans=2).eval()
    with (
        pytest.raises(ValueError, match="recalibrate: SpikingNet has no batch norms with running statistics"),
        recalibrated(Accelerator(cpu=True), snn, [torch.rand(2, 2, 2, 2)]),
    ):
        pass
