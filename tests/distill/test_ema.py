"""The average of the weights, against the recursion written out."""

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from toy_training import config_of, train

from distill import loop
from distill.ema import WeightAverage


def network():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()


def moved(network, number):
    with torch.no_grad():
        for value in network.state_dict().values():
            value.copy_(value + number if value.is_floating_point() else value + 1)


def test_the_average_follows_its_recursion():
    net = network()
    average = WeightAverage(net, 0.5)
    expected = net[0].weight.detach().clone()
    for step, number in enumerate([1.0, -3.0, 2.0, 5.0, 1.0, 1.0, 1.0, 1.0, 1.0], 1):
        moved(net, number)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))  # 2/11, 3/12, ... up to 9/18 at step 8
        expected = decay * expected + (1 - decay) * net[0].weight.detach()
    own = {name: value.clone() for name, value in net.state_dict().items()}
    with average.in_use():
        torch.testing.assert_close(net[0].weight.detach(), expected, rtol=0, atol=1e-14)
        assert net[1].num_batches_tracked == own["1.num_batches_tracked"]
        assert not torch.equal(net[1].running_mean, own["1.running_mean"])
    assert all(torch.equal(value, own[name]) for name, value in net.state_dict().items())
    average.give()
    torch.testing.assert_close(net[0].weight.detach(), expected, rtol=0, atol=1e-14)


def test_it_is_timms_average():
    net = network()
    average, other = WeightAverage(net, 0.05), ModelEmaV3(net, decay=0.05)  # below 2/11: no rise of the decay
    for number in (1.0, -2.0, 0.5):
        moved(net, number)
        average.update()
        other.update(net)
    average.give()
    for name, value in other.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(net.state_dict()[name], value, rtol=0, atol=1e-14)


def test_it_travels_through_a_file(tmp_path):
    net = network()
    average = WeightAverage(net, 0.9)
    moved(net, 1.0)
    average.update()
    average.save(tmp_path / "a.safetensors")
    again = WeightAverage(network(), 0.9)
    again.load(tmp_path / "a.safetensors", average.steps)
    with again.in_use(), average.in_use():
        assert again.steps == 1
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                assert torch.equal(again._network.state_dict()[name], value)


def test_the_network_comes_back_after_an_error():
    net = network()
    average = WeightAverage(net, 0.9)
    moved(net, 1.0)
    own = net[0].weight.detach().clone()
    with pytest.raises(KeyError), average.in_use():
        raise KeyError
    assert torch.equal(net[0].weight, own)


def test_the_processes_share_the_averages_running_statistics_in_the_end(tmp_path, monkeypatch):
    model, shared = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3)).double(), []
    monkeypatch.setattr(loop, "share_norms", lambda network: shared.append(network[1].running_mean.clone()))
    trained, _ = train(tmp_path / "averaged", config_of(ema=0.9, epochs=2), model)
    assert len(shared) == 1 and torch.equal(shared[0], trained[1].running_mean)
    train(tmp_path / "plain", config_of())
    assert len(shared) == 1  # DDP's forward passes of the last evaluation have done it
