"""SEW ResNets, against SpikingJelly's."""

import pytest
import torch
from reference import Reference, assert_same_training, train_once
from spikingjelly.activation_based import functional
from spikingjelly.activation_based import neuron as sj_neuron
from spikingjelly.activation_based.model import sew_resnet as spikingjelly
from torch import nn
from toy_networks import generic, spiking

from models import NeuronConfig, SpikingNeuron
from models.sew_resnet import sew_resnet18, sew_resnet34, sew_resnet50


def neuron():
    return SpikingNeuron(NeuronConfig())


# counted in SpikingJelly's sew_resnet18 and sew_resnet50 (cnf="ADD"), and in the sew_resnet34 of Yu et al.'s code
@pytest.mark.parametrize(
    ("build", "parameters", "neurons", "bias"),
    [
        (sew_resnet18, {10: 11_181_642, 1000: 11_689_512}, 20, False),
        (sew_resnet34, {10: 21_298_314, 1000: 21_806_184}, 36, True),
        (sew_resnet50, {10: 23_528_522, 1000: 25_557_032}, 53, False),
    ],
)
def test_parameters(build, parameters, neurons, bias):
    with torch.device("meta"):
        networks = {classes: build(classes, 3, None, neuron) for classes in parameters}
    assert {k: sum(p.numel() for p in network.parameters()) for k, network in networks.items()} == parameters
    modules = list(networks[10].modules())
    assert sum(isinstance(m, SpikingNeuron) for m in modules) == neurons
    assert all((m.bias is not None) == bias for m in modules if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(
    ("build", "theirs"),
    [(sew_resnet18, spikingjelly.sew_resnet18), (sew_resnet50, spikingjelly.sew_resnet50)],
)
def test_logits_are_those_of_spikingjelly(build, theirs):
    network = generic(build(10, 3, None, lambda: SpikingNeuron(NeuronConfig(leak=0.5))))
    node = dict(spiking_neuron=sj_neuron.LIFNode, tau=2.0, decay_input=False, v_reset=None)
    other = theirs(cnf="ADD", num_classes=10, **node).double()
    ours = network.state_dict()
    assert [v.shape for v in ours.values()] == [v.shape for v in other.state_dict().values()]
    other.load_state_dict(dict(zip(other.state_dict(), ours.values(), strict=True)))
    functional.set_step_mode(other, "m")
    images = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        expected = other(images.expand(2, *images.shape)).mean(0)
        found = spiking(network, 2)(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("build", "channels"),
    [
        (sew_resnet18, [8, 8, 16, 32, 64]),
        (sew_resnet34, [8, 8, 16, 32, 64]),
        (sew_resnet50, [8, 32, 64, 128, 256]),
    ],
)
def test_sizes_of_the_stages_are_those_that_feature_info_tells(build, channels):
    network, seen = build(7, 2, 8, neuron), []
    for info in network.feature_info:
        stage = network.get_submodule(info["module"])
        stage.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    assert spiking(network, 2, in_chans=2)(torch.randn(3, 2, 64, 64)).shape == (3, 7)
    sides = [16, 16, 8, 4, 2]
    assert seen == [(3, c, side, side) for c, side in zip(channels, sides, strict=True)]
    assert [i["module"] for i in network.feature_info] == ["conv0", "layer1", "layer2", "layer3", "layer4"]
    assert [(i["num_chs"], 64 // i["reduction"]) for i in network.feature_info] == list(
        zip(channels, sides, strict=True)
    )
    assert network.num_classes == 7


@pytest.mark.parametrize("build", [sew_resnet18, sew_resnet34, sew_resnet50])
def test_all_channels_scale_with_the_width(build):
    with torch.device("meta"):
        paper, narrow = build(10, 3, None, neuron), build(10, 3, 8, neuron)
    for a, b in zip(paper.modules(), narrow.modules(), strict=True):
        if isinstance(a, nn.Conv2d):
            assert b.out_channels * 8 == a.out_channels
    assert narrow.classifier.in_features * 8 == paper.classifier.in_features
    with pytest.raises(ValueError, match=r"width must be an integer of at least 1 or None, found -1"):
        build(10, 3, -1, neuron)


@pytest.mark.parametrize("timesteps", [1, 3])
@pytest.mark.parametrize("build", [sew_resnet18, sew_resnet34, sew_resnet50])
def test_a_narrow_one_trains_as_the_reference(build, timesteps):
    network = generic(build(5, 3, 4, lambda: SpikingNeuron(NeuronConfig(leak=0.5))))
    ours, reference = spiking(network, timesteps), Reference(network, timesteps)
    images = torch.randn(3, 3, 36, 36, dtype=torch.float64)
    assert_same_training(train_once(ours, ours, images), train_once(reference, reference.network, images))


def test_convolutions_start_from_he_normal():
    network = sew_resnet18(10, 3, 16, neuron)
    weight = network.layer4[0].conv1[0].weight  # 128 channels of 64, 3x3
    torch.testing.assert_close(weight.std().item(), (2 / (128 * 9)) ** 0.5, rtol=0.02, atol=0)
