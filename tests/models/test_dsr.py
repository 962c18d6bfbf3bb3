"""DSR against SpikingJelly's nodes on the same network, and against its representation by hand."""

import copy

import pytest
import torch
from reference import assert_same_training, swap, train_once
from spikingjelly.activation_based import functional
from spikingjelly.activation_based.neuron import DSRIFNode, DSRLIFNode
from torch import nn
from toy_networks import Head, conv_bn, generic, spiking

from models import DSRConfig, DSRNeuron, NeuronConfig, SpikeTrain, SpikingNeuron, create_snn, set_algorithm

CONFIGS = {
    "if": DSRConfig(threshold=1.5),
    "if by default": DSRConfig(),
    "if, other constants": DSRConfig(threshold=0.8, alpha=0.9, grad_scaling=0.3, lower_bound=0.5),
    "if, below its bound": DSRConfig(threshold=0.4, lower_bound=0.4),
    "if, constant threshold": DSRConfig(threshold=1.0, learn_threshold=False),
    "lif": DSRConfig(model="lif", threshold=0.05, lower_bound=0.01),
    "lif by default": DSRConfig(model="lif"),
    "lif, other constants": DSRConfig(model="lif", threshold=0.3, alpha=0.6, tau=1.3, delta_t=0.2, grad_scaling=0.5),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))


class Small(nn.Module):
    """A residual sum, max pooling of spikes, batch norms."""

    def __init__(self, config):
        super().__init__()
        self.stem, self.spike0 = conv_bn(3, 6), DSRNeuron(config)
        self.conv1, self.spike1 = conv_bn(6, 6), DSRNeuron(config)
        self.pool = nn.MaxPool2d(2)
        self.conv2, self.spike2, self.head = conv_bn(6, 8), DSRNeuron(config), Head(8)

    def forward(self, x):
        x = self.spike0(self.stem(x))
        x = self.spike1(self.conv1(x) + x)
        return self.head(self.spike2(self.conv2(self.pool(x))))


class Folded(nn.Module):
    """SpikingJelly's node as it comes, on time folded into the batch."""

    def __init__(self, original, timesteps):
        super().__init__()
        c, self.timesteps = original.config, timesteps
        lif = c.model == "lif"
        arguments = dict(v_threshold_training=c.learn_threshold, v_threshold_grad_scaling=c.grad_scaling)
        if c.lower_bound is not None:
            arguments["v_threshold_lower_bound"] = c.lower_bound
        arguments |= {} if c.threshold is None else {"v_threshold": c.threshold}
        arguments |= {} if c.alpha is None else {"alpha": c.alpha}
        arguments |= {"tau": c.tau, "delta_t": c.delta_t} if lif else {}
        self.node = (DSRLIFNode if lif else DSRIFNode)(T=timesteps, **arguments)
        if c.learn_threshold:
            assert torch.equal(self.node.v_threshold.to(original.node.v_threshold.dtype), original.node.v_threshold)
            self.node.v_threshold = original.node.v_threshold

    def forward(self, x):
        spikes = self.node(x.unflatten(0, (self.timesteps, -1))).flatten(0, 1)
        return spikes.to(x.dtype)  # SpikingJelly's are always in float32


class Reference:
    def __init__(self, network, timesteps):
        self.timesteps = timesteps
        self.network = swap(copy.deepcopy(network), {"DSRNeuron": Folded}, timesteps)

    def __call__(self, images):
        frames = images if images.ndim == 5 else images.expand(self.timesteps, *images.shape)
        return self.network(frames.flatten(0, 1)).unflatten(0, (self.timesteps, -1)).mean(0)


def images(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def small(config=None):
    return generic(Small(config or DSRConfig(threshold=1.5)))


def train_parts(call, network, x):
    """`train_once`; thresholds that no neuron reaches have a gradient of nought on both sides."""
    training = train_once(call, network, x)
    thresholds = {n: training.gradients.pop(n) for n in list(training.gradients) if "threshold" in n}
    return training, thresholds


@pytest.mark.parametrize("frames", [False, True], ids=["image", "frames"])
@each_config
def test_it_trains_as_spikingjellys_nodes(config, frames):
    network, x = small(config), 3 * (images(5, 4, 3, 8, 8) if frames else images(4, 3, 8, 8))
    if config.model == "lif":  # its representation is clipped at threshold * tau / delta_t
        with torch.no_grad():
            for norm in network.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.weight.mul_(3)
    ours, reference = spiking(network, 5, "dsr"), Reference(network, 5)
    (first, thresholds), (second, wanted) = train_parts(ours, ours, x), train_parts(reference, reference.network, x)
    assert_same_training(first, second, 1e-12)
    assert len(wanted) == 3 * config.learn_threshold
    for name, gradient in wanted.items():
        torch.testing.assert_close(thresholds[name], gradient, rtol=1e-12, atol=0)
    if config in (CONFIGS["if"], CONFIGS["if, other constants"], CONFIGS["lif"]):
        assert all(gradient != 0 for gradient in wanted.values())


def test_the_gradient_of_one_neuron_by_hand():
    """The mean current is passed on between 0 and the threshold; above it the threshold gets the gradient."""
    neuron = DSRNeuron(DSRConfig(threshold=2.0, grad_scaling=0.5)).double()
    stream = torch.tensor([[0.5, 3.0, -0.2, 4.0], [1.5, 3.0, -0.4, 1.0]], dtype=torch.float64).view(2, 1, 4)
    out = neuron(SpikeTrain.from_stream(stream.requires_grad_(), "graph"))
    # fires at 1 (half of it) and each spike is 2: u = 0.5, 2.0 -> 0; 3 -> 1, 4 -> 2; never; 4 -> 2, 3 -> 1
    assert out.stream.tolist() == [[[0, 2, 0, 2]], [[2, 2, 0, 2]]]
    (out.rate * torch.tensor([1.0, 2.0, 3.0, 5.0])).sum().backward()
    # the means are 1, 3, -0.3 and 2.5: one below the threshold, two above it, one below nought; 1/T for each step
    assert stream.grad.tolist() == [[[0.5, 0, 0, 0]]] * 2
    assert neuron.node.v_threshold.grad.item() == pytest.approx(0.5 * (2 + 5))


@each_config
def test_another_number_of_steps_needs_no_other_network(config):
    network, x = small(config), images(4, 3, 8, 8)
    ours = spiking(network, 5, "dsr").eval()
    for timesteps in (5, 2, 9):
        ours.timesteps = timesteps
        logits, wanted = ours(x), Reference(network.eval(), timesteps)(x)
        assert not logits.requires_grad
        torch.testing.assert_close(logits, wanted, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(ours(x, per_step=True).mean(0), logits, rtol=1e-12, atol=1e-13)


def test_training_at_another_number_of_steps():
    network, x = small(), images(4, 3, 8, 8)
    ours = spiking(network, 5, "dsr")
    ours(x).sum().backward()
    ours.load_state_dict(network.state_dict())
    ours.timesteps = 3
    reference = Reference(network, 3)
    first, second = train_parts(ours, ours, x), train_parts(reference, reference.network, x)
    assert_same_training(first[0], second[0], 1e-12)


def test_the_images_are_left_as_they_are():
    """The stream of a constant input is an expanded view of one step: a node that writes in place would spoil it."""
    snn, x = spiking(nn.Sequential(DSRNeuron(DSRConfig(threshold=0.5)), Head(3)).double(), 4, "dsr"), images(2, 3, 8, 8)
    before = x.clone()
    snn(x).sum().backward()
    assert torch.equal(x, before)


@pytest.mark.parametrize("training", [True, False])
def test_step_by_step_it_is_refused(training):
    snn = spiking(small(), 3, "dsr").train(training)
    functional.set_step_mode(snn, "s")
    with pytest.raises(ValueError, match="DSR looks at all time steps at once: its networks do not run step by step"):
        snn(images(2, 3, 8, 8))


def test_setting_the_step_mode_back_gives_the_network_back():
    snn, x = spiking(small(), 3, "dsr").eval(), images(2, 3, 8, 8)
    logits = snn(x)
    functional.set_step_mode(snn, "s")
    functional.set_step_mode(snn, "m")
    assert torch.equal(snn(x), logits)


@pytest.mark.parametrize("algorithm", ["rate_m", "rate_s", "bptt", "ottt", "sltt"])
def test_neither_the_neurons_nor_the_algorithm_come_alone(algorithm):
    message = "dsr has neurons of its own: make the network with algorithm="
    dsr = spiking(small(), 3, "dsr")
    with pytest.raises(ValueError, match=message + f"'{algorithm}'"):
        set_algorithm(dsr, algorithm)
    assert dsr.algorithm == "dsr"
    other = create_snn("resnet18_cifar", width=4, algorithm=algorithm)
    with pytest.raises(ValueError, match=message + "'dsr'"):
        set_algorithm(other, "dsr")
    assert other.algorithm == algorithm
    with pytest.raises(ValueError, match=message):
        spiking(nn.Sequential(SpikingNeuron(NeuronConfig()), Head(3)), 2, "dsr")


def test_it_trains_in_one_call_without_logits_of_each_step():
    snn, x = spiking(small(), 3, "dsr"), images(2, 3, 8, 8)
    with pytest.raises(ValueError, match="dsr has no gradient of each step's logits"):
        snn(x, per_step=True)
    with pytest.raises(ValueError, match="dsr runs all steps in one call"):
        snn(x, step=0)


def test_a_network_by_name_has_its_neurons_in_place_of_the_others():
    snn = create_snn("resnet18_cifar", width=8, timesteps=3, algorithm="dsr", dsr=DSRConfig(threshold=2.0))
    neurons = [m for m in snn.modules() if isinstance(m, DSRNeuron)]
    assert len(neurons) == 17 and not any(isinstance(m, SpikingNeuron) for m in snn.modules())
    assert all(m.node.v_threshold == 2.0 for m in neurons)
    x = torch.randn(4, 3, 16, 16)
    snn(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in snn.parameters())
    assert not torch.equal(snn.eval()(x), torch.zeros(4, 10))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "plif"}, "model must be one of 'if', 'lif', found 'plif'"),
        ({"threshold": 0.001}, r"threshold must be at least lower_bound \(0.01\), found 0.001"),
        ({"threshold": -1.0}, "threshold must be at least"),
        ({"threshold": float("nan")}, "threshold must be at least"),
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\], found 0.0"),
        ({"alpha": 1.1}, r"alpha must be in \(0, 1\], found 1.1"),
        ({"grad_scaling": 0.0}, "grad_scaling must be above 0, found 0.0"),
        ({"lower_bound": 0.0}, "lower_bound must be above 0, found 0.0"),
        ({"lower_bound": 7.0}, "threshold must be at least lower_bound .7.0., found 6.0"),
        ({"model": "lif", "lower_bound": 2.0}, "threshold must be at least lower_bound .2.0., found 1.0"),
        ({"tau": 0.0}, "tau must be above 0, found 0.0"),
        ({"delta_t": -0.1}, "delta_t must be above 0, found -0.1"),
        ({"delta_t": float("nan")}, "delta_t must be above 0, found nan"),
    ],
    ids=str,
)
def test_constants_out_of_range_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        DSRConfig(**wrong)


def test_the_defaults_are_spikingjellys():
    for model, node in (("if", DSRIFNode()), ("lif", DSRLIFNode())):
        ours = DSRNeuron(DSRConfig(model=model)).node
        for name in ("alpha", "v_threshold_grad_scaling", "v_threshold_lower_bound"):
            assert getattr(ours, name) == getattr(node, name), (model, name)
        assert torch.equal(ours.v_threshold, node.v_threshold)
    assert (ours.tau, ours.delta_t) == (node.tau, node.delta_t)


def test_autocast_to_bfloat16():
    snn = spiking(small().float(), 3, "dsr")
    with torch.autocast("cpu", torch.bfloat16):
        logits = snn(torch.randn(4, 3, 8, 8))
    logits.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in snn.parameters())
