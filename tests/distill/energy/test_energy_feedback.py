"""Operations and firing rates of a feedback loop, whose layers run a step at a time, counted by hand."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from toy_feedback import T, one_pixel

from distill.energy import spiking_costs
from distill.energy.fan_out import fan_out
from distill.judgement import judge

HALF = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
LABEL = torch.zeros(1, dtype=torch.long)


def test_the_operations_of_a_loop_are_those_of_its_steps():
    found = spiking_costs(Accelerator(cpu=True), [(HALF, LABEL)], one_pixel())
    layers = {layer.name: layer for layer in found.whole.layers}
    sent, mapped, back, read = layers.values()
    assert list(layers) == ["loop.input_map.linear", "loop.maps.0.linear", "loop.feedback.linear", "classifier"]
    assert not sent.spiking and sent.macs == T  # the image multiplies at each step
    assert mapped.spiking and mapped.acs == 3 and mapped.bits == T * (32 + 2)  # layer 1 fires in steps 2 to 4
    # the feedback of steps 2 to 4 is made of the spikes of steps 1 to 3, of which two are there
    assert back.spiking and back.acs == 2 and back.bits == (T - 1) * (32 + 2)
    assert read.spiking and read.acs == 3 * 3 and read.bits == T * (32 * (3 + 3) + 2)  # three classes
    assert found.whole.membrane_bits == 2 * T * 2 * 32


def test_one_step_has_no_feedback():
    found = spiking_costs(Accelerator(cpu=True), [(HALF, LABEL)], one_pixel(timesteps=1))
    assert "loop.feedback.linear" not in [layer.name for layer in found.whole.layers]


def test_firing_rates_are_those_of_its_steps():
    network = one_pixel()
    found = judge(Accelerator(cpu=True), [(HALF, LABEL)], lambda images: {"student": network(images)}, network)
    assert found.firing_rates == {"loop.neurons.0": 3 / 4, "loop.neurons.1": 3 / 4}


@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "more", "dilation"), [
    (3, 3, 2, 1, 1, 1),  # the papers' way back to the first layer
    (4, 4, 2, 0, 0, 1),
    (5, 3, 1, 2, 0, 1),
    (4, 2, 3, 1, 1, 2),
])  # fmt: skip
def test_synapses_of_a_transposed_convolution_are_those_that_it_has(size, kernel, stride, padding, more, dilation):
    settings = dict(stride=stride, padding=padding, output_padding=more, dilation=dilation)
    each = torch.eye(size * size).view(-1, 1, size, size)  # a spike at each place
    reached = F.conv_transpose2d(each, torch.ones(1, 1, kernel, kernel), **settings)
    found = fan_out(
        (size, size), reached.shape[2:], (kernel,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2, transposed=True
    )
    assert torch.equal(found.flatten(), reached.sum((1, 2, 3)).double())
