"""A trained network is a SpikingJelly network: one call a step on plain tensors, state in the neurons."""

import pytest
import torch
from spikingjelly.activation_based import functional
from toy_networks import TOYS, Residual, calibrated, generic, spiking

from models import NeuronConfig, SpikingNeuron, create_snn

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@torch.no_grad()
def step_by_step(snn, images, timesteps):
    functional.set_step_mode(snn, "s")
    logits = torch.stack([snn(images) for _ in range(timesteps)]).mean(0)
    functional.reset_net(snn)
    functional.set_step_mode(snn, "m")
    return logits


@pytest.mark.parametrize("reset", ["soft", "hard"])
@pytest.mark.parametrize("toy", sorted(set(TOYS) - {"SharedNeuron"}))
def test_steps_by_hand_are_the_whole_call(toy, reset):
    network = generic(TOYS[toy](NeuronConfig(leak=0.5, reset=reset, threshold=0.7)))
    snn = spiking(network, 5)
    if toy == "Norms":  # it has a norm without running statistics: those of one step are not those of all
        snn.features[4] = torch.nn.Identity()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    whole = calibrated(snn, images)(images)
    torch.testing.assert_close(step_by_step(snn, images, 5), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(snn(images), whole, rtol=0, atol=0)


def test_steps_by_hand_on_the_papers_resnet18():
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    snn = calibrated(create_snn("resnet18_cifar", timesteps=4).double(), images)
    whole = snn(images)
    torch.testing.assert_close(step_by_step(snn, images, 4), whole, rtol=1e-12, atol=1e-12)


def test_frames_one_by_one_are_the_whole_call():
    frames = torch.randn(3, 2, 3, 8, 8, dtype=torch.float64)
    snn = calibrated(spiking(generic(Residual(NeuronConfig(leak=0.5))), 3), frames)
    functional.set_step_mode(snn, "s")
    with torch.no_grad():
        by_hand = torch.stack([snn(frame) for frame in frames]).mean(0)
    functional.reset_net(snn)
    functional.set_step_mode(snn, "m")
    torch.testing.assert_close(snn(frames), by_hand, rtol=1e-12, atol=1e-12)


def test_one_step_gives_that_steps_logits_and_leaves_a_state():
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    snn = calibrated(spiking(generic(Residual(NeuronConfig(leak=1.0))), 4), images)
    functional.set_step_mode(snn, "s")
    with torch.no_grad():
        first, second = snn(images), snn(images)
    assert not torch.equal(first, second)
    assert all(m.v.shape[0] == 2 for m in snn.modules() if isinstance(m, SpikingNeuron))
    functional.reset_net(snn)
    with torch.no_grad():
        assert torch.equal(snn(images), first)
    functional.reset_net(snn)
    snn.timesteps = 1
    functional.set_step_mode(snn, "m")
    torch.testing.assert_close(snn(images), first, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("algorithm", ["rate_m", "bptt"])
def test_no_call_leaves_a_state_to_the_next(algorithm):
    snn = spiking(generic(Residual(NeuronConfig(leak=1.0))), 3, algorithm)
    images, other = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(5, 3, 8, 8, dtype=torch.float64)
    calibrated(snn, images)
    for module in snn.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    for mode in (True, False):
        snn.train(mode)
        first = snn(images)
        assert torch.equal(snn(images), first)
        snn(other).sum()
        assert torch.equal(snn(images), first)
    assert all(m.v == 0.0 for m in snn.modules() if isinstance(m, SpikingNeuron))


def test_a_state_left_by_hand_does_not_leak_into_a_whole_call():
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    snn = calibrated(spiking(generic(Residual(NeuronConfig(leak=1.0))), 3), images)
    first = snn(images)
    functional.set_step_mode(snn, "s")
    with torch.no_grad():
        snn(torch.randn(7, 3, 8, 8, dtype=torch.float64))
    functional.set_step_mode(snn, "m")
    assert torch.equal(snn(images), first)
