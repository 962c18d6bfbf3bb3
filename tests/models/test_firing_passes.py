"""How a layer fires, and its fused passes: compiled they give the numbers that they give as written."""

import pytest
import torch
from compiler import skip_without_compiler
from reference import assert_same_training, train_once
from toy_networks import TOYS, generic, spiking

from models import NeuronConfig, compile_kernels, firing, firing_passes, set_algorithm
from models.compiling import is_compiling
from models.dynamics import surrogate_derivative


@pytest.fixture(autouse=True)
def _uncompiled_again():
    yield
    compile_kernels(False)


def as_of_many_steps(monkeypatch, in_pieces):
    """Few steps fire as many do; in pieces of several rows or images, of which the last is smaller."""
    monkeypatch.setattr(firing_passes, "ONE_LOOP", 0)
    monkeypatch.setattr(firing_passes, "PIECE", 100)
    monkeypatch.setattr(firing_passes, "_leaves_little_in_between", lambda neuron, leak: not in_pieces)


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize(
    ("compiled", "way"),
    [(False, None), (True, "one loop"), (True, "whole"), (True, "pieces")],
    ids=["as written", "one loop", "whole", "pieces"],
)
def test_firing_finds_the_mean_over_time_of_the_addends_that_it_is_asked_for(compiled, way, caplog, monkeypatch):
    if way in ("whole", "pieces"):
        as_of_many_steps(monkeypatch, in_pieces=way == "pieces")
    shape, scale = (3 * 4, 5, 6, 7), (torch.rand(5).double(), torch.rand(5).double())
    streams = [torch.randn(shape, dtype=torch.float64), torch.randn(4, *shape[1:]), torch.randn(shape).bfloat16()]
    streams = [stream.to(memory_format=torch.channels_last) for stream in streams[:2]] + streams[2:]
    config = NeuronConfig()
    arguments = (streams, [scale, None, None], [3, 1, 3], 3, config, config.leak)
    compile_kernels(compiled)
    spikes, bits, means = firing.fire_with_rate(*arguments, [True, False, True])
    skip_without_compiler(caplog)
    for index in (0, 2):
        wanted = streams[index].double().unflatten(0, (3, 4)).mean(0).to(streams[index].dtype)
        found = means.addends[index]
        assert found.dtype == streams[index].dtype
        assert index or found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, wanted, rtol=0.01 if index else 1e-12, atol=0.01 if index else 1e-12)
    assert means.addends[1] is None
    without_spikes, without_bits, without = firing.fire_with_rate(*arguments)
    assert without.addends == [] and torch.equal(without_spikes, spikes) and torch.equal(without_bits, bits)
    assert torch.equal(without.kappa, means.kappa) and torch.equal(without.rate, means.rate)


def test_rates_of_half_precision_spikes_are_counted_in_float32():
    current = torch.ones(1, 2, 1).bfloat16()
    spikes, _, means = firing.fire_with_rate([current], [None], [1], 300, NeuronConfig(leak=1.0), 1.0)
    assert spikes.dtype == means.rate.dtype == torch.bfloat16
    assert spikes.all() and (means.rate == 1).all()  # bfloat16 itself counts to 256


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize(
    ("toy", "algorithm", "in_pieces"),
    [
        ("Residual", "rate_m", None),
        ("Residual", "rate_m", False),
        ("Residual", "rate_m", True),
        ("SharedNeuron", "rate_m", True),
        ("SharedNeuron", "rate_s", None),
    ],
)
def test_compiled_passes_train_as_written_ones(toy, algorithm, in_pieces, caplog, monkeypatch):
    if in_pieces is not None:
        as_of_many_steps(monkeypatch, in_pieces)
    config = NeuronConfig(leak=0.5, learnable_leak=toy == "SharedNeuron")
    network, images = generic(TOYS[toy](config)), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    if toy == "Residual":
        images = images.to(memory_format=torch.channels_last)
        network = network.to(memory_format=torch.channels_last)
    ours, theirs = spiking(network, 3, algorithm), spiking(network, 3, algorithm)
    written = train_once(theirs, theirs, images)
    compile_kernels(True)
    compiled = train_once(ours, ours, images)
    steps = set_algorithm(ours, "bptt").eval()(images, per_step=True)
    skip_without_compiler(caplog)
    assert is_compiling()
    assert_same_training(compiled, written)
    compile_kernels(False)
    torch.testing.assert_close(steps, theirs.eval()(images, per_step=True), rtol=1e-12, atol=1e-13)


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize(
    ("timesteps", "reset", "detached"),
    [(4, "soft", False), (4, "hard", False), (10, "soft", True), (10, "soft", False)],
    ids=["one loop", "one loop, hard reset", "whole", "pieces"],
)
def test_compiled_passes_in_bfloat16_are_as_near_to_float64_as_bfloat16_is(timesteps, reset, detached, caplog):
    torch.manual_seed(0)
    config = NeuronConfig(leak=0.5, detach_reset=detached, reset=reset)
    bytes_each = -(-timesteps // 8)
    current = (2 * torch.randn(timesteps * 3, 5, 4, 4)).bfloat16().to(memory_format=torch.channels_last)
    added = torch.randint(16, (bytes_each * 3, 5, 4, 4), dtype=torch.uint8).to(memory_format=torch.channels_last)
    affine = (torch.rand(5) + 0.5, torch.rand(5))
    arguments = ([affine, None], [timesteps, bytes_each], timesteps, config, 0.5)
    exact = tuple(v.double() for v in affine)
    _, bits, means = firing.fire_with_rate([current.double(), added], [exact, None], *arguments[1:])
    compile_kernels(True)
    _, found_bits, found = firing.fire_with_rate([current, added], *arguments)
    skip_without_compiler(caplog)
    assert torch.equal(found_bits, bits) and torch.equal(found.counts, means.counts)
    assert found.kappa.dtype == torch.bfloat16 and not torch.equal(means.kappa, torch.zeros_like(means.kappa))
    torch.testing.assert_close(found.kappa.double(), means.kappa, rtol=2**-8, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("at_once", [True, False], ids=["rate_m", "rate_s"])
def test_a_compiled_derivative_has_digits_where_the_sigmoid_in_float32_has_none(at_once, caplog):
    config = NeuronConfig()
    z = torch.linspace(-8, 8, 401, dtype=torch.float64).view(-1, 1)
    u = (z / config.alpha + config.threshold).float()
    exact = surrogate_derivative(u.double(), config)
    assert (surrogate_derivative(u, config) / exact - 1).abs().max() > 1e-4
    compile_kernels(True)
    if at_once:
        _, _, means = firing.fire_with_rate([u], [None], [1], 1, config, config.leak)
        assert firing.fire_with_rate([u[:0]], [None], [1], 1, config, config.leak)[0].shape == (0, 1)
    else:
        spikes, state = firing.fire_once([u], [None], None, config, config.leak)
        means = firing.means_of_steps(state, 1, spikes)
    skip_without_compiler(caplog)
    torch.testing.assert_close(means.kappa.double(), exact, rtol=4e-6, atol=0)


@pytest.mark.parametrize(
    ("timesteps", "neuron", "leak", "way"),
    [
        (4, NeuronConfig(), 0.2, "_fire_in_one_loop"),
        (4, NeuronConfig(reset="hard"), 0.2, "_fire_in_one_loop"),
        (5, NeuronConfig(), 0.2, "_fire_whole"),
        (5, NeuronConfig(reset="hard"), 0.2, "_fire_in_pieces"),
        (5, NeuronConfig(detach_reset=False), 0.2, "_fire_in_pieces"),
        (5, NeuronConfig(learnable_leak=True), torch.tensor(0.2), "_fire_in_pieces"),
    ],
)
def test_few_steps_are_fired_in_one_loop_and_many_in_pieces_where_a_membrane_is_used_often(
    timesteps, neuron, leak, way, monkeypatch
):
    ways = []
    for name in ("_fire_in_one_loop", "_fire_in_pieces", "_fire_whole"):

        def written(*arguments, name=name):
            ways.append(name)
            return firing_passes._as_written(*arguments)

        monkeypatch.setattr(firing_passes, name, written)
    current = torch.randn(timesteps * 2, 3)
    firing.fire_with_rate([current], [None], [timesteps], timesteps, neuron, leak)
    compile_kernels(True)
    firing.fire_with_rate([current], [None], [timesteps], timesteps, neuron, leak)
    assert ways == ["_fire_whole", way]


def test_a_layer_is_fired_in_pieces_with_a_smaller_last_one(monkeypatch):
    cut = []
    written = firing_passes._as_written

    def into(streams, maps, timesteps, neuron, leak, averaged, places):
        cut.append(streams[0].shape[1])
        found = [x for x in written(streams, maps, 3, neuron, leak, averaged) if x is not None]
        for place, value in zip(places, found, strict=True):
            place.copy_(value)

    monkeypatch.setattr(firing_passes, "_fire_into", into)
    monkeypatch.setattr(firing_passes, "PIECE", 100)
    streams = [torch.randn(3, 31, 8, dtype=torch.float64), torch.randn(1, 31, 8, dtype=torch.float64)]
    config, maps = NeuronConfig(leak=0.5), [None, None]
    found = firing_passes._fire_in_pieces(streams, maps, 3, config, torch.tensor(0.5, dtype=torch.float64), [0])
    assert cut == [12, 12, 7]
    expected = written(streams, maps, 3, config, torch.tensor(0.5, dtype=torch.float64), [0])
    assert len(found) == 7 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    empty = firing_passes._fire_in_pieces([x[:, :0] for x in streams], maps, 3, config, 0.5, [])
    assert empty[0].shape == (3, 0, 8)
