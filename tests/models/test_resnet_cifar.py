"""The ResNet-18 of Yu et al. for 32x32 images."""

import torch
from torch import nn

from models import NeuronConfig, SpikingNetwork, SpikingNeuron, create_snn


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
