"""The neuron: sequences and derivatives worked out by hand, and SpikingJelly's own nodes on the same currents."""

import math

import pytest
import torch
from reference import assert_same_training, train_each_step, train_once
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn
from toy_networks import spiking

from models import NeuronConfig, SpikeTrain, SpikingNeuron
from models.dynamics import surrogate_derivative, surrogate_derivative_in_a_loop
from models.tape import Tape


def spikes_of(currents, **config):
    """Spikes of one neuron on the given currents, one a step."""
    stream = torch.tensor(currents, dtype=torch.float64).view(-1, 1, 1)
    return SpikingNeuron(NeuronConfig(**config))(SpikeTrain.from_stream(stream, "plain")).stream.flatten().tolist()


def kappa_of(currents, **config):
    stream = torch.tensor(currents, dtype=torch.float64).view(-1, 1, 1).requires_grad_()
    SpikingNeuron(NeuronConfig(**config))(SpikeTrain.from_stream(stream, "rate")).rate.sum().backward()
    return stream.grad.sum().item()  # each step has 1/T of it


# -- spikes by hand -----------------------------------------------------------------------------------


def test_if_neuron_fires_every_fourth_step_on_a_quarter_of_its_threshold():
    assert spikes_of([0.25] * 8, leak=1.0) == [0, 0, 0, 1, 0, 0, 0, 1]


def test_a_leak_of_one_half():
    # u: 0.8, 0.4 + 0.8 = 1.2 -> 0.2, 0.1 + 0.8 = 0.9, 0.45 + 0.8 = 1.25 -> 0.25, 0.925, 1.2625
    assert spikes_of([0.8] * 6, leak=0.5) == [0, 1, 0, 1, 0, 1]
    # u: 0.6, 0.9, 1.05 -> 0.05, 0.625, 0.9125, 1.05625
    assert spikes_of([0.6] * 6, leak=0.5) == [0, 0, 1, 0, 0, 1]


def test_soft_reset_keeps_what_is_above_the_threshold_and_hard_reset_drops_it():
    # soft u: 0.75, 1.5 -> 0.5, 1.25 -> 0.25, 1.0 -> 0, 0.75; hard u: 0.75, 1.5 -> 0, 0.75, 1.5 -> 0, 0.75
    assert spikes_of([0.75] * 5, leak=1.0, reset="soft") == [0, 1, 1, 1, 0]
    assert spikes_of([0.75] * 5, leak=1.0, reset="hard") == [0, 1, 0, 1, 0]


def test_the_threshold_is_what_a_spike_costs():
    # u: 1, 2 -> 0 (soft, threshold 2); u: 3 -> 1, 4 -> 2, 5 -> 3 fires at each step
    assert spikes_of([1.0] * 4, leak=1.0, threshold=2.0) == [0, 1, 0, 1]
    # 0.75 - 0.5 = 0.25; 0.25 - 0.5 < 0: stays 0.25, + 0.25 = 0.5 fires
    assert spikes_of([0.75, 0.0, 0.25, 0.0], leak=1.0, threshold=0.5) == [1, 0, 1, 0]


def test_negative_currents_pull_the_membrane_down():
    # u: -0.5, 0.25 * -0.5 ... with leak 0.5: -0.5, -0.25 + 1 = 0.75, 0.375 + 0.625 = 1 -> 0
    assert spikes_of([-0.5, 1.0, 0.625, 0.99], leak=0.5) == [0, 0, 1, 0]


def test_defaults_are_the_papers():
    config = NeuronConfig()
    assert (config.leak, config.threshold, config.reset, config.detach_reset, config.alpha) == (0.2, 1, "soft", True, 4)
    assert spikes_of([0.9, 0.9]) == [0, 1]  # 0.18 + 0.9 = 1.08
    assert spikes_of([0.8, 0.8, 0.8]) == [0, 0, 0]  # 0.8, 0.96, 0.992: never 1


# -- kappa by hand ------------------------------------------------------------------------------------

# leak 0.5, c = (1.25, 0.5): u_1 = 1.25 fires, h_1 = 4 g (1 - g) at g = sigmoid(1)
H1 = 0.7864477329659275
# soft: u_2 = 0.125 + 0.5 = 0.625, g = sigmoid(-1.5)
H2_SOFT = 0.5965858082813616
# hard: u_2 = 0.5, g = sigmoid(-2)
H2_HARD = 0.41997434161402614
KAPPA = {
    ("soft", True): (H1 + 1.5 * H2_SOFT) / 2,  # e_2 = 1 + 0.5
    ("soft", False): (H1 + (1 + 0.5 * (1 - H1)) * H2_SOFT) / 2,
    ("hard", True): (H1 + H2_HARD) / 2,  # the spike cuts the path: e_2 = 1
    ("hard", False): (H1 + (1 - 0.5 * 1.25 * H1) * H2_HARD) / 2,
}


def test_the_surrogate_derivatives_above_are_right():
    for h, x in ((H1, 1), (H2_SOFT, -1.5), (H2_HARD, -2)):
        g = 1 / (1 + math.exp(-x))
        assert h == pytest.approx(4 * g * (1 - g), rel=1e-14)


@pytest.mark.parametrize(("alpha", "threshold"), [(4.0, 1.0), (1.0, 0.5), (25.0, 2.0)])
def test_the_surrogate_derivative_of_a_loop_has_the_digits_of_float32(alpha, threshold):
    config = NeuronConfig(alpha=alpha, threshold=threshold)
    z = torch.linspace(-30, 30, 6001, dtype=torch.float64)
    u = (z / alpha + threshold).float()
    exact = surrogate_derivative(u.double(), config)
    found = surrogate_derivative_in_a_loop(u, config)
    near = z.abs() <= 8
    torch.testing.assert_close(found[near].double(), exact[near], rtol=4e-6, atol=0)
    torch.testing.assert_close(found.double(), exact, rtol=4e-6, atol=1e-8 * alpha)
    ends = surrogate_derivative_in_a_loop(torch.tensor([-1e30, 1e30, -math.inf, math.inf, math.nan]), config)
    assert ends[:4].tolist() == [0, 0, 0, 0] and ends[4].isnan()


@pytest.mark.parametrize(("reset", "detach_reset"), KAPPA)
def test_kappa_of_two_steps(reset, detach_reset):
    kappa = kappa_of([1.25, 0.5], leak=0.5, reset=reset, detach_reset=detach_reset)
    assert kappa == pytest.approx(KAPPA[reset, detach_reset], rel=1e-13)


@pytest.mark.parametrize("reset", ["soft", "hard"])
@pytest.mark.parametrize("detach_reset", [True, False])
def test_kappa_of_one_step_is_the_surrogate_derivative(reset, detach_reset):
    assert kappa_of([1.25], reset=reset, detach_reset=detach_reset) == pytest.approx(H1, rel=1e-13)


def test_a_threshold_other_than_one_enters_kappa_where_the_reset_is_attached():
    # threshold 2, leak 1, c = (2.25, 0): u = (2.25, 0.25); h_1 at sigmoid(1), h_2 at sigmoid(4 * -1.75); a = 1 - 2 h_1
    g = 1 / (1 + math.exp(7))
    expected = (H1 + (2 - 2 * H1) * 4 * g * (1 - g)) / 2
    kappa = kappa_of([2.25, 0.0], leak=1.0, threshold=2.0, detach_reset=False)
    assert kappa == pytest.approx(expected, rel=1e-13)


def test_a_hard_reset_forgets_the_path_before_a_spike_and_keeps_it_without_one():
    # detached, leak 0.5, c = (0.5, 0.75, 0): u = (0.5, 1.0 fires, 0); e = (1, 1.5, 1)
    h = [4 * g * (1 - g) for g in (1 / (1 + math.exp(-x)) for x in (-2.0, 0.0, -4.0))]
    expected = (h[0] + 1.5 * h[1] + h[2]) / 3
    assert kappa_of([0.5, 0.75, 0.0], leak=0.5, reset="hard") == pytest.approx(expected, rel=1e-13)


# -- SpikingJelly -------------------------------------------------------------------------------------

TIMESTEPS = 9


def jelly_node(config, step_mode):
    arguments = dict(
        v_threshold=config.threshold,
        v_reset=None if config.reset == "soft" else 0.0,
        surrogate_function=surrogate.Sigmoid(alpha=config.alpha),
        detach_reset=config.detach_reset,
        step_mode=step_mode,
    )
    if config.leak == 1:
        return neuron.IFNode(**arguments)
    return neuron.LIFNode(tau=1 / (1 - config.leak), decay_input=False, **arguments)


@pytest.mark.parametrize("reset", ["soft", "hard"])
@pytest.mark.parametrize("leak", [0.2, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("kind", ["plain", "rate", "graph"])
def test_whole_trains_fire_as_spikingjellys_nodes(kind, leak, reset):
    config = NeuronConfig(leak=leak, reset=reset, threshold=0.7)
    currents = torch.randn(TIMESTEPS, 3, 4, 5, 6, dtype=torch.float64)
    spikes = SpikingNeuron(config)(SpikeTrain.from_stream(currents, kind)).stream
    expected = jelly_node(config, "m")(currents)
    assert 0.05 < expected.mean() < 0.7
    assert torch.equal(spikes, expected)


@pytest.mark.parametrize("reset", ["soft", "hard"])
@pytest.mark.parametrize("leak", [0.2, 0.5, 1.0])
def test_spikes_and_membrane_step_by_step_are_spikingjellys(leak, reset):
    config = NeuronConfig(leak=leak, reset=reset)
    currents = torch.randn(TIMESTEPS, 3, 4, 5, 6, dtype=torch.float64) + 0.3
    ours, theirs = SpikingNeuron(config), jelly_node(config, "s")
    for current in currents:
        assert torch.equal(ours(current), theirs(current))
        torch.testing.assert_close(ours.v, theirs.v, rtol=1e-13, atol=1e-15)
    functional.reset_net(ours)
    assert ours.v == 0.0


@pytest.mark.parametrize("reset", ["soft", "hard"])
def test_multi_step_mode_is_spikingjellys_multi_step_function(reset):
    config = NeuronConfig(leak=0.5, reset=reset)
    currents = torch.randn(TIMESTEPS, 3, 4, dtype=torch.float64)
    ours = SpikingNeuron(config)
    ours.step_mode = "m"
    v_reset = None if reset == "soft" else 0.0
    start = torch.zeros(3, 4, dtype=torch.float64)
    spikes, v, _ = functional.lif_multi_step(
        currents, start, 2.0, False, 1.0, v_reset, surrogate.Sigmoid(4.0), True, False
    )
    assert torch.equal(ours(currents), spikes)
    torch.testing.assert_close(ours.v, v, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("reset", ["soft", "hard"])
@pytest.mark.parametrize("detach_reset", [True, False])
def test_gradients_through_time_are_spikingjellys(reset, detach_reset):
    config = NeuronConfig(leak=0.5, reset=reset, detach_reset=detach_reset)
    currents = torch.randn(TIMESTEPS, 3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(currents)
    ours = SpikingNeuron(config)(SpikeTrain.from_stream(currents, "graph")).stream
    theirs = jelly_node(config, "m")(currents)
    gradients = [torch.autograd.grad((s * weights).sum(), currents)[0] for s in (ours, theirs)]
    assert gradients[1].norm() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)


# -- types, state, pending terms ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "membrane"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_membrane_is_at_least_float32(dtype, membrane):
    ours = SpikingNeuron()
    spikes = ours(torch.full((2, 3), 1.5, dtype=dtype))
    assert spikes.dtype == dtype and ours.v.dtype == membrane
    assert spikes.tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize("kind", ["plain", "rate", "graph"])
def test_small_currents_in_bfloat16_add_up(kind):
    """A membrane in bfloat16 would stop at 0.5, where 2^-9 is half the gap to the next number."""
    train = SpikeTrain.constant(torch.full((1, 1), 2.0**-9, dtype=torch.bfloat16), 512, kind)
    out = SpikingNeuron(NeuronConfig(leak=1.0))(train)
    assert out.dtype == torch.bfloat16
    assert out.stream.flatten().nonzero().flatten().tolist() == [511]
    assert out.rate.item() == 1 / 512


@pytest.mark.parametrize("learnable_leak", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_small_currents_add_up_over_the_steps_of_rate_s(dtype, learnable_leak):
    leak = 0.9999 if learnable_leak else 1.0
    spike = SpikingNeuron(NeuronConfig(leak=leak, learnable_leak=learnable_leak, threshold=0.9)).to(dtype)
    tape, current, fired = Tape(512), torch.full((1, 1), 2.0**-9, dtype=dtype), []
    with torch.no_grad():
        if learnable_leak:  # a bfloat16 weight is another leak: near enough to 1
            spike.w.fill_(-12)
        for _ in range(512):
            tape.rewind()
            out = spike(SpikeTrain.constant(current, 1, "step", tape))
            fired.append(out.folded.item())
    (membrane,) = tape._records
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.dtype == dtype and {tensor.dtype for tensor in membrane.state} == {wanted}
    assert fired.index(1) == pytest.approx(461, abs=2) and sum(fired) == 1  # 0.9 * 512 = 460.8
    tape.rewind()
    replayed = spike(SpikeTrain.constant(current.requires_grad_(), 1, "replay", tape))
    assert replayed.rate.dtype == dtype and replayed.rate.item() == 1 / 512


@pytest.mark.parametrize("kind", ["plain", "rate", "graph"])
def test_a_whole_train_leaves_the_callers_own_state_alone(kind):
    ours = SpikingNeuron(NeuronConfig(leak=1.0))
    ours(torch.full((2,), 0.75))
    train = SpikeTrain.constant(torch.full((3, 1), 0.5), 2, kind)
    first, second = ours(train).stream, ours(train).stream
    assert first[:, 0, 0].tolist() == [0, 1] and torch.equal(first, second)
    assert ours.v.tolist() == [0.75, 0.75]


def lazy(kind, timesteps=4):
    """conv-free pending terms: batch norm of a stream + batch norm of a constant + a stream."""
    torch.manual_seed(3)
    norms = [nn.BatchNorm2d(4).double() for _ in range(2)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    streams = [torch.randn(timesteps, 2, 4, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    constant = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    x, y = (SpikeTrain.from_stream(s, kind) for s in streams)
    z = SpikeTrain.constant(constant, timesteps, kind)
    parameters = [p for norm in norms for p in norm.parameters()]
    return norms[0](x) + y + norms[1](z), [*streams, constant, *parameters]


@pytest.mark.parametrize("kind", ["plain", "rate", "graph"])
def test_pending_terms_fire_as_the_materialised_stream(kind):
    spike = SpikingNeuron(NeuronConfig(leak=0.5))
    pending, leaves = lazy(kind)
    spikes = spike(pending)
    assert len(pending.terms) == (1 if kind == "graph" else 3)  # only BPTT materialises
    done, others = lazy(kind)
    assert done.stream.shape == (4, 2, 4, 3, 3) and len(done.terms) == 1
    expected = spike(done)
    assert torch.equal(spikes.stream, expected.stream) and 0 < spikes.stream.mean() < 1
    torch.testing.assert_close(spikes.rate, expected.stream.mean(0), rtol=1e-14, atol=0)
    if kind == "plain":
        return
    weights = torch.randn_like(spikes.rate)
    gradients = torch.autograd.grad((spikes.rate * weights).sum(), leaves)
    wanted = torch.autograd.grad((expected.rate * weights).sum(), others)
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert theirs.norm() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


class PendingSum(nn.Module):
    """Batch norm of spikes' currents, of the constant input, and a sum, pending or made real before the neuron."""

    def __init__(self, materialise):
        super().__init__()
        self.first, self.conv = SpikingNeuron(NeuronConfig(leak=0.5, threshold=0.4)), nn.Conv2d(3, 3, 3, padding=1)
        self.norms, self.spike = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2)), SpikingNeuron()
        self.fc, self.materialise, self.pending = nn.Linear(27, 4), materialise, []

    def forward(self, x):
        y = self.first(x)
        total = self.norms[0](self.conv(y)) + y + self.norms[1](x)
        if self.materialise:
            assert total.stream.shape[1:] == (4, 3, 3, 3)
        self.pending.append((total.kind, len(total.terms)))
        return self.fc(self.spike(total).flatten(1))


@pytest.mark.parametrize("algorithm", ["rate_m", "rate_s", "bptt", "ottt", "sltt"])
def test_a_pending_sum_trains_as_the_materialised_one(algorithm):
    lazily, at_once = PendingSum(False).double(), PendingSum(True).double()
    at_once.load_state_dict(lazily.state_dict())
    x, trained = torch.randn(4, 3, 3, 3, dtype=torch.float64), []
    for network in (lazily, at_once):
        snn = spiking(network, 3, algorithm)
        snn.pending.clear()
        if algorithm in ("ottt", "sltt"):
            trained.append(train_each_step(lambda x, t, snn=snn: snn(x, step=t), snn, x, 3))
        else:
            trained.append(train_once(snn, snn, x))
        kinds = {"rate_m": {"rate"}, "rate_s": {"step", "replay"}, "bptt": {"graph"}}.get(algorithm, {algorithm})
        assert {kind for kind, _ in snn.pending} == kinds
        lazy_terms = 3 if network is lazily and algorithm.startswith("rate") else 1
        assert {terms for _, terms in snn.pending} == {lazy_terms}
    assert_same_training(*trained, 1e-11)


def test_a_pending_sum_is_the_sum():
    pending, leaves = lazy("rate")
    x, y, z, w0, b0, w1, b1 = leaves
    mean, var = x.mean((0, 1, 3, 4)), x.var((0, 1, 3, 4), correction=0)
    zmean, zvar = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)

    def norm(v, m, s, w, b):
        m, s, w, b = (p.view(-1, 1, 1) for p in (m, s, w, b))
        return (v - m) / torch.sqrt(s + 1e-5) * w + b

    expected = norm(x, mean, var, w0, b0) + y + norm(z, zmean, zvar, w1, b1)
    torch.testing.assert_close(pending.stream, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(pending.rate, expected.mean(0), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "wrong",
    [
        {"leak": 0.0},
        {"leak": 1.1},
        {"leak": -0.2},
        {"threshold": 0.0},
        {"threshold": -1.0},
        {"reset": "zero"},
        {"alpha": 0.0},
        {"leak": float("nan")},
        {"threshold": float("nan")},
    ],
    ids=str,
)
def test_constants_out_of_range_are_refused_by_name(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        NeuronConfig(**wrong)
