"""When an image stops, by hand."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from toy_networks import spiking
from toy_teachers import images_of, student_of, teacher_of

from distill import HybridDistiller
from distill.early_exit import cumulative_logits, early_exit, exit_step
from distill.hybrid_network import running_mean
from models import NeuronConfig, SpikingNeuron


def test_the_running_mean_is_over_the_steps_so_far():
    stream = torch.tensor([1.0, 0.0, 5.0]).view(3, 1, 1)
    assert running_mean(stream).flatten().tolist() == [1.0, 0.5, 2.0]


def of_margin(margin):
    """Two logits whose probabilities differ by `margin`: p1 = (1 + m) / 2."""
    return [math.log((1 + margin) / (1 - margin)), 0.0]


def test_an_image_stops_at_the_first_step_that_is_sure_and_at_the_last_in_any_case():
    # margins of three images after each of three steps
    margins = [[0.9, 0.1, 0.2], [0.1, 0.5, 0.3], [0.95, 0.9, 0.4]]
    logits = torch.tensor([[of_margin(m) for m in row] for row in margins], dtype=torch.float64)
    assert exit_step(logits, 0.4).tolist() == [1, 2, 3]
    assert exit_step(logits, 0.45).tolist() == [1, 2, 3] and exit_step(logits, 0.6).tolist() == [1, 3, 3]
    assert exit_step(logits, 0.93).tolist() == [3, 3, 3]


class Counts(nn.Module):
    """Class 1 gets a logit of 8 at each step from the second on, class 0 one of 2 at each step."""

    def __init__(self):
        super().__init__()
        self.fire = SpikingNeuron(NeuronConfig(leak=1.0, threshold=1.0))
        self.head = nn.Linear(1, 2)
        self.head.weight.data, self.head.bias.data = torch.tensor([[0.0], [8.0]]), torch.tensor([2.0, 0.0])

    def forward(self, x):
        return self.head(self.fire(x).flatten(1))


def test_accuracy_and_steps_of_each_threshold():
    frames = torch.tensor([0.0, 1.0, 1.0, 1.0]).view(4, 1, 1, 1, 1).expand(4, 3, 1, 1, 1)
    snn = spiking(Counts(), 4, in_chans=1).eval()
    loader = [(frames, torch.tensor([1, 1, 0]))]
    # mean logits of class 1 less class 0: -2, 2, 10/3, 4; margins tanh of half: 0.762, 0.762, 0.931, 0.964
    rows = early_exit(Accelerator(cpu=True), loader, snn, [0.7, 0.8, 0.95, 0.99])
    assert [row["mean_steps"] for row in rows] == [1, 3, 4, 4]
    assert [row["top1"] for row in rows] == pytest.approx([100 / 3, 200 / 3, 200 / 3, 200 / 3])
    assert [row["threshold"] for row in rows] == [0.7, 0.8, 0.95, 0.99]


@pytest.mark.parametrize("family", ["resnet18", "mobilenetv2_035", "densenet121"])
def test_a_hybrids_answer_after_a_step_is_that_of_a_hybrid_with_as_many_steps(family):
    teacher = teacher_of(family, torch.float64)
    images = images_of(torch.float64)
    distiller = HybridDistiller(teacher, student_of(teacher, 3), images=images)
    hybrid = distiller.hybrid(distiller.taps[1].name).eval()
    with torch.no_grad():
        found = cumulative_logits(hybrid, images)
        for steps in (1, 2, 3):
            hybrid.timesteps = steps
            torch.testing.assert_close(found[steps - 1], hybrid(images), rtol=1e-9, atol=1e-9)
    assert (found[0] - found[2]).abs().max() > 1e-6
