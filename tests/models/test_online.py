"""OTTT and SLTT: against SpikingJelly's own chains of modules, and a residual network written out by hand."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from reference import SurrogateSpike, assert_same_training, train_each_step
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from test_network import SavedTensors
from torch import nn
from toy_networks import Residual, conv_bn, generic, spiking

from models import NeuronConfig, SpikingNeuron, create_snn, set_algorithm

T = 4
NEURONS = {
    "soft": NeuronConfig(leak=0.5, threshold=0.8),
    "soft, attached": NeuronConfig(leak=0.2, threshold=0.8, detach_reset=False),
    "hard": NeuronConfig(leak=0.6, threshold=0.8, reset="hard", alpha=2.0),
    "hard, attached": NeuronConfig(leak=0.5, threshold=0.8, reset="hard", detach_reset=False),
    "IF": NeuronConfig(leak=1.0, threshold=0.8),
}
each_neuron = pytest.mark.parametrize("config", NEURONS.values(), ids=list(NEURONS))
each_algorithm = pytest.mark.parametrize("algorithm", ["ottt", "sltt"])


def images(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def by_step(snn):
    return lambda x, t: snn(x, step=t)


# -- SpikingJelly -------------------------------------------------------------------------------------


def modules(activation):
    """Convolutions with and without a norm, both poolings of spikes, flatten, and neurons in a row of linear layers."""
    return [
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        activation(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6, momentum=0.3),
        activation(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 1, groups=2),
        activation(),
        nn.Flatten(1),
        nn.Linear(32, 12),
        activation(),
        nn.Linear(12, 5),
    ]


def chain_of(config):
    chain = generic(nn.Sequential(*modules(lambda: SpikingNeuron(config))))
    for i in (8, 11):  # no norm makes these currents large enough to fire
        nn.init.normal_(chain[i].weight, 0.1, 0.7)
    return chain


def spikingjelly_chain(ours, algorithm):
    """The same chain with SpikingJelly's containers and nodes, and the same weights."""
    node = neuron.OTTTLIFNode if algorithm == "ottt" else neuron.SLTTLIFNode
    container = layer.OTTTSequential if algorithm == "ottt" else nn.Sequential
    c = ours[2].config

    def activation():
        return node(
            tau=float("inf") if c.leak == 1 else 1 / (1 - c.leak),
            decay_input=False,
            v_threshold=c.threshold,
            v_reset=None if c.reset == "soft" else 0.0,
            surrogate_function=surrogate.Sigmoid(alpha=c.alpha),
            detach_reset=c.detach_reset,
        )

    chain = container(*modules(activation)).double()
    chain.load_state_dict(ours.state_dict())
    return chain


@pytest.mark.parametrize("frames", [False, True], ids=["image", "frames"])
@each_neuron
@each_algorithm
def test_a_chain_trains_as_spikingjellys(algorithm, config, frames):
    network = chain_of(config)
    ours, theirs = spiking(network, T, algorithm), spikingjelly_chain(network, algorithm)
    x = images(T, 6, 3, 8, 8) if frames else images(6, 3, 8, 8)
    first = train_each_step(by_step(ours), ours, x, T)
    second = train_each_step(lambda x, t: theirs(x[t] if frames else x), theirs, x, T)
    assert not torch.allclose(second.logits[0], second.logits[1])
    assert_same_training(first, second, 1e-12)
    counts = [b for name, b in first.buffers.items() if name.endswith("num_batches_tracked")]
    assert counts == [T, T]


def test_the_two_algorithms_differ_in_what_weights_see():
    network, x = chain_of(NEURONS["soft"]), images(6, 3, 8, 8)
    ottt, sltt = (train_each_step(by_step(s), s, x, T) for s in (spiking(network, T, a) for a in ("ottt", "sltt")))
    assert torch.equal(ottt.logits, sltt.logits)
    for name in ("4.weight", "8.weight", "11.weight", "13.weight"):
        assert not torch.allclose(ottt.gradients[name], sltt.gradients[name], rtol=1e-3)
    for name in ("8.bias", "13.bias", "0.weight", "images"):  # no trace stands for the images; a bias sees no spikes
        torch.testing.assert_close(ottt.gradients[name], sltt.gradients[name], rtol=1e-12, atol=1e-14)


@each_neuron
@each_algorithm
def test_logits_are_those_of_the_same_steps_under_bptt(algorithm, config):
    network = chain_of(config)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    x, online, bptt = images(3, 3, 8, 8), spiking(network, T, algorithm), spiking(network, T, "bptt")
    steps = torch.stack([online(x, step=t) for t in range(T)])
    torch.testing.assert_close(steps, bptt(x, per_step=True), rtol=1e-12, atol=1e-13)


@each_algorithm
def test_with_one_step_it_is_bptt(algorithm):
    """With one step the trace is the spikes and there is nothing to cut."""
    network, x = generic(Residual(NEURONS["soft, attached"])), images(6, 3, 8, 8)
    online, bptt = spiking(network, 1, algorithm), spiking(network, 1, "bptt")
    first = train_each_step(by_step(online), online, x, 1)
    second = train_each_step(lambda x, t: bptt(x), bptt, x, 1)
    assert_same_training(first, second, 1e-10)


# -- residuals, by hand -------------------------------------------------------------------------------


class SumsOfSpikes(nn.Module):
    """Spikes added to spikes (with a trace each), and to a current before a neuron; cat, chunk, scale and a mean."""

    def __init__(self, config):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, bias=False)
        self.conv4, self.fc = nn.Conv2d(6, 4, 1), nn.Linear(4, 5)
        self.lifs = nn.ModuleList(SpikingNeuron(config) for _ in range(4))

    def forward(self, x):
        s0 = self.lifs[0](self.conv1(x))
        s1 = self.lifs[1](self.conv2(s0))
        s2 = self.lifs[2](self.conv3(s0 + s1) + s1)
        mixed = torch.cat([s2, s1.chunk(2, 1)[0]], 1)
        s3 = self.lifs[3](self.conv4(mixed))
        return self.fc(((s3 + 0.5 * s2) + s0).mean((2, 3)))


class SumsOfSpikesByHand:
    """The same with its gradients stated: of a weight at the trace, of an input through the step's own spikes."""

    def __init__(self, network, config, with_trace):
        self.net, self.config, self.with_trace = network, config, with_trace
        self.v, self.a = [0.0] * 4, [0.0] * 4

    def lif(self, i, current):
        c = self.config
        u = c.leak * self.v[i] + current
        s = SurrogateSpike.apply(u - c.threshold, c.alpha)
        after = u - c.threshold * s if c.reset == "soft" else u * (1 - s)
        self.v[i] = after.detach()
        self.a[i] = c.leak * self.a[i] + s.detach()
        return s, self.a[i] if self.with_trace else s.detach()

    @staticmethod
    def affine(function, spikes, trace, weight, bias=None):
        of_spikes = function(spikes, weight.detach(), None if bias is None else bias)
        of_weight = function(trace, weight)
        return of_spikes + of_weight - of_weight.detach()

    def __call__(self, x, t):
        n, (conv, lin) = self.net, (F.conv2d, F.linear)
        s0, a0 = self.lif(0, conv(x, n.conv1.weight, n.conv1.bias))
        s1, a1 = self.lif(1, self.affine(conv, s0, a0, n.conv2.weight, n.conv2.bias))
        s2, a2 = self.lif(2, self.affine(conv, s0 + s1, a0 + a1, n.conv3.weight) + s1)
        mixed, trace = torch.cat([s2, s1[:, :2]], 1), torch.cat([a2, a1[:, :2]], 1)
        s3, a3 = self.lif(3, self.affine(conv, mixed, trace, n.conv4.weight, n.conv4.bias))
        spikes, trace = ((s3 + 0.5 * s2) + s0).mean((2, 3)), (a3 + 0.5 * a2 + a0).mean((2, 3))
        return self.affine(lin, spikes, trace, n.fc.weight, n.fc.bias)


@pytest.mark.parametrize("config", [NEURONS["soft, attached"], NEURONS["hard, attached"]], ids=["soft", "hard"])
@each_algorithm
def test_a_sum_of_spikes_has_the_sum_of_their_traces(algorithm, config):
    network = SumsOfSpikes(config).double()
    for conv in (network.conv1, network.conv2, network.conv3, network.conv4):
        nn.init.normal_(conv.weight, 0.2, 0.6)
    ours, x = spiking(network, T, algorithm), images(3, 3, 6, 6)
    theirs = SumsOfSpikesByHand(network, config, algorithm == "ottt")
    second = train_each_step(theirs, network, x, T)
    # the modules share no names of neurons: SpikingJelly's nodes have no parameters
    assert_same_training(train_each_step(by_step(ours), ours, x, T), second, 1e-12)


# -- the order of steps -------------------------------------------------------------------------------


def residual(algorithm, timesteps=T):
    return spiking(generic(Residual(NeuronConfig(leak=0.5))), timesteps, algorithm)


@each_algorithm
def test_steps_out_of_turn_are_refused(algorithm):
    snn, x = residual(algorithm), images(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"step must be .*0.*, found 1: the 4 steps of a batch run in turn"):
        snn(x, step=1)
    snn(x, step=0)
    for wrong in (2, 3, 4, -1):
        with pytest.raises(ValueError, match=f"step must be 1 or 0, found {wrong}"):
            snn(x, step=wrong)
    snn(x, step=1)
    with pytest.raises(ValueError, match="step must be 2 or 0, found 1"):
        snn(x, step=1)


@each_algorithm
def test_a_missing_step_is_refused(algorithm):
    with pytest.raises(ValueError, match=f"{algorithm} needs step=0 to T - 1 in turn, a backward pass each"):
        residual(algorithm)(images(2, 3, 8, 8))


@each_algorithm
def test_a_step_in_evaluation_is_refused(algorithm):
    snn = residual(algorithm).eval()
    with pytest.raises(ValueError, match=f"{algorithm} runs all steps in one call in evaluation mode"):
        snn(images(2, 3, 8, 8), step=0)
    assert snn(images(2, 3, 8, 8)).shape == (2, 5)


def states(snn):
    nodes = [m.online for m in snn.modules() if isinstance(m, SpikingNeuron)]
    assert len(nodes) == 6
    return [(node.v, getattr(node, "trace", None)) for node in nodes]


@each_algorithm
def test_after_the_last_step_nothing_is_left(algorithm):
    snn, x = residual(algorithm), images(2, 3, 8, 8)
    for t in range(T):
        snn(x, step=t).sum().backward()
        assert all(isinstance(v, torch.Tensor) for v, _ in states(snn)) == (t < T - 1)
    assert all(v == 0.0 and trace is None for v, trace in states(snn))
    assert all(m.v == 0.0 for m in snn.modules() if isinstance(m, SpikingNeuron))


@each_algorithm
def test_an_aborted_batch_leaves_nothing_to_the_next(algorithm):
    snn, x = residual(algorithm), images(2, 3, 8, 8)
    for norm in snn.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    first = train_each_step(by_step(snn), snn, x, T)
    for t in range(2):
        snn(images(5, 3, 8, 8), step=t)
    again = train_each_step(by_step(snn), snn, x, T)
    assert_same_training(again, first, 0.0)


@each_algorithm
def test_evaluation_in_the_midst_of_a_batch_disturbs_neither(algorithm):
    snn, other, x = residual(algorithm), residual(algorithm), images(2, 3, 8, 8)
    other.load_state_dict(snn.state_dict())
    first = [other(x, step=t) for t in range(2)][1]
    logits = snn(x, step=0)
    evaluated = residual(algorithm)
    evaluated.load_state_dict(snn.state_dict())
    assert torch.equal(snn.eval()(x), evaluated.eval()(x)) and logits.requires_grad
    assert torch.equal(snn.train()(x, step=1), first)


def test_another_algorithm_begins_a_batch_of_its_own():
    snn, x = residual("ottt"), images(2, 3, 8, 8)
    snn(x, step=0)
    set_algorithm(snn, "sltt")
    with pytest.raises(ValueError, match="step must be"):
        snn(x, step=1)
    fresh = residual("sltt")
    fresh.load_state_dict(snn.state_dict())
    assert torch.equal(snn(x, step=0), fresh(x, step=0))


def test_choosing_a_rate_rule_takes_the_nodes_away():
    snn, x = residual("ottt"), images(2, 3, 8, 8)
    assert all(m.online is not None for m in snn.modules() if isinstance(m, SpikingNeuron))
    set_algorithm(snn, "rate_m")
    assert all(m.online is None for m in snn.modules() if isinstance(m, SpikingNeuron))
    assert snn(x).requires_grad


@each_algorithm
def test_no_key_of_the_weights_is_the_algorithms(algorithm):
    assert residual(algorithm).state_dict().keys() == residual("rate_m").state_dict().keys()
    snn = create_snn("resnet18_cifar", width=4, algorithm=algorithm)
    assert sum(1 for _ in snn.parameters()) == sum(1 for _ in create_snn("resnet18_cifar", width=4).parameters())


@pytest.mark.parametrize("batch", [2, 3])
@each_algorithm
def test_a_part_in_evaluation_mode_trains_the_rest(algorithm, batch):
    """A frozen part: fine-tuning puts its norms, and with them its neurons, into evaluation mode."""
    network = nn.Sequential(
        nn.Sequential(conv_bn(3, 4), SpikingNeuron()),
        nn.Conv2d(4, 4, 3),
        SpikingNeuron(),
        nn.Flatten(1),
        nn.Linear(16, 2),
    )
    snn = spiking(generic(network), 2, algorithm)
    snn[0].eval()
    for t in range(2):
        logits = snn(images(batch, 3, 4, 4), step=t)
        logits.sum().backward()
    assert logits.shape == (batch, 2) and snn.get_parameter("1.weight").grad.norm() > 0


# -- memory -------------------------------------------------------------------------------------------


@each_algorithm
def test_a_step_keeps_nothing_of_those_before(algorithm):
    snn, x = residual(algorithm, 6), images(2, 3, 8, 8)
    kept, spikes = [], []
    for module in snn.modules():
        if isinstance(module, SpikingNeuron):
            module.register_forward_hook(lambda m, args, out: spikes.append(weakref.ref(out.terms[0].stream)))
    for t in range(6):
        with SavedTensors() as saved:
            logits = snn(x, step=t)
        kept.append(saved.bytes)
        logits.sum().backward()  # and is refused where it reaches into an earlier step, whose graph is gone
        saved.tensors.clear()
        del logits
        assert all(ref() is None for ref in spikes)
        for _, trace in states(snn):
            assert not isinstance(trace, torch.Tensor) or not trace.requires_grad
    assert len(spikes) == 36 and kept[0] > 1000
    assert kept[1] == kept[2] == kept[5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@each_algorithm
def test_the_membrane_is_at_least_float32(algorithm, dtype):
    """2^-9 at each of 512 steps: a membrane in bfloat16 would stop at 0.5."""
    network = nn.Sequential(SpikingNeuron(NeuronConfig(leak=1.0)), nn.Flatten(1), nn.Linear(1, 1, bias=False))
    nn.init.ones_(network[2].weight)
    snn = spiking(network.to(dtype), 512, algorithm, in_chans=1)
    x, fired = torch.full((1, 1, 1, 1), 2.0**-9, dtype=dtype), []
    for t in range(512):
        logits = snn(x, step=t)
        assert logits.dtype == dtype
        if t < 511:
            assert snn[0].online.v.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        fired.append(logits.item())
    assert fired == [0.0] * 511 + [1.0]


@each_algorithm
def test_autocast_to_bfloat16_trains_with_float32_gradients(algorithm):
    snn = spiking(generic(Residual(NeuronConfig(leak=0.5))).float(), 2, algorithm)
    for t in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            logits = snn(torch.randn(4, 3, 8, 8), step=t)
            if t == 0:
                assert all(v.dtype == torch.float32 for v, _ in states(snn))
        logits.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in snn.parameters())


def test_one_batch_of_the_papers_resnet18():
    snn = create_snn("resnet18_cifar", width=8, timesteps=2, algorithm="ottt")
    for t in range(2):
        assert snn(torch.randn(3, 3, 16, 16), step=t).square().sum().backward() is None
    assert all(p.grad.norm() > 0 for p in snn.parameters())


@each_algorithm
def test_spikingjellys_step_mode_may_be_set_and_set_back(algorithm):
    """set_step_mode reaches the nodes too, where mode "m" would take the images for time steps."""
    ours, theirs = residual(algorithm), residual(algorithm)
    theirs.load_state_dict(ours.state_dict())
    functional.set_step_mode(ours, "s")
    functional.set_step_mode(ours, "m")
    x = images(3, 3, 8, 8)
    assert_same_training(train_each_step(by_step(ours), ours, x, T), train_each_step(by_step(theirs), theirs, x, T))


@each_algorithm
def test_another_number_of_steps_ends_a_batch_under_way(algorithm):
    snn, x = residual(algorithm), images(2, 3, 8, 8)
    snn(x, step=0)
    snn(x, step=1)
    snn.timesteps = 2
    with pytest.raises(ValueError, match="step must be 0, found 2"):
        snn(x, step=2)
    snn(x, step=0)
    snn(x, step=1)
    assert all(m.online.v == 0.0 for m in snn.modules() if isinstance(m, SpikingNeuron))


def test_one_step_and_each_step_are_not_asked_for_together():
    with pytest.raises(ValueError, match="per_step gives the logits of all steps, step those of one"):
        residual("sltt")(images(2, 3, 8, 8), step=0, per_step=True)
