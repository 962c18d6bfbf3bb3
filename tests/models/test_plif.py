"""The learned leak: its rate rule against backpropagation through time, its network against SpikingJelly's."""

import math

import pytest
import torch
from reference import Reference, SpikingJellyNetwork, StepwiseReference, assert_same_training, train_once
from spikingjelly.activation_based.neuron import ParametricLIFNode
from torch import nn
from toy_networks import TOYS, Residual, generic, spiking, without_norms

from models import NeuronConfig, SpikeTrain, SpikingNeuron, create_snn, set_algorithm

RESETS = [("soft", True), ("soft", False), ("hard", True), ("hard", False)]
each_reset = pytest.mark.parametrize(("reset", "detach_reset"), RESETS)


def plif(**config):
    return NeuronConfig(**{"leak": 0.6, "learnable_leak": True, "threshold": 0.8, **config})


def images(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# -- one layer ----------------------------------------------------------------------------------------


def test_the_leak_starts_where_it_is_told():
    """1 - sigmoid(w): w = 0 is one half, w = log 4 is 0.2."""
    assert SpikingNeuron(plif(leak=0.5)).w.item() == 0
    neuron = SpikingNeuron(plif(leak=0.2))
    assert neuron.w.item() == pytest.approx(math.log(4)) and neuron.leak.item() == pytest.approx(0.2)
    with torch.no_grad():
        neuron.w.fill_(math.log(1 / 3))
    assert neuron.leak.item() == pytest.approx(0.75)
    assert SpikingNeuron(NeuronConfig(leak=0.2)).leak == 0.2 and list(SpikingNeuron().parameters()) == []


def test_the_gradient_of_two_steps_by_hand():
    """c = (1, 1/2), leak 1/2, threshold 2: u = (1, 1), du_2/dleak = v_1 = 1, dleak/dw = -1/4."""
    neuron = SpikingNeuron(plif(leak=0.5, threshold=2.0)).double()
    stream = torch.tensor([1.0, 0.5], dtype=torch.float64).view(2, 1, 1)
    neuron(SpikeTrain.from_stream(stream, "rate")).rate.sum().backward()
    g = 1 / (1 + math.exp(4))
    assert neuron.w.grad.item() == pytest.approx(-1 / 4 * 4 * g * (1 - g) / 2, rel=1e-13)


@each_reset
@pytest.mark.parametrize("timesteps", [1, 2, 7])
@pytest.mark.parametrize("leak", [0.2, 0.9])
def test_of_a_layers_mean_rate_the_rule_is_exact(leak, timesteps, reset, detach_reset):
    """w, and a current that is the same at each step, on top of currents that are not."""
    neuron = SpikingNeuron(plif(leak=leak, reset=reset, detach_reset=detach_reset)).double()
    currents, constant = images(timesteps, 3, 4, 5, 5) + 0.3, images(3, 4, 5, 5).requires_grad_()
    weights, gradients = images(3, 4, 5, 5), []
    for kind in ("rate", "graph"):
        rate = neuron(SpikeTrain.from_stream(currents + constant, kind)).rate
        gradients.append(torch.autograd.grad((rate.square() * weights).sum(), [neuron.w, constant], retain_graph=True))
        assert 0.1 < rate.mean() < 0.9
    (w, c), (w_exact, c_exact) = gradients
    assert c_exact.norm() > 0.01 and (w_exact.abs() > 1e-3 or timesteps == 1)
    torch.testing.assert_close(w, w_exact, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(c, c_exact, rtol=1e-11, atol=1e-14)


@each_reset
@pytest.mark.parametrize("kind", ["plain", "rate", "graph"])
def test_it_fires_as_spikingjellys_node(kind, reset, detach_reset):
    config = plif(reset=reset, detach_reset=detach_reset)
    ours = SpikingNeuron(config).double()
    theirs = jelly(config)
    with torch.no_grad():
        ours.w.fill_(-0.7)
        theirs.w.fill_(-0.7)
    currents = images(6, 3, 4)
    assert torch.equal(ours(SpikeTrain.from_stream(currents, kind)).stream, theirs(currents))
    fixed = SpikingNeuron(NeuronConfig(leak=0.6, threshold=0.8, reset=reset)).double()
    assert not torch.equal(fixed(SpikeTrain.from_stream(currents, kind)).stream, theirs(currents))


def jelly(config):
    from spikingjelly.activation_based import surrogate

    return ParametricLIFNode(
        init_tau=1 / (1 - config.leak),
        decay_input=False,
        v_threshold=config.threshold,
        v_reset=None if config.reset == "soft" else 0.0,
        surrogate_function=surrogate.Sigmoid(alpha=config.alpha),
        detach_reset=config.detach_reset,
        step_mode="m",
    ).double()


def test_step_by_step_it_is_the_whole_train():
    neuron = SpikingNeuron(plif()).double()
    currents = images(5, 3, 4)
    whole = neuron(SpikeTrain.from_stream(currents, "plain")).stream
    assert torch.equal(torch.stack([neuron(current) for current in currents]), whole)


# -- networks -----------------------------------------------------------------------------------------


@each_reset
@pytest.mark.parametrize("toy", ["Residual", "SharedNeuron", "Sums"])
def test_without_batch_norm_all_rate_rules_are_the_reference(toy, reset, detach_reset):
    network = without_norms(TOYS[toy](plif(reset=reset, detach_reset=detach_reset)).double())
    x, reference = images(4, 3, 8, 8), Reference(network, 4)
    expected = train_once(reference, reference.network, x)
    assert sum(name.endswith(".w") for name in expected.gradients) == sum(
        isinstance(m, SpikingNeuron) for m in network.modules()
    )
    for algorithm in ("rate_m", "rate_s"):
        ours = spiking(network, 4, algorithm)
        assert_same_training(train_once(ours, ours, x), expected)


@each_reset
def test_with_batch_norm_each_rate_rule_is_its_reference(reset, detach_reset):
    network, x = generic(Residual(plif(reset=reset, detach_reset=detach_reset))), images(6, 3, 11, 11)
    for algorithm, literal in (("rate_m", Reference), ("rate_s", StepwiseReference)):
        ours, reference = spiking(network, 3, algorithm), literal(network, 3)
        assert_same_training(train_once(ours, ours, x), train_once(reference, reference.network, x))


@each_reset
@pytest.mark.parametrize("toy", ["Residual", "SharedNeuron", "Norms"])
def test_bptt_is_spikingjellys_network(toy, reset, detach_reset):
    network, x = generic(TOYS[toy](plif(reset=reset, detach_reset=detach_reset))), images(4, 3, 8, 8)
    ours, theirs = spiking(network, 4, "bptt"), SpikingJellyNetwork(network, 4)
    assert_same_training(train_once(ours, ours, x), train_once(theirs, theirs.network, x))


@pytest.mark.parametrize("algorithm", ["rate_m", "rate_s", "bptt"])
def test_a_step_of_training_moves_every_leak(algorithm):
    snn = create_snn("resnet18_cifar", width=8, timesteps=3, neuron=plif(), algorithm=algorithm)
    leaks = {name: p for name, p in snn.named_parameters() if name.endswith(".w")}
    assert len(leaks) == 17
    snn(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite() for p in leaks.values())
    assert sum(p.grad.abs() > 0 for p in leaks.values()) >= 15


def test_a_frozen_leak_gets_no_gradient_and_changes_no_other():
    network, x = generic(Residual(plif())), images(2, 3, 8, 8)
    for algorithm in ("rate_m", "rate_s", "bptt"):
        learned, frozen = spiking(network, 3, algorithm), spiking(network, 3, algorithm)
        for name, p in frozen.named_parameters():
            p.requires_grad_(not name.endswith(".w"))
        first, second = train_once(learned, learned, x), train_once(frozen, frozen, x)
        for name, gradient in second.gradients.items():
            assert gradient is None if name.endswith(".w") else torch.equal(gradient, first.gradients[name])


# -- types and refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["rate_m", "rate_s", "bptt"])
def test_autocast_leaves_the_leaks_gradient_in_float32(algorithm):
    snn = spiking(generic(Residual(plif())).float(), 3, algorithm)
    with torch.autocast("cpu", torch.bfloat16):
        logits = snn(torch.randn(4, 3, 8, 8))
    logits.float().square().sum().backward()
    leaks = [p for name, p in snn.named_parameters() if name.endswith(".w")]
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite() and p.grad != 0 for p in leaks)


def test_an_if_neuron_has_no_leak_to_learn():
    with pytest.raises(ValueError, match=r"leak must be below 1 where it is learned, found 1\.0"):
        NeuronConfig(leak=1.0, learnable_leak=True)


@pytest.mark.parametrize("algorithm", ["ottt", "sltt"])
def test_an_online_algorithm_refuses_to_learn_a_leak(algorithm):
    with pytest.raises(ValueError, match=f"{algorithm} cuts the graph between steps.*learnable_leak=false"):
        create_snn("resnet18_cifar", width=4, neuron=plif(), algorithm=algorithm)
    snn = spiking(nn.Sequential(SpikingNeuron(plif()), nn.Flatten(1), nn.Linear(3, 2)), 2)
    with pytest.raises(ValueError, match="learnable_leak=false"):
        set_algorithm(snn, algorithm)
    assert snn.algorithm == "rate_m" and snn(torch.randn(2, 3, 1, 1)).requires_grad
