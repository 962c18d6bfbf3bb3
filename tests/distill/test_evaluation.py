"""Accuracy and firing rates of networks that always answer the same."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distill import HybridOutput
from distill.evaluation import by_name, firing_rates, top1, top1_by_timesteps
from models import DSRConfig, NeuronConfig, create_snn, spiking_twin

LABELS = [0, 1, 2, 2, 2, 0, 1]  # seven images, in batches of 3, 3 and 1


@pytest.fixture
def prepared():
    accelerator = Accelerator(cpu=True)
    images = torch.arange(7.0).reshape(7, 1, 1, 1).expand(7, 2, 4, 4).contiguous()
    loader = DataLoader(TensorDataset(images, torch.tensor(LABELS)), 3)
    return accelerator, accelerator.prepare(loader)


def always(answer):
    return lambda images: nn.functional.one_hot(torch.full((len(images),), answer), 3).float()


def test_top1_is_the_percentage_over_all_images_of_each_network(prepared):
    networks = {f"answers {answer}": always(answer) for answer in range(3)}
    networks["right"] = lambda images: torch.eye(3)[torch.tensor(LABELS)[images[:, 0, 0, 0].long()]]
    found = top1(*prepared, lambda images: {name: network(images) for name, network in networks.items()})
    assert found == pytest.approx({"answers 0": 200 / 7, "answers 1": 200 / 7, "answers 2": 300 / 7, "right": 100.0})


def test_the_summary_names_each_network():
    teacher, student, hybrid = (torch.full((1, 2), float(i)) for i in range(3))
    found = by_name(HybridOutput(student, teacher, {"layer1": hybrid}))
    assert list(found) == ["teacher_top1", "hybrid_top1/layer1", "student_top1"]
    assert [value[0, 0].item() for value in found.values()] == [0.0, 2.0, 1.0]


def snn_of(threshold, timesteps=4):
    ann = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).eval()
    nn.init.zeros_(ann[0].weight)
    nn.init.ones_(ann[0].bias)  # each neuron gets a current of 1 in each step
    return spiking_twin(ann, timesteps, NeuronConfig(leak=1.0, threshold=threshold), input_size=(2, 4, 4))


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


def test_evaluation_at_other_time_steps_puts_the_students_own_back(prepared):
    snn = snn_of(threshold=2.0, timesteps=3)
    with torch.no_grad():  # class 1 with one step, when nothing has fired yet; class 2 from two on
        snn[4].weight.copy_(torch.tensor([[0.0] * 3, [0.0] * 3, [10.0] * 3]))
        snn[4].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    found = top1_by_timesteps(*prepared, snn, [1, 2, 4])
    assert found == pytest.approx({1: 200 / 7, 2: 300 / 7, 4: 300 / 7})
    assert snn.timesteps == 3
    with pytest.raises(ValueError, match="timesteps"):
        top1_by_timesteps(*prepared, snn, [1, 0])
    assert snn.timesteps == 3


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
