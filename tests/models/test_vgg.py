"""The VGGs of Yu et al."""

import pytest
import torch
from reference import Reference, assert_same_training, train_once
from torch import nn
from toy_networks import generic, spiking

from models import NeuronConfig, SpikingNeuron
from models.vgg import vgg11_cifar, vgg13_cifar, vggsnn_cifar, vggsnn_dvs


def neuron():
    return SpikingNeuron(NeuronConfig())


# parameters of vgg11, vgg13, vggsnn_cifar and vggsnn_dvs, counted in the authors' code, and its lists of layers:
# a number is a convolution with norm and neurons, A a 2x2 average pool, A1 and A3 pools to 1x1 and 3x3
@pytest.mark.parametrize(
    ("build", "parameters", "layers"),
    [
        (vgg11_cifar, {10: 11_001_354, 100: 11_047_524}, "64 A 128 256 A 512 512 A 512 A 512 512 A1"),
        (vgg13_cifar, {10: 9_416_010, 100: 9_462_180}, "64 64 A 128 128 A 256 256 A 512 512 512 A 512 A1"),
        (vggsnn_cifar, {10: 9_272_074, 100: 9_686_884}, "64 128 A 256 256 A 512 512 A 512 512 A3"),
        (vggsnn_dvs, {10: 9_272_074, 100: 9_686_884}, "64 128 A 256 256 A 512 512 A 512 512 A"),
    ],
)
def test_parameters_and_layers_are_the_authors(build, parameters, layers):
    with torch.device("meta"):
        networks = {classes: build(classes, 3, None, neuron) for classes in parameters}
    assert {k: sum(p.numel() for p in network.parameters()) for k, network in networks.items()} == parameters
    found: list[str] = []
    leaves = [m for part in networks[10].children() for m in (part if isinstance(part, nn.Sequential) else [part])]
    for i, module in enumerate(leaves):
        if isinstance(module, nn.Conv2d):
            assert isinstance(leaves[i + 1], nn.BatchNorm2d) and isinstance(leaves[i + 2], SpikingNeuron)
            assert module.kernel_size == (3, 3) and module.padding == (1, 1) and module.bias is not None
            found.append(str(module.out_channels))
        elif isinstance(module, nn.AvgPool2d):
            assert (module.kernel_size, module.stride) == (2, 2)
            found.append("A")
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            found.append(f"A{module.output_size}")
    assert " ".join(found) == layers
    assert sum(isinstance(m, SpikingNeuron) for m in leaves) == sum(name.isdigit() for name in found)
    assert [name for name, _ in networks[10].named_children()][-2:] == ["avg_pool", "classifier"]


@pytest.mark.parametrize(
    ("build", "size", "stages"),
    [
        (vgg11_cifar, 32, [(8, 32), (32, 16), (64, 8), (64, 4), (64, 2)]),
        (vgg13_cifar, 32, [(8, 32), (16, 16), (32, 8), (64, 4), (64, 2)]),
        (vggsnn_cifar, 32, [(16, 32), (32, 16), (64, 8), (64, 4)]),
        (vggsnn_dvs, 48, [(16, 48), (32, 24), (64, 12), (64, 6)]),
    ],
)
def test_sizes_of_the_stages_are_those_that_feature_info_tells(build, size, stages):
    network, seen = build(7, 2, 8, neuron), []
    for info in network.feature_info:
        stage = network.get_submodule(info["module"])
        stage.register_forward_hook(lambda m, args, out: seen.append((*out.shape, *out.folded.unique().tolist())))
    assert spiking(network, 2, in_chans=2)(torch.randn(3, 2, size, size)).shape == (3, 7)
    assert seen == [(3, channels, side, side, 0, 1) for channels, side in stages]  # and each stage gives spikes
    assert [i["module"] for i in network.feature_info] == [f"stage{i + 1}" for i in range(len(stages))]
    assert [(i["num_chs"], size // i["reduction"]) for i in network.feature_info] == stages
    assert network.num_classes == 7


@pytest.mark.parametrize("build", [vgg11_cifar, vgg13_cifar, vggsnn_cifar, vggsnn_dvs])
def test_all_channels_scale_with_the_width(build):
    paper, narrow = build(10, 3, None, neuron), build(10, 3, 8, neuron)
    for a, b in zip(paper.modules(), narrow.modules(), strict=True):
        if isinstance(a, nn.Conv2d):
            assert b.out_channels * 8 == a.out_channels
    assert narrow.classifier.in_features * 8 == paper.classifier.in_features
    assert narrow.classifier.out_features == 10
    with pytest.raises(ValueError, match=r"width must be an integer of at least 1 or None, found 0"):
        build(10, 3, 0, neuron)


@pytest.mark.parametrize("leak", [0.2, 1.0])
@pytest.mark.parametrize(
    ("build", "size"), [(vgg11_cifar, 16), (vgg13_cifar, 16), (vggsnn_cifar, 16), (vggsnn_dvs, 48)]
)
def test_a_narrow_one_trains_as_the_reference(build, size, leak):
    network = generic(build(5, 3, 4, lambda: SpikingNeuron(NeuronConfig(leak=leak))))
    ours, reference = spiking(network, 3), Reference(network, 3)
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    assert_same_training(train_once(ours, ours, images), train_once(reference, reference.network, images))


def test_the_dvs_network_takes_one_size_only():
    snn = spiking(vggsnn_dvs(10, 2, 4, neuron), 3, in_chans=2)
    assert snn(torch.randn(3, 2, 2, 48, 48)).shape == (2, 10)
    for shape in [(2, 2, 32, 64), (3, 2, 2, 32, 64)]:
        with pytest.raises(ValueError, match="takes images of 48x48 pixels, found 32x64"):
            snn(torch.randn(shape))
    with pytest.raises(ValueError, match="found 48x50"):  # which four average pools would have taken
        snn(torch.randn(2, 2, 48, 50))


def test_convolutions_start_as_the_authors_and_the_classifier_as_pytorchs():
    network = vggsnn_cifar(10, 3, 16, neuron)
    for conv in (m for m in network.modules() if isinstance(m, nn.Conv2d)):
        torch.testing.assert_close(conv.weight.std().item(), 0.5, rtol=0.1, atol=0)
        assert not conv.bias.any()
    bound = (128 * 9) ** -0.5  # one over the root of the inputs
    assert 0.99 * bound < network.classifier.weight.abs().max() <= bound
