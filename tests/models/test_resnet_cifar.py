"""The ResNets of Yu et al. for 32x32 images."""

import pytest
import torch
from reference import Reference, assert_same_training, train_once
from torch import nn
from toy_networks import generic, spiking

from models import NeuronConfig, SpikingNetwork, SpikingNeuron, create_snn
from models.resnet_cifar import resnet18_cifar, resnet19_cifar


def neuron():
    return SpikingNeuron(NeuronConfig())


def test_parameters_and_names():
    snn = create_snn("resnet18_cifar")
    assert sum(p.numel() for p in snn.parameters()) == 11_173_962
    names = ["conv0", "layer1", "layer2", "layer3", "layer4", "avg_pool", "classifier"]
    assert [name for name, _ in snn.named_children()] == names
    block = ["conv1", "bn1", "spike1", "conv2", "bn2", "shortcut", "spike2"]
    for stage in range(1, 5):
        layer = snn.get_submodule(f"layer{stage}")
        assert len(layer) == 2 and all([name for name, _ in b.named_children()] == block for b in layer)
        assert len(layer[0].shortcut) == (0 if stage == 1 else 2) and len(layer[1].shortcut) == 0
    assert [type(m) for m in snn.conv0] == [nn.Conv2d, nn.BatchNorm2d, SpikingNeuron]
    assert sum(isinstance(m, SpikingNeuron) for m in snn.modules()) == 17
    assert isinstance(snn, SpikingNetwork)
    assert all(conv.bias is None for conv in snn.modules() if isinstance(conv, nn.Conv2d))


def test_sizes_of_the_stages_are_those_that_feature_info_tells():
    snn = create_snn("resnet18_cifar", timesteps=2).eval()
    seen = {}
    for info in snn.feature_info:
        module = snn.get_submodule(info["module"])
        module.register_forward_hook(lambda m, args, out, name=info["module"]: seen.update({name: out.shape}))
    snn(torch.randn(2, 3, 32, 32))
    assert {name: tuple(shape) for name, shape in seen.items()} == {
        "conv0": (2, 64, 32, 32),
        "layer1": (2, 64, 32, 32),
        "layer2": (2, 128, 16, 16),
        "layer3": (2, 256, 8, 8),
        "layer4": (2, 512, 4, 4),
    }
    for info in snn.feature_info:
        shape = seen[info["module"]]
        assert info["num_chs"] == shape[1] and info["reduction"] == 32 // shape[2]


def test_classes_channels_and_constants():
    neuron = NeuronConfig(leak=0.5, reset="hard")
    snn = create_snn("resnet18_cifar", num_classes=7, timesteps=3, in_chans=1, neuron=neuron, algorithm="bptt").eval()
    assert snn(torch.randn(2, 1, 16, 16)).shape == (2, 7)
    assert (snn.num_classes, snn.timesteps, snn.in_chans, snn.algorithm) == (7, 3, 1, "bptt")
    assert all(m.config == neuron for m in snn.modules() if isinstance(m, SpikingNeuron))
    assert create_snn("resnet18_cifar").classifier.out_features == 10 and create_snn("resnet18_cifar").timesteps == 4


def test_parameters_and_layers_of_resnet19():
    with torch.device("meta"):
        networks = {classes: resnet19_cifar(classes, 3, None, neuron) for classes in (10, 100)}
    # counted in the authors' code
    assert sum(p.numel() for p in networks[10].parameters()) == 12_697_994
    assert sum(p.numel() for p in networks[100].parameters()) == 12_721_124
    snn = networks[10]
    assert [name for name, _ in snn.named_children()] == [
        *("conv0", "layer1", "layer2", "layer3", "avg_pool", "classifier")
    ]
    assert [len(snn.get_submodule(f"layer{stage}")) for stage in (1, 2, 3)] == [3, 3, 2]
    assert [type(m) for m in snn.classifier] == [nn.Linear, SpikingNeuron, nn.Linear]
    assert [(m.in_features, m.out_features) for m in snn.classifier[::2]] == [(512, 256), (256, 10)]
    assert sum(isinstance(m, SpikingNeuron) for m in snn.modules()) == 18
    assert all(m.bias is None for m in snn.modules() if isinstance(m, nn.Conv2d))


def test_sizes_of_the_stages_of_resnet19():
    network, seen = resnet19_cifar(7, 1, 16, neuron), []
    for info in network.feature_info:
        stage = network.get_submodule(info["module"])
        stage.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    assert spiking(network, 2, in_chans=1)(torch.randn(3, 1, 32, 32)).shape == (3, 7)
    assert seen == [(3, 16, 32, 32), (3, 16, 32, 32), (3, 32, 16, 16), (3, 64, 8, 8)]
    assert [(i["num_chs"], 32 // i["reduction"]) for i in network.feature_info] == [s[1:3] for s in seen]
    assert [i["module"] for i in network.feature_info] == ["conv0", "layer1", "layer2", "layer3"]
    assert network.num_classes == 7


@pytest.mark.parametrize(("build", "paper_width"), [(resnet18_cifar, 64), (resnet19_cifar, 128)])
def test_all_channels_scale_with_the_width(build, paper_width):
    with torch.device("meta"):
        paper, narrow = build(10, 3, None, neuron), build(10, 3, 6, neuron)
        wide = build(10, 3, paper_width, neuron)
    assert narrow.conv0[0].out_channels == 6
    for a, b in zip(paper.modules(), narrow.modules(), strict=True):
        if isinstance(a, nn.Conv2d):
            assert b.out_channels == a.out_channels * 6 // paper_width
        if isinstance(a, nn.Linear):
            assert b.in_features == a.in_features * 6 // paper_width
            assert b.out_features == (10 if a.out_features == 10 else a.out_features * 6 // paper_width)
    assert [p.shape for p in wide.parameters()] == [p.shape for p in paper.parameters()]
    for width in (0, -4, 2.5, True):
        with pytest.raises(ValueError, match=f"width must be an integer of at least 1 or None, found {width}"):
            build(10, 3, width, neuron)


@pytest.mark.parametrize("timesteps", [1, 3])
@pytest.mark.parametrize("build", [resnet18_cifar, resnet19_cifar])
def test_a_narrow_one_trains_as_the_reference(build, timesteps):
    network = generic(build(5, 3, 6, lambda: SpikingNeuron(NeuronConfig(leak=0.5, threshold=0.7))))
    ours, reference = spiking(network, timesteps), Reference(network, timesteps)
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert_same_training(train_once(ours, ours, images), train_once(reference, reference.network, images))
