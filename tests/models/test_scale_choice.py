"""Scales and shifts worked out by hand."""

import pytest
import torch

from models.scale_choice import RATIOS, choose, error_behind


def test_spikes_of_a_shortcut_are_worth_enough_for_the_neurons_behind():
    """Very many steps: the rate is the current, up to 1. The layer alone would be exact with c = 2; with s = 2 the
    next neuron could not tell 2, 3 and 4 apart."""
    activation, later = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [2.0], [3.0], [4.0]])

    def chosen(percentiles, **kwargs):
        return choose(activation[None], activation, lambda i: i[0].clamp(0, 1), percentiles, (0.0,), **kwargs)

    assert chosen((50.0, 100.0)).input_scale.item() == 2
    for percentiles in ((50.0, 100.0), (100.0,)):
        choice = chosen(percentiles, behind=[later])
        assert choice.input_scale.item() == choice.spike_value.item() == 4 and choice.error == 0


def test_the_shift_rounds_where_the_neuron_would_floor():
    """Two steps, c = 8: 0, 2, 4, 6, 8 are 0, 1/2, 1, 3/2 and 2 thresholds in all."""
    activation = torch.tensor([[0.0], [2.0], [4.0], [6.0], [8.0]])
    current = activation[None]

    def rate(current):  # of an integrate-and-fire neuron on a constant current
        return (2 * current[0]).floor().clamp(0, 2) / 2

    # floor: rates 0, 0, 1/2, 1/2, 1 -> s = (2 + 3 + 8) / 1.5; round: 0, 1/2, 1/2, 1, 1 -> s = (1 + 2 + 6 + 8) / 2.5
    floor = choose(current, activation, rate, (100,), (0.0,))
    assert floor.spike_value.item() == pytest.approx(13 / 1.5)
    assert floor.error == pytest.approx((120 - 13**2 / 1.5) / 120, abs=1e-6)
    both = choose(current, activation, rate, (100,), (0.0, 0.25))
    assert both.shift.item() == 0.25 and both.spike_value.item() == pytest.approx(17 / 2.5)
    assert both.error == pytest.approx((120 - 17**2 / 2.5) / 120, abs=1e-6)


def test_a_leaky_neuron_is_scaled_down_and_shifted():
    """Leak 1/2, four steps: currents of 1/4, 1/2 and 3/4 of the threshold fire 0, 0 and 2 times."""
    activation = torch.arange(5.0, dtype=torch.float64)[:, None]

    def fires(current):
        v, rate = torch.zeros_like(current[0]), 0.0
        for _ in range(4):
            v = v / 2 + current[0]
            spike = (v >= 1).to(v)
            v, rate = v - spike, rate + spike / 4
        return rate

    plain = choose(activation[None], activation, fires, (100.0,), (0.0,))
    assert plain.error == pytest.approx((30 - 5.5**2 / 1.25) / 30)
    # 1.6 times the largest, shifted by 1/2: 0.5, 0.656, 0.8125, 0.969 and 1.125 fire 0, 1, 2, 3 and 4 times
    found = choose(activation[None], activation, fires, (100.0, 160.0), (0.0, 0.5))
    assert (found.input_scale.item(), found.shift.item(), found.percentile.item()) == (6.4, 0.5, 160)
    assert found.spike_value.item() == pytest.approx(4) and found.error == pytest.approx(0, abs=1e-12)


def test_neurons_behind_choose_a_shift_of_their_own():
    later = torch.tensor([[0.9], [1.9], [2.9], [4.0]], dtype=torch.float64)

    def fires(current):
        return (4 * current[0]).floor().clamp(0, 4) / 4

    # a spike is worth 4. Floor: rates 0, 1/4, 1/2, 1; with 1/8 before it they are 1/4, 1/2, 3/4, 1
    energy, floor, rounded = 28.83, 28.83 - 5.925**2 / 1.3125, 28.83 - 7.35**2 / 1.875
    value = torch.tensor([4.0], dtype=torch.float64)
    error = error_behind([later], fires, (0.0,), 1.0)
    assert error(value).item() == pytest.approx(floor / energy)
    assert error_behind([later, later], fires, (0.0, 0.125), 1.0)(value).item() == pytest.approx(rounded / energy)
    # between two ratios linear in the logarithm; the last ones beyond the table
    ends = [error(4 * torch.tensor([ratio], dtype=torch.float64)) for ratio in (1.0, 2**0.5, 2**0.25)]
    assert ends[0] != ends[1] and ends[2].item() == pytest.approx((ends[0] + ends[1]).item() / 2)
    assert error(1000 * value) == error(RATIOS[-1] * value) and error(value / 1000) == error(RATIOS[0] * value)


def test_each_channel_has_its_own_percentile_and_silent_ones_the_largest_of_the_layer():
    """Two steps: an outlier of channel 0 is better cut off, channel 1 is best whole, channel 2 is silent."""
    activation = torch.tensor([[1.0, 2.0, 0.0]] * 9 + [[4.0, 2.0, 0.0]])
    choice = choose(activation[None], activation, lambda i: (i[0] >= 1).float(), (50.0, 100.0), (0.0,))
    # c = 1: s = 13 / 10, error 25 - 16.9; c = 4: only the outlier fires, s = 4, error 9
    assert choice.input_scale.tolist() == [1, 2, 4] and choice.percentile[0] == 50
    assert choice.spike_value.tolist() == pytest.approx([1.3, 2, 4])
    assert choice.error == pytest.approx((25 - 16.9) / (25 + 40), abs=1e-6)
