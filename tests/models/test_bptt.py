"""Backpropagation through time against SpikingJelly's own nodes, and against rate_m where the two are one."""

import copy

import pytest
import torch
from reference import SpikingJellyNetwork, assert_same_training, train_once
from toy_networks import TOYS, Residual, generic, spiking

from models import NeuronConfig, create_snn, set_algorithm

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def images(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("reset", ["soft", "hard"])
@pytest.mark.parametrize("detach_reset", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("toy", sorted(TOYS))
def test_with_one_step_rate_m_is_bptt(toy, detach_reset, reset):
    network = generic(TOYS[toy](NeuronConfig(reset=reset, detach_reset=detach_reset, threshold=0.8)))
    rate, bptt = spiking(network, 1, "rate_m"), spiking(network, 1, "bptt")
    x = images(6, 3, 8, 8)
    assert_same_training(train_once(rate, rate, x), train_once(bptt, bptt, x))


def test_with_one_step_rate_m_is_bptt_on_the_papers_resnet18():
    rate = generic(create_snn("resnet18_cifar", timesteps=1))
    bptt = set_algorithm(copy.deepcopy(rate), "bptt")
    x = images(2, 3, 8, 8)
    assert_same_training(train_once(rate, rate, x), train_once(bptt, bptt, x))


@pytest.mark.parametrize("leak", [0.2, 1.0])
@pytest.mark.parametrize("reset", ["soft", "hard"])
@pytest.mark.parametrize("detach_reset", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("toy", sorted(TOYS))
def test_bptt_is_a_plain_spikingjelly_network(toy, detach_reset, reset, leak):
    neuron = NeuronConfig(leak=leak, reset=reset, detach_reset=detach_reset, threshold=0.8)
    network, x = generic(TOYS[toy](neuron)), images(6, 3, 8, 8)
    ours, theirs = spiking(network, 4, "bptt"), SpikingJellyNetwork(network, 4)
    assert_same_training(train_once(ours, ours, x), train_once(theirs, theirs.network, x))


def test_bptt_on_the_papers_resnet18_is_a_plain_spikingjelly_network():
    ours = generic(create_snn("resnet18_cifar", timesteps=4, algorithm="bptt"))
    plain = copy.deepcopy(ours)
    plain.step_mode = "s"  # one call is then the plain forward of the network's own class
    theirs, x = SpikingJellyNetwork(plain, 4), images(2, 3, 8, 8)
    assert_same_training(train_once(ours, ours, x), train_once(theirs, theirs.network, x))


def test_bptt_on_frames_is_a_plain_spikingjelly_network():
    network, x = generic(Residual(NeuronConfig(leak=0.5))), images(3, 2, 3, 8, 8)
    ours, theirs = spiking(network, 3, "bptt"), SpikingJellyNetwork(network, 3)
    assert_same_training(train_once(ours, ours, x), train_once(theirs, theirs.network, x))


class PerStep:
    """A network whose call gives the logits of each step."""

    def __init__(self, network):
        self.network = network

    def __call__(self, x):
        """(T * B, classes)."""
        network = self.network
        steps = network.per_step(x) if isinstance(network, SpikingJellyNetwork) else network(x, per_step=True)
        return steps.flatten(0, 1)


@pytest.mark.parametrize("leak", [0.5, 1.0])
@pytest.mark.parametrize("reset", ["soft", "hard"])
@pytest.mark.parametrize("toy", sorted(TOYS))
def test_each_steps_logits_and_their_gradients_are_spikingjellys(toy, reset, leak):
    """The loss weighs every step's logits otherwise, and is not linear in them."""
    neuron = NeuronConfig(leak=leak, reset=reset, detach_reset=False, threshold=0.8)
    network, x = generic(TOYS[toy](neuron)), images(4, 3, 8, 8)
    ours, theirs = spiking(network, 4, "bptt"), SpikingJellyNetwork(network, 4)
    first = train_once(PerStep(ours), ours, x)
    assert first.logits.shape == (16, 5)
    assert_same_training(first, train_once(PerStep(theirs), theirs.network, x))


def test_each_steps_logits_of_frames():
    network, x = generic(Residual(NeuronConfig(leak=0.5))), images(3, 2, 3, 8, 8)
    ours, theirs = spiking(network, 3, "bptt"), SpikingJellyNetwork(network, 3)
    assert_same_training(train_once(PerStep(ours), ours, x), train_once(PerStep(theirs), theirs.network, x))


def test_with_four_steps_rate_m_has_bptts_logits_and_statistics_and_another_gradient():
    network, x = generic(Residual(NeuronConfig(leak=0.5, threshold=0.8))), images(4, 3, 8, 8)
    rate, bptt = spiking(network, 4), spiking(network, 4, "bptt")
    ours, theirs = train_once(rate, rate, x), train_once(bptt, bptt, x)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-12, atol=1e-13)
    for name, buffer in theirs.buffers.items():
        torch.testing.assert_close(ours.buffers[name], buffer, rtol=1e-12, atol=1e-13)
    first = "0.0.weight"
    cosine = torch.cosine_similarity(ours.gradients[first].flatten(), theirs.gradients[first].flatten(), 0)
    assert 0.2 < cosine < 0.999
