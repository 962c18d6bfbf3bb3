"""Figures of networks that always answer the same, and firing rates, by hand."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy_teachers import snn_of

from distill.evaluation import TEACHER
from distill.judgement import calibration_error, judge
from models import DSRConfig, NeuronConfig, create_snn, spiking_twin

LABELS = [0, 1, 2, 2, 2, 0, 1]


@pytest.fixture
def prepared():
    accelerator = Accelerator(cpu=True)
    images = torch.arange(7.0).reshape(7, 1, 1, 1).expand(7, 2, 4, 4).contiguous()
    return accelerator, accelerator.prepare(DataLoader(TensorDataset(images, torch.tensor(LABELS)), 3))


def numbers(images):
    return images[:, 0, 0, 0].long()


def test_top1_and_top5_count_images(prepared):
    # logits that fall with the class: 0 is first, the labels 1 and 2 are in the first five of ten, too
    falling = -torch.arange(10.0)
    found = judge(*prepared, lambda images: {"falling": falling.expand(len(images), 10)})
    figures = found.figures["falling"]
    assert figures.top1 == pytest.approx(200 / 7) and figures.top5 == 100 and found.images == 7
    rising = judge(*prepared, lambda images: {"rising": -falling.expand(len(images), 10)}).figures["rising"]
    assert rising.top1 == rising.top5 == 0 and rising.agreement is None
    # the sixth: class 2 is sixth from the end of seven classes
    late = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    found = judge(*prepared, lambda images: {"late": late.expand(len(images), 7)}).figures["late"]
    assert found.top5 == pytest.approx(300 / 7)  # classes 2 to 6 are the first five: three labels are 2


def test_with_fewer_than_five_classes_the_label_is_always_among_them(prepared):
    found = judge(*prepared, lambda images: {"three": torch.eye(3)[numbers(images) % 3]}).figures["three"]
    assert found.top5 == 100


def test_agreement_is_with_the_teacher_who_has_none(prepared):
    teacher = torch.eye(3)[torch.tensor([0, 1, 2, 2, 1, 1, 0])]
    network = torch.eye(3)[torch.tensor([0, 1, 2, 0, 1, 0, 0])]
    found = judge(
        *prepared, lambda images: {TEACHER: teacher[numbers(images)], "network": network[numbers(images)]}
    ).figures
    assert found["network"].agreement == pytest.approx(500 / 7) and found[TEACHER].agreement is None


def test_the_calibration_error_is_a_weighted_gap_of_bins():
    # bin 10 (0.6, 0.667]: two images, one right: |0.5 - 0.62|; bin 14 (0.867, 0.933]: one, wrong: |0 - 0.9|
    confidence, right = torch.tensor([0.61, 0.63, 0.9]), torch.tensor([1.0, 0.0, 0.0])
    assert calibration_error(confidence, right) == pytest.approx((2 * 0.12 + 0.9) / 3)
    # a bound belongs to the bin below it: 0.6 = 9/15 is in bin 9, not with 0.61 in bin 10
    confidence, right = torch.tensor([0.6, 0.61], dtype=torch.float64), torch.tensor([1.0, 0.0])
    assert calibration_error(confidence, right) == pytest.approx((0.4 + 0.61) / 2)
    assert calibration_error(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0])) == 0
    assert calibration_error(torch.tensor([0.0]), torch.tensor([0.0])) == 0


def test_the_confidence_is_that_of_the_softmax(prepared):
    logits = torch.tensor([math.log(3.0), 0.0])  # 3/4 and 1/4
    found = judge(*prepared, lambda images: {"n": logits.expand(len(images), 2)}).figures["n"]
    assert found.confidence == pytest.approx(0.75) and found.ece == pytest.approx(0.75 - 2 / 7)


def firing_rates(accelerator, loader, snn):
    return judge(accelerator, loader, lambda images: {"snn": snn(images)}, snn).firing_rates


@pytest.mark.parametrize(("threshold", "rate"), [(1.0, 1.0), (2.0, 0.5), (4.0, 0.25), (5.0, 0.0)])
def test_the_firing_rate_is_spikes_per_neuron_and_step(prepared, threshold, rate):
    assert firing_rates(*prepared, snn_of(threshold)) == pytest.approx({"1": rate})


def test_the_firing_rate_of_a_neuron_that_runs_twice_is_a_mean_of_its_calls(prepared):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.head = nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Linear(2, 3)
            nn.init.zeros_(self.conv.weight)
            nn.init.ones_(self.conv.bias)

        def forward(self, x):
            return self.head(self.act(self.act(self.conv(x))).mean((2, 3)))

    snn = spiking_twin(Twice().eval(), 4, NeuronConfig(leak=1.0, threshold=1.0), input_size=(2, 4, 4))
    assert firing_rates(*prepared, snn) == pytest.approx({"act": 1.0})


def test_a_spike_of_dsr_counts_once_however_large_it_is(prepared):
    snn = create_snn(
        "resnet18_cifar", 3, 4, 2, algorithm="dsr", width=8, dsr=DSRConfig(threshold=2.0, alpha=0.5)
    ).eval()
    for name in ("conv0.0", "conv0.1"):
        nn.init.zeros_(snn.get_submodule(name).weight)
    nn.init.ones_(snn.conv0[1].bias)  # a current of 1 in each step against a firing level of 0.5 * 2: spikes of 2
    rates = firing_rates(*prepared, snn)
    # v: 1 -> spike, -1; 0; 1 -> spike, -1; 0: every second step
    assert (
        rates["conv0.2"] == pytest.approx(0.5) and len(rates) == 17 and all(0 <= rate <= 1 for rate in rates.values())
    )


def test_frames_of_events_are_counted_by_their_labels():
    accelerator = Accelerator(cpu=True)
    frames = [(torch.zeros(4, 3, 2, 4, 4), torch.tensor([0, 2, 2])), (torch.zeros(4, 1, 2, 4, 4), torch.tensor([2]))]
    assert firing_rates(accelerator, frames, snn_of(2.0)) == pytest.approx({"1": 0.5})
