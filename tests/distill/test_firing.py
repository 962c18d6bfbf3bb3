"""Firing rates of each image, and of a step of training, against spikes that are counted by hand."""

import pytest
import torch
from torch import nn
from toy_networks import TOYS, calibrated, generic, spiking, whole_and_stepped

import models
from distill.firing import ImageRates
from distill.meters import neuron_layers, recorded_rates

T = 5


class Shared(nn.Module):
    """Its neuron runs twice a step: it fires where the input is 1, and then where two steps of that add up to 2."""

    def __init__(self):
        super().__init__()
        self.fire = models.SpikingNeuron(models.NeuronConfig(leak=1.0, threshold=1.0))

    def forward(self, x):
        return (0.5 * self.fire(0.5 * self.fire(x))).mean((2, 3))


def spikes_of(network, name, run):
    """(T, B, N) of a layer that has one place, whatever its calls."""
    seen = []
    hook = lambda m, a, out: seen.append(out.stream.flatten(2))  # noqa: E731
    handle = neuron_layers(network)[name].register_forward_hook(hook)
    run()
    handle.remove()
    return torch.cat(seen)


@torch.no_grad()
def test_a_layer_of_two_places_has_the_mean_over_both():
    frames = torch.zeros(4, 2, 1, 2, 2, dtype=torch.float64)
    frames[:, 0, 0, 0, 0] = 1  # the first image: one of four neurons fires at 4 of 4 steps, then at 2 of 4
    frames[:2, 1] = 1  # the second: all fire at 2 of 4 steps, then at one
    snn = spiking(Shared(), 4, in_chans=1).eval()
    rates = ImageRates(snn)
    with rates.recorded():
        snn(frames)
    assert rates.names == ["fire"]
    assert rates.of_images()[:, 0].tolist() == [(4 + 2) / (2 * 4 * 4), (2 + 1) / (2 * 4)]
    with rates.recorded():  # the same a step at a time, and nothing is left of the pass before
        for _ in snn.steps(frames):
            pass
    assert rates.of_images()[:, 0].tolist() == [(4 + 2) / (2 * 4 * 4), (2 + 1) / (2 * 4)]


@torch.no_grad()
def test_only_the_steps_that_ran_count():
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    snn = calibrated(spiking(generic(TOYS["Residual"](models.NeuronConfig())), T), images)
    rates, steps = ImageRates(snn), snn.steps(images)
    with rates.recorded():
        for _ in range(2):
            next(steps)
    spikes = spikes_of(snn, "2.spike1", lambda: snn(images))
    found = dict(zip(rates.names, rates.of_images().T, strict=True))["2.spike1"]
    assert found.tolist() == pytest.approx(spikes[:2].mean((0, 2)).tolist())
    assert not torch.allclose(spikes[:2].mean((0, 2)), spikes.mean((0, 2)))


@pytest.mark.parametrize("toy", ["Residual", "SharedNeuron"])
@torch.no_grad()
def test_a_part_that_runs_a_step_at_a_time_fires_as_in_a_whole_pass(toy):
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    found = {}
    for network in whole_and_stepped(toy, T, images):
        rates = ImageRates(network)
        with rates.recorded(), recorded_rates(network) as of_batch:
            network(images)
        names = [name.removeprefix("inner.") for name in rates.names]
        found[type(network)] = names, rates.of_images(), torch.stack(list(of_batch.values()))
        assert of_batch.keys() == set(rates.names)
    (names, whole, batch), (stepped_names, stepped, stepped_batch) = found.values()
    assert names == stepped_names and (whole > 0).all() and not whole[0].equal(whole[1])
    torch.testing.assert_close(stepped, whole)
    torch.testing.assert_close(stepped_batch, batch)
    torch.testing.assert_close(whole.mean(0), batch)


def test_rates_recorded_in_training_a_step_at_a_time_are_those_of_its_steps():
    """rate_s: its last traversal, that of the rates, is no time step."""
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    snn = calibrated(spiking(generic(TOYS["Residual"](models.NeuronConfig())), T), images)
    found = {}
    for algorithm in ("rate_m", "rate_s"):
        models.set_algorithm(snn.train(), algorithm)
        for norm in snn.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()
        with recorded_rates(snn) as rates:
            snn(images)
        found[algorithm] = torch.stack(list(rates.values()))
    torch.testing.assert_close(found["rate_s"], found["rate_m"])
