"""The pre-activation ResNet-34 of Yu et al."""

import pytest
import torch
import torch.nn.functional as F
from reference import Reference, assert_same_training, train_once
from torch import nn
from toy_networks import generic, spiking

from models import NeuronConfig, SpikingNeuron
from models.preact_resnet import PreActBlock, preact_resnet34


def neuron():
    return SpikingNeuron(NeuronConfig())


def test_parameters():
    with torch.device("meta"):
        networks = {classes: preact_resnet34(classes, 3, None, neuron) for classes in (10, 1000)}
    # counted in the authors' code
    assert sum(p.numel() for p in networks[10].parameters()) == 21_298_314
    assert sum(p.numel() for p in networks[1000].parameters()) == 21_806_184
    modules = list(networks[10].modules())
    assert sum(isinstance(m, SpikingNeuron) for m in modules) == 32
    assert all(m.bias is not None for m in modules if isinstance(m, nn.Conv2d))
    assert [type(m) for m in networks[10].conv0] == [nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d]


def test_a_block_is_two_activations_norms_and_a_shortcut_of_the_current():
    block, x = PreActBlock(3, 4, 2, nn.ReLU).double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    p = dict(block.named_parameters())
    norm = (1 + block.bn1.eps) ** -0.5  # fresh running statistics: mean 0, variance 1
    out = F.conv2d(x.relu(), p["conv1.weight"], p["conv1.bias"], stride=2, padding=1) * norm
    out = F.conv2d(out.relu(), p["conv2.weight"], p["conv2.bias"], padding=1) * norm
    shortcut = F.conv2d(x, p["shortcut.0.weight"], p["shortcut.0.bias"], stride=2) * norm
    torch.testing.assert_close(block(x), out + shortcut)
    same = PreActBlock(3, 3, 1, nn.ReLU).eval()
    nn.init.zeros_(same.bn2.weight)
    assert torch.equal(same(x.float()), x.float())


def test_sizes_of_the_stages_are_those_that_feature_info_tells():
    network, seen = preact_resnet34(7, 2, 8, neuron), []
    for info in network.feature_info:
        stage = network.get_submodule(info["module"])
        stage.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    assert spiking(network, 2, in_chans=2)(torch.randn(3, 2, 64, 64)).shape == (3, 7)
    assert seen == [(3, 8, 16, 16), (3, 8, 16, 16), (3, 16, 8, 8), (3, 32, 4, 4), (3, 64, 2, 2)]
    assert [i["module"] for i in network.feature_info] == ["conv0", "layer1", "layer2", "layer3", "layer4"]
    assert [(i["num_chs"], 64 // i["reduction"]) for i in network.feature_info] == [s[1:3] for s in seen]
    assert network.num_classes == 7


def test_all_channels_scale_with_the_width():
    with torch.device("meta"):
        paper, narrow = preact_resnet34(10, 3, None, neuron), preact_resnet34(10, 3, 8, neuron)
    for a, b in zip(paper.modules(), narrow.modules(), strict=True):
        if isinstance(a, nn.Conv2d):
            assert b.out_channels * 8 == a.out_channels
    assert narrow.classifier.in_features * 8 == paper.classifier.in_features
    with pytest.raises(ValueError, match=r"width must be an integer of at least 1 or None, found 0"):
        preact_resnet34(10, 3, 0, neuron)


@pytest.mark.parametrize("timesteps", [1, 3])
@pytest.mark.parametrize("reset", ["soft", "hard"])
def test_a_narrow_one_trains_as_the_reference(reset, timesteps):
    network = generic(preact_resnet34(5, 3, 4, lambda: SpikingNeuron(NeuronConfig(leak=0.5, reset=reset))))
    ours, reference = spiking(network, timesteps), Reference(network, timesteps)
    images = torch.randn(3, 3, 36, 36, dtype=torch.float64)
    assert_same_training(train_once(ours, ours, images), train_once(reference, reference.network, images))


def test_convolutions_start_from_he_normal():
    weight = preact_resnet34(10, 3, 16, neuron).layer4[0].conv1.weight  # 128 channels of 64, 3x3
    torch.testing.assert_close(weight.std().item(), (2 / (128 * 9)) ** 0.5, rtol=0.02, atol=0)
