"""Spikes as bits: the bytes by hand, the way back, neurons that read them, and what lives while a network trains."""

import gc

import pytest
import torch
import torch.nn.functional as F
from toy_networks import Residual, generic, spiking

from models import NeuronConfig, SpikeTrain, SpikingNeuron, compile_kernels, firing
from models.compiling import is_compiling
from models.neuron import _currents
from models.spike_bits import SpikeBits
from models.term import Term

NCHW, NHWC = torch.contiguous_format, torch.channels_last


@pytest.fixture(params=[False])
def kernels_compiled(request):
    compile_kernels(request.param)
    yield
    compiled = is_compiling()
    compile_kernels(False)
    if request.param and not compiled:
        pytest.skip("no compiler on this machine")


def cases(*written, compiled):
    """Each as it is written in both memory formats, and one compiled: each takes the compiler many seconds."""
    both = [(*case, memory_format, False) for case in written for memory_format in (NCHW, NHWC)]
    return [*both, (*compiled, NHWC, True)]


def fired(spikes, timesteps):
    """The spikes (T*B, ...) as neurons give them that fire where they are driven and keep nothing."""
    config = NeuronConfig(leak=1e-9, threshold=0.5)
    return firing.fire_with_rate([spikes], [None], [timesteps], timesteps, config, config.leak)


def test_step_t_is_bit_t():
    steps = [1, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0]
    spikes, bits, means = fired(torch.tensor(steps, dtype=torch.float64).view(11, 1), 11)
    assert spikes.flatten().tolist() == steps
    assert bits.dtype == torch.uint8 and bits.tolist() == [[0b1101], [0b011]]
    assert means.counts.item() == 5
    kept = SpikeBits(bits, 11, torch.float64)
    assert kept.shape == (1, 1) and kept.counts().item() == 5 and kept.stream().flatten().tolist() == steps


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize(
    ("timesteps", "stored", "memory_format", "kernels_compiled"),
    cases((1, 1), (4, 1), (8, 1), (9, 2), (17, 3), compiled=(9, 2)),
    indirect=["kernels_compiled"],
)
@pytest.mark.usefixtures("kernels_compiled")
def test_the_numbers_come_back(timesteps, stored, memory_format):
    spikes = torch.randint(2, (timesteps * 2, 3, 4, 5)).bfloat16().contiguous(memory_format=memory_format)
    given, bits, _ = fired(spikes, timesteps)
    kept = SpikeBits(bits, timesteps, spikes.dtype)
    assert torch.equal(given, spikes)
    assert bits.shape == (stored * 2, 3, 4, 5) and kept.bytes_per_neuron == stored and kept.shape == (2, 3, 4, 5)
    again = kept.stream()
    assert torch.equal(again, spikes) and again.dtype == spikes.dtype and again.stride() == spikes.stride()
    counts = kept.counts()
    assert counts.dtype == torch.uint8 and counts.stride() == spikes[:2].stride()
    assert torch.equal(counts.to(spikes.dtype), spikes.unflatten(0, (timesteps, 2)).sum(0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("timesteps", "memory_format", "kernels_compiled"),
    cases((3,), (10,), compiled=(3,)),
    indirect=["kernels_compiled"],
)
@pytest.mark.usefixtures("kernels_compiled")
def test_neurons_add_bits_as_they_add_numbers(timesteps, memory_format):
    spikes = torch.randint(2, (timesteps * 2, 3, 4, 5)).double().contiguous(memory_format=memory_format)
    current = torch.randn(timesteps * 2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=memory_format)
    given, bits, _ = fired(spikes, timesteps)
    affine, config = [(torch.rand(3).double(), torch.rand(3).double()), None], NeuronConfig(leak=0.5)

    def layer(shortcut, stored):
        *outputs, means = firing.fire_with_rate(
            [current, shortcut], affine, [timesteps, stored], timesteps, config, config.leak
        )
        return [*outputs, means.rate, means.kappa, means.counts]

    for from_bits, from_numbers in zip(layer(bits, -(-timesteps // 8)), layer(given, timesteps), strict=True):
        assert torch.equal(from_bits, from_numbers)


def test_a_released_term_knows_its_shape_and_numbers():
    train = SpikingNeuron()(SpikeTrain.from_stream(torch.randn(4, 2, 3, 5, 5), "rate"))
    stream, rate = train.stream, train.rate
    train.release()
    (term,) = train.terms
    assert term.numbers is None
    assert train.shape == (2, 3, 5, 5) and train.ndim == 4 and train.dtype == torch.float32
    assert train.device.type == "cpu" and train.new_ones(2).dtype == torch.float32 and term.numbers is None
    assert torch.equal(train.stream, stream) and torch.equal(train.rate, rate)
    (twice,) = (train + train).terms[:1]
    assert twice.numbers is None  # what is pending shares the bits


@pytest.mark.parametrize(
    "layer",
    [
        lambda x: F.conv2d(x, torch.ones(2, 3, 2, 2)),
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: torch.cat([x, x], 1),
    ],
    ids=["conv2d", "max_pool2d", "avg_pool2d", "cat"],
)
def test_a_layer_lets_go_of_what_it_has_read(layer):
    train = SpikingNeuron()(SpikeTrain.from_stream(torch.randn(4, 2, 3, 5, 5), "rate"))
    first = layer(train)
    assert train.terms[0].numbers is None
    again = layer(train)
    assert torch.equal(again.stream, first.stream) and torch.equal(again.rate, first.rate)


def test_what_has_no_bits_keeps_its_numbers():
    numbers = torch.randn(6, 3)
    term = Term(numbers, 3)
    term.release()
    assert term.stream is numbers
    assert SpikingNeuron()(SpikeTrain.from_stream(torch.randn(4, 2, 3), "graph")).terms[0].bits is None


def test_neurons_whose_first_addend_is_released_fire_as_before():
    def layer(release):
        torch.manual_seed(0)
        spikes = SpikingNeuron()(SpikeTrain.from_stream(torch.randn(4, 2, 3, dtype=torch.float64), "rate"))
        current = SpikeTrain.from_stream(torch.randn(4, 2, 3, dtype=torch.float64), "rate")
        if release:
            spikes.release()
        return SpikingNeuron()(spikes + current).stream

    assert torch.equal(layer(True), layer(False))


def test_a_block_does_not_keep_the_steps_of_its_shortcut():
    """In its last convolution only what that reads has T steps; the code of block and caller holds bits."""
    timesteps, batch, alive = 4, 3, []
    snn = spiking(generic(Residual(NeuronConfig(leak=0.5))), timesteps).train()

    def count(module, args):
        gc.collect()
        found = {
            x.untyped_storage().data_ptr()
            for x in gc.get_objects()
            if type(x) is torch.Tensor and x.ndim == 4 and x.shape[0] == timesteps * batch
        }
        alive.append(len(found))

    snn.get_submodule("2.conv2.0").register_forward_pre_hook(count)
    snn(torch.randn(batch, 3, 8, 8, dtype=torch.float64)).sum().backward()
    assert alive == [1]


# -- what must not be taken for bits, or unpacked for nothing ------------------------------------------


def spikes(*shape, dtype=torch.float32):
    return SpikingNeuron()(SpikeTrain.from_stream(torch.randn(4, *shape, dtype=dtype), "rate"))


@pytest.fixture
def unpacked(monkeypatch):
    made, unpack = [], SpikeBits.stream
    monkeypatch.setattr(SpikeBits, "stream", lambda bits: made.append(bits) or unpack(bits))
    return made


@pytest.mark.parametrize("kind", ["plain", "rate"])
def test_a_current_of_bytes_is_no_bits(kind):
    x = SpikeTrain.constant(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), 9, kind)
    assert SpikingNeuron(NeuronConfig(leak=1.0))(x).stream.flatten(0, 1).tolist() == 9 * [[0, 1, 1, 1]]


def test_spikes_in_float64_make_the_current_float64():
    current, shortcut = SpikeTrain.from_stream(torch.randn(4, 2, 3), "rate"), spikes(2, 3, dtype=torch.float64)
    shortcut.release()
    assert [stream.dtype for stream in _currents(current + shortcut)[0]] == [torch.float32, torch.float64]
    shortcut = spikes(2, 3)
    shortcut.release()
    assert [stream.dtype for stream in _currents(current + shortcut)[0]] == [torch.float32, torch.uint8]


@pytest.mark.parametrize(
    "views",
    [lambda x: (x[:, :2], x[:, 2:]), lambda x: (x.flatten(2), x.permute(0, 2, 3, 1))],
    ids=["slices", "shapes"],
)
def test_views_share_the_numbers(views, unpacked):
    held = views(spikes(2, 4, 5, 5))
    assert len({y.terms[0].numbers.untyped_storage().data_ptr() for y in held}) == 1 and not unpacked


@pytest.mark.parametrize("nothing", [lambda x: x.contiguous(), lambda x: x.float()], ids=["contiguous", "float"])
def test_what_changes_nothing_leaves_spikes_spikes(nothing):
    x = spikes(2, 4, 5, 5)
    (term,) = nothing(x).terms
    assert term.bits is x.terms[0].bits and term.counts is x.terms[0].counts and term.bits is not None
    assert nothing(x).rate is x.rate


def test_a_gate_does_not_unpack_what_it_multiplies(unpacked):
    x = spikes(2, 4, 5, 5)
    x * SpikeTrain.constant(torch.sigmoid(x.mean((2, 3), keepdim=True).rate), 4, "rate")
    assert not unpacked


def test_a_norm_of_released_spikes_unpacks_once_and_keeps_bits(unpacked):
    x = spikes(2, 4, 5, 5, dtype=torch.float64)
    wanted = F.batch_norm(x, None, None, None, None, True).stream
    x.release()
    unpacked.clear()
    y = F.batch_norm(x, None, None, None, None, True)
    assert len(unpacked) == 1 and y.terms[0].numbers is None
    current = SpikeTrain.from_stream(torch.randn(4, 2, 4, 5, 5, dtype=torch.float64), "rate")
    fired = SpikingNeuron()(current + y).stream
    assert len(unpacked) == 1  # the neurons scale and shift the bits
    assert torch.equal(fired, SpikingNeuron()(current + SpikeTrain.from_stream(wanted, "rate")).stream)
    assert torch.equal(y.stream, wanted)


def test_spikes_that_are_concatenated_are_spikes(unpacked):
    x, y = spikes(2, 4, 5, 5), spikes(2, 3, 5, 5)
    wanted = torch.cat([x.stream, y.stream], 2), torch.cat([x.rate, y.rate], 1)
    found = torch.cat([x, y], 1)
    assert not unpacked and [train.terms[0].numbers for train in (x, y, found)] == [None] * 3
    assert torch.equal(found.stream, wanted[0]) and torch.equal(found.rate, wanted[1])
    assert torch.equal(found.terms[0].counts.rate(torch.float32), wanted[1])
    other = torch.cat([x, spikes(2, 3, 5, 5, dtype=torch.float64)], 1)
    assert other.terms[0].bits is None and other.stream.dtype == torch.float64
