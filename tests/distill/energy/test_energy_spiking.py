"""Operations of spiking networks, counted by hand."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from spikingjelly.activation_based.op_counter import DispatchCounterMode, SynOpCounter
from timm.layers import Conv2dSame, SqueezeExcite
from torch import nn
from torch.utils.data import DataLoader
from toy_networks import calibrated, spiking, whole_and_stepped

from distill.energy import spiking_costs
from distill.energy.spiking import _Counter
from models import DSRConfig, NeuronConfig, PoissonEncoder, SpikingNeuron, create_snn, spiking_twin

FIRES_EACH_STEP = NeuronConfig(leak=1.0, threshold=1.0)


def neuron():
    return SpikingNeuron(FIRES_EACH_STEP)


def costs(network, stream, timesteps=None, **options):
    """Of a network on given frames (T, B, C, H, W), or images (B, C, H, W) and T."""
    channels = stream.shape[-3]
    snn = spiking(network.double(), timesteps or len(stream), in_chans=channels).eval()
    labels = torch.zeros(stream.shape[-4], dtype=torch.long)
    return spiking_costs(Accelerator(cpu=True), [(stream.double(), labels)], snn, **options)


def layers(network, stream, timesteps=None):
    return {layer.name: layer for layer in costs(network, stream, timesteps).whole.layers}


def strided():
    return nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False), nn.Flatten(), nn.Linear(32, 5))


def test_synaptic_operations_of_spikes_written_out_with_padding_and_stride():
    """3x3 places, kernel 3, stride 2, padding 1: a corner reaches 1 output place, an edge 2, the centre 4."""
    frames = torch.tensor([[[1, 0, 0], [0, 0, 0], [0, 0, 0]], [[0, 1, 0], [0, 1, 0], [0, 0, 0]]])[:, None, None]
    found = layers(strided(), frames)
    assert found["0"].spiking and found["0"].acs == 8 * (1 + (2 + 4)) and found["0"].macs == 0
    # two steps: 72 weights of 32 bits; 9 places of one bit, written and read
    assert found["0"].bits == 2 * (32 * 72 + 2 * 9)
    # its output is no spikes: 2 steps of 32 x 5
    assert not found["2"].spiking and found["2"].macs == 2 * 32 * 5 and found["2"].acs == 0
    assert found["2"].bits == 2 * (32 * (160 + 5) + 2 * 32 * 32)


def test_a_sum_of_spikes_counts_as_many_and_takes_more_bits():
    frames = torch.tensor([[[3, 0, 0], [0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 2, 0], [0, 0, 0]]])[:, None, None]
    found = layers(strided(), frames)["0"]
    assert found.acs == 8 * (3 * 1 + 2 * 4) and found.bits == 2 * (32 * 72 + 2 * 2 * 9)


@pytest.mark.parametrize("value", [0.5, -1.0, float("nan")])
def test_what_is_no_count_of_spikes_multiplies(value):
    frames = torch.zeros(2, 1, 1, 3, 3)
    frames[1, 0, 0, 1, 1] = value
    found = layers(strided(), frames)["0"]
    # 2 steps of 4 output places, 8 channels and 9 weights, the padding included
    assert not found.spiking and found.macs == 2 * 4 * 8 * 9 and found.acs == 0
    assert found.bits == 2 * (32 * 72 + 2 * 32 * 9)


def test_one_image_that_is_no_spikes_makes_a_layer_analogue_for_all():
    snn = spiking(strided().double(), 1, in_chans=1).eval()
    spikes, grey = torch.ones(1, 1, 1, 3, 3, dtype=torch.float64), torch.full((1, 1, 1, 3, 3), 0.5).double()
    label = torch.zeros(1, dtype=torch.long)
    for batches in ([(grey, label), (spikes, label)], [(spikes, label), (grey, label)]):
        found = spiking_costs(Accelerator(cpu=True), batches, snn)
        assert not found.whole.layers[0].spiking and found.images == 2


def test_counts_that_are_the_same_at_each_step_are_added_at_each():
    image = torch.zeros(1, 1, 3, 3)
    image[0, 0, 1, 1] = 1
    for steps in (1, 3):
        found = layers(strided(), image, steps)["0"]
        assert found.spiking and found.acs == steps * 4 * 8


def test_an_image_multiplies_at_every_step_though_it_is_convolved_once():
    image = torch.full((1, 1, 3, 3), 0.5)
    for steps in (1, 3):
        assert layers(strided(), image, steps)["0"].macs == steps * 4 * 8 * 9


def test_drawn_spikes_are_spikes():
    snn = spiking(strided(), 4, in_chans=1).eval()
    snn.input_encoder = PoissonEncoder()
    images = torch.full((64, 1, 3, 3), 0.5)
    found = spiking_costs(Accelerator(cpu=True), [(images, torch.zeros(64, dtype=torch.long))], snn).whole.layers[0]
    # on average half of 9 places fire: 4 corners reach 1, 4 edges 2, the centre 4 places of 8 channels
    assert found.spiking and found.acs == pytest.approx(4 * 0.5 * (4 * 1 + 4 * 2 + 4) * 8, rel=0.05)


class Net(nn.Module):
    """A neuron that fires where and when the input is 1, then whatever is under test, then a linear layer."""

    def __init__(self, middle, features):
        super().__init__()
        self.fire, self.middle, self.head = neuron(), middle, nn.Linear(features, 3, bias=False)

    def forward(self, x):
        return self.head(self.middle(self.fire(x)).flatten(1))


CASES = {
    # 4x4 spikes in 8 channels at each of 2 steps, all of them 1: 128 a step
    "average pool": (nn.AvgPool2d((1, 3), stride=1), 64, {"head": ("macs", 2 * 64 * 3)}),
    "max pool": (nn.MaxPool2d(2), 32, {"head": ("acs", 2 * 32 * 3)}),
    "pool of one place": (nn.AvgPool2d(1), 128, {"head": ("acs", 2 * 128 * 3)}),
    "nothing": (nn.Identity(), 128, {"head": ("acs", 2 * 128 * 3)}),
    "linear bottleneck": (
        nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, bias=False), neuron()),
        128,
        {"middle.0": ("acs", 2 * 128 * 8), "middle.2": ("macs", 2 * 16 * 8 * 8)},
    ),
    "depthwise": (
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), neuron()),
        128,
        # 3x3 on 4x4 with borders: (2 * 2 + 2 * 3) ** 2 = 100 pairs of place and output, one output channel each
        {"middle.0": ("acs", 2 * 8 * 100)},
    ),
    "grouped": (
        nn.Sequential(nn.Conv2d(8, 16, 3, groups=2, bias=False), neuron()),
        64,
        # without padding 2x2 outputs of 9 places: 36 pairs, 16 / 2 output channels
        {"middle.0": ("acs", 2 * 8 * 36 * 8)},
    ),
    "functional, padded first": (
        nn.Sequential(Conv2dSame(8, 8, 3, stride=2, bias=False), neuron()),
        32,
        # 2x2 outputs; the padding is behind: places 0-2 and 2-4 of 4, so 3 + 2 = 5 pairs an axis
        {"middle.0": ("acs", 2 * 8 * 25 * 8)},
    ),
    "same": (
        nn.Sequential(nn.Conv2d(8, 8, 2, padding="same", bias=False), neuron()),
        128,
        # one zero behind: 4 + 3 = 7 pairs an axis
        {"middle.0": ("acs", 2 * 8 * 49 * 8)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_layer_gets_decides_how_it_counts(case):
    middle, features, expected = CASES[case]
    frames = torch.ones(2, 1, 8, 4, 4)
    if case == "average pool":
        frames[..., 0] = 0  # the mean of equal spikes would be one
    found = layers(Net(copy.deepcopy(middle), features), frames)
    for name, (kind, count) in expected.items():
        layer = found[name]
        assert layer.spiking == (kind == "acs") and (layer.acs, layer.macs) == (
            (count, 0) if layer.spiking else (0, count)
        )


def test_a_gate_multiplies_at_every_step():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.se, self.head = nn.ReLU(), SqueezeExcite(8, rd_channels=8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.se(self.act(x)).mean((2, 3)))

    twin = spiking_twin(Gated().eval(), 3, FIRES_EACH_STEP, gates="keep", input_size=(8, 4, 4))
    frames = (torch.rand(3, 1, 8, 4, 4) < 0.5).float()
    found = spiking_costs(Accelerator(cpu=True), [(frames, torch.zeros(1, dtype=torch.long))], twin).whole
    assert {layer.name: (layer.macs, layer.acs) for layer in found.layers} == {
        "se.fc1": (3 * 64, 0), "se.fc2": (3 * 64, 0), "head": (3 * 24, 0)
    }  # fmt: skip
    assert found.mac_share == 1


class Twice(nn.Module):
    """A sum of spikes (SEW) goes through one convolution twice."""

    def __init__(self):
        super().__init__()
        self.fire, self.conv, self.again = neuron(), nn.Conv2d(8, 8, 1, bias=False), neuron()
        nn.init.eye_(self.conv.weight[:, :, 0, 0])

    def forward(self, x):
        spikes = self.fire(x)
        first = self.again(self.conv(spikes + spikes))  # 2 reaches the threshold of 1
        return self.conv(first).mean((2, 3))


def test_each_call_of_a_module_counts_and_sums_of_spikes_count_twice():
    frames = torch.zeros(2, 1, 8, 4, 4)
    frames[0, 0, :3, 1, 2] = 1  # three spikes
    found = layers(Twice(), frames)
    assert list(found) == ["conv", "conv (call 2)"]
    assert found["conv"].acs == 3 * 2 * 8 and found["conv (call 2)"].spiking
    # u = 2 at step 1: fires, 1 is left, which fires at step 2 (leak 1, soft reset)
    assert found["conv (call 2)"].acs == 2 * 3 * 8


def test_membranes_are_read_and_written_once_a_step():
    found = costs(Net(nn.MaxPool2d(2), 32), torch.ones(2, 1, 8, 4, 4)).whole
    assert found.membrane_bits == 2 * 128 * 2 * 32
    assert found.memory_uj == pytest.approx(3.12e-6 * (2 * 128 * 64 + 2 * (32 * 96 + 2 * 32)))


def test_the_mean_is_over_images_of_all_batches():
    frames = torch.zeros(2, 7, 1, 3, 3)
    for image in range(7):
        frames[0, image, 0].view(-1)[: image + 1] = 1
    snn = spiking(strided(), 2, in_chans=1).eval()
    batches = [(part, torch.zeros(part.shape[1], dtype=torch.long)) for part in frames.split([3, 3, 1], dim=1)]
    found = spiking_costs(Accelerator(cpu=True), batches, snn)
    reach = [1, 2, 1, 2, 4, 2, 1]  # of the places in their order
    assert found.images == 7 and found.whole.layers[0].acs == pytest.approx(
        8 * sum(sum(reach[: image + 1]) for image in range(7)) / 7
    )


@pytest.mark.parametrize("case", ["strided", "grouped", "dilated", "linear"])
def test_spikingjellys_counter_counts_the_same_where_it_can(case):
    made = {
        "strided": lambda: nn.Conv2d(8, 16, 3, stride=2, padding=1),
        "grouped": lambda: nn.Conv2d(8, 16, (3, 2), padding=(0, 1), groups=4),
        "dilated": lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(8 * 7 * 9, 11)),
    }
    module = made[case]()
    frames = (torch.rand(3, 2, 8, 7, 9) < 0.3).float()
    counter = SynOpCounter()
    with torch.no_grad(), DispatchCounterMode([counter]):
        module(frames.flatten(0, 1))
    network = nn.Sequential(module, nn.Flatten()) if case != "linear" else module
    (layer,) = costs(network, frames).whole.layers
    assert layer.spiking and 2 * layer.acs == counter.get_total() > 0


def test_what_ran_until_a_module_is_what_runs_when_the_network_stops_there():
    torch.manual_seed(1)
    snn = create_snn("resnet18_cifar", 3, 2, 2, width=8).double().eval()
    images = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    loader = [(images, torch.zeros(2, dtype=torch.long))]
    names = [name for name, _ in snn.named_children()][1:3]
    whole = spiking_costs(Accelerator(cpu=True), loader, snn, cuts=names)
    for name in names:
        alone = spiking_costs(Accelerator(cpu=True), loader, snn, until=name).whole
        assert whole.up_to[name] == alone and 0 < len(alone.layers) < len(whole.whole.layers)
    assert whole.whole == spiking_costs(Accelerator(cpu=True), loader, snn).whole


def named(cost):
    """The layers of a part that is called "inner" in another network."""
    return [dataclasses.replace(layer, name=layer.name.removeprefix("inner.")) for layer in cost.layers]


@pytest.mark.parametrize("toy", ["Residual", "SharedNeuron"])
def test_a_layer_that_runs_a_step_at_a_time_is_one_layer_of_all_steps(toy):
    torch.manual_seed(2)
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    snn, stepped = whole_and_stepped(toy, 5, images)
    loader = [(images, torch.zeros(3, dtype=torch.long))]
    cuts = ["2", "4"] if toy == "Residual" else ["b", "spike"]
    whole = spiking_costs(Accelerator(cpu=True), loader, snn, cuts=cuts)
    found = spiking_costs(Accelerator(cpu=True), loader, stepped, cuts=[f"inner.{name}" for name in cuts])
    assert named(found.whole) == list(whole.whole.layers) and any(layer.acs > 0 for layer in whole.whole.layers)
    assert found.whole.membrane_bits == whole.whole.membrane_bits
    for name in cuts:
        assert named(found.up_to[f"inner.{name}"]) == list(whole.up_to[name].layers)
        assert found.up_to[f"inner.{name}"].membrane_bits == whole.up_to[name].membrane_bits


def test_counts_of_steps_are_those_of_the_whole_pass_image_by_image():
    torch.manual_seed(2)
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    snn = calibrated(create_snn("resnet18_cifar", width=8, timesteps=3).double(), images)
    counter = _Counter(snn, ())
    with torch.no_grad(), counter.counting():
        snn(images)
    whole, bits = counter.per_image(), dict(counter.membrane_bits)
    with counter.counting():
        for _ in snn.steps(images):
            pass
    assert counter.per_image().equal(whole) and counter.membrane_bits == bits
    assert not whole[0, :, 0].equal(whole[1, :, 0])


def test_spikes_of_dsr_count_once_however_large_they_are():
    snn = create_snn("resnet18_cifar", 3, 4, 2, algorithm="dsr", width=8, dsr=DSRConfig(threshold=2.0, alpha=0.5))
    for name in ("conv0.0", "conv0.1"):
        nn.init.zeros_(snn.get_submodule(name).weight)
    nn.init.ones_(snn.conv0[1].bias)  # every neuron behind it fires at two of four steps, as large as 2
    loader = [(torch.rand(1, 2, 8, 8), torch.zeros(1, dtype=torch.long))]
    found = {layer.name: layer for layer in spiking_costs(Accelerator(cpu=True), loader, snn.eval()).whole.layers}
    name = next(name for name in found if name != "conv0.0")  # 3x3 on 8x8 with borders: 22 pairs an axis
    assert found[name].spiking and found[name].acs == 2 * 8 * 22**2 * 8
    assert found[name].bits == 4 * (32 * 8 * 8 * 9 + 2 * 8 * 64)


def test_counting_leaves_network_and_random_numbers_as_they_were():
    snn = spiking(strided(), 2, in_chans=1).eval()
    images = torch.rand(2, 1, 3, 3)
    before, state = snn(images), torch.get_rng_state()
    spiking_costs(Accelerator(cpu=True), DataLoader([(i, 0) for i in images], 2, generator=torch.Generator()), snn)
    assert torch.get_rng_state().equal(state) and snn(images).equal(before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in snn.modules())
    assert F.conv2d(images, snn[0].weight).shape == (2, 8, 1, 1)
