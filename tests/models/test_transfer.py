"""Weights of one network in another: what is copied, from where, and what is left and said to be left."""

import copy
import dataclasses

import pytest
import timm
import torch
from torch import nn

from models import NeuronConfig, SpikingNeuron, create_ann, create_snn, spiking_twin
from models.transfer import copy_weights


@torch.no_grad()
def scrambled(network):
    """Every parameter and buffer its own random numbers: a wrong copy is a different one."""
    for tensor in network.state_dict().values():
        tensor.copy_(torch.randint(1, 100, tensor.shape) if tensor.dtype == torch.long else torch.randn(tensor.shape))
    return network


def transfer(ann, snn):
    """Copies, and checks what has to hold of any copy: each value is where the report says it is from, each source
    serves once, nothing else changed, and the sources go forward with their targets."""
    scrambled(ann), scrambled(snn)
    source, before = copy.deepcopy(ann.state_dict()), copy.deepcopy(snn.state_dict())
    result = copy_weights(ann, snn)
    after = snn.state_dict()
    assert all(torch.equal(source[name], value) for name, value in ann.state_dict().items())
    assert set(result.copied) | set(result.kept) | set(result.zeroed) == set(after)
    assert len(result.copied) + len(result.kept) + len(result.zeroed) == len(after)
    assert len(set(result.copied.values())) == len(result.copied)
    for name, origin in result.copied.items():
        assert torch.equal(after[name], source[origin]), name
        assert after[name].data_ptr() != ann.state_dict()[origin].data_ptr()
    assert all(torch.equal(after[name], before[name]) for name in result.kept)
    assert all(not after[name].any() for name in result.zeroed)
    places = [list(source).index(result.copied[name]) for name in after if name in result.copied]
    assert places == sorted(places)
    return result


def weights(result):
    return {name: origin for name, origin in result.copied.items() if origin.endswith("weight")}


def test_a_resnet18_for_small_images_gives_the_papers_all_it_has():
    snn = create_snn("resnet18_cifar", 10)
    result = transfer(create_ann("resnet18", 10, cifar_stem=True), snn)
    assert result.kept == result.zeroed == [] and len(result.copied) == len(snn.state_dict()) == 122
    renamed = {name: origin for name, origin in weights(result).items() if name != origin}
    assert renamed == {
        "conv0.0.weight": "conv1.weight",
        "conv0.1.weight": "bn1.weight",
        **{f"layer{i}.0.shortcut.{j}.weight": f"layer{i}.0.downsample.{j}.weight" for i in (2, 3, 4) for j in (0, 1)},
        "classifier.weight": "fc.weight",
    }
    assert result.copied["layer3.1.bn2.running_var"] == "layer3.1.bn2.running_var"
    assert str(result) == "copied 41 of 41 layers (100.0 % of the parameters)"


def test_with_activations_for_neurons_it_would_compute_what_its_source_does():
    ann = create_ann("resnet18", 10, cifar_stem=True).double().eval()
    for module in ann.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    snn = create_snn("resnet18_cifar", 10).double().eval()
    copy_weights(ann, snn)
    for module in list(snn.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, SpikingNeuron):
                setattr(module, name, nn.ReLU())
    snn.step_mode = "s"  # one call is then the plain forward of the network's own class
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(snn(images), ann(images), rtol=1e-12, atol=1e-12)


def test_a_twin_takes_everything_by_name():
    ann = timm.create_model("mobilenetv3_small_050", num_classes=5)
    snn = spiking_twin(ann, init="scratch", gates="keep", input_size=(3, 32, 32))
    result = transfer(ann, snn)
    assert result.kept == result.zeroed == [] and all(name == origin for name, origin in result.copied.items())


def test_other_widths_take_only_what_agrees_and_say_what_is_left():
    """Half the width: the student's second stage can take the teacher's first, and so on."""
    snn = create_snn("resnet18_cifar", 10, width=32)
    result = transfer(create_ann("resnet18", 10, cifar_stem=True), snn)
    stages = {(name.split(".")[0], origin.split(".")[0]) for name, origin in result.copied.items()}
    assert stages == {("layer2", "layer1"), ("layer3", "layer2"), ("layer4", "layer3")}
    kept = list(dict.fromkeys(name.rpartition(".")[0] for name in result.kept))
    layer1 = [f"layer1.{i}.{kind}{j}" for i in (0, 1) for j in (1, 2) for kind in ("conv", "bn")]
    first = [f"layer2.0.{layer}" for layer in ("conv1", "bn1", "shortcut.0", "shortcut.1")]  # from 32 channels
    assert kept == ["conv0.0", "conv0.1", *layer1, *first, "classifier"]
    own = {name: p.numel() for name, p in snn.named_parameters()}
    share = sum(own[name] for name in result.copied if name in own) / sum(own.values())
    assert result.share == pytest.approx(share) and 0.9 < share < 1
    assert str(result) == (
        f"copied 26 of 41 layers ({100 * share:.1f} % of the parameters); not copied: "
        "conv0.0, conv0.1, layer1.0.conv1, layer1.0.bn1, layer1.0.conv2 and 10 more"
    )


def test_nothing_in_common_copies_nothing():
    result = transfer(
        create_ann("resnet18", 7, kwargs={"channels": [24, 24, 24, 24]}), create_snn("vgg11_cifar", 10, width=8)
    )
    assert result.copied == {} and result.share == 0
    assert str(result).startswith("copied 0 of 17 layers (0.0 % of the parameters); not copied: stage1.conv1, ")


def test_equal_names_come_first():
    """A ResNet-34 has more blocks of the same shape: each block of the student takes its namesake's."""
    result = transfer(create_ann("resnet34", 10, cifar_stem=True), create_snn("resnet18_cifar", 10))
    assert result.kept == []
    for name, origin in weights(result).items():
        if name.startswith("layer") and "shortcut" not in name:
            assert name == origin


def test_an_equal_name_beats_an_earlier_place_and_a_source_serves_once():
    ann = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    assert weights(transfer(ann, nn.ModuleDict({"b": nn.Linear(4, 4)}))) == {"b.weight": "b.weight"}
    ann = nn.ModuleDict({"m": nn.Linear(4, 4), "n": nn.Linear(3, 3)})
    snn = nn.ModuleDict({"n": nn.Linear(3, 3), "m": nn.Linear(4, 4), "z": nn.Linear(3, 3)})
    # one equal name either way: that which leaves room for a second pair
    assert weights(transfer(ann, snn)) == {"m.weight": "m.weight", "z.weight": "n.weight"}


def test_without_equal_names_the_order_decides():
    ann = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3))
    snn = nn.ModuleDict({"a": nn.Conv2d(8, 8, 3), "b": nn.Conv2d(8, 8, 1), "c": nn.Conv2d(3, 8, 3)})
    # c could have the first layer alone, which would leave a and b without: two layers are more than one
    result = transfer(ann, snn)
    assert weights(result) == {"a.weight": "2.weight", "b.weight": "3.weight"}
    assert result.kept == ["c.weight", "c.bias"]


def test_a_namesake_elsewhere_in_the_order_follows():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Conv2d(8, 8, 3), nn.Conv2d(3, 8, 3)

    class Forwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    result = copy_weights(scrambled(Backwards()), scrambled(Forwards()))
    assert weights(result) == {"first.weight": "first.weight", "second.weight": "second.weight"}


def conv(*args, norm=True, **kwargs):
    layer = nn.Conv2d(*args, **kwargs)
    return nn.Sequential(layer, *([nn.BatchNorm2d(layer.out_channels)] if norm else []))


@pytest.mark.parametrize(
    ("ann", "snn"),
    [
        (conv(8, 8, 3, norm=False), conv(8, 8, 3)),
        (conv(8, 8, 3), conv(8, 8, 3, norm=False)),
        (conv(8, 8, 3, groups=2), conv(8, 4, 3)),
        (conv(4, 8, 3, norm=False, bias=False), conv(8, 8, 3, norm=False, bias=False, groups=2)),
        (conv(8, 8, 1, norm=False), nn.Linear(8, 8)),
        (conv(8, 8, 3, norm=False, bias=True), conv(8, 8, 3, norm=False, bias=False)),
        (nn.Sequential(nn.LayerNorm(8)), nn.Sequential(nn.GroupNorm(2, 8))),
        (nn.ConvTranspose2d(8, 8, 3), nn.Conv2d(8, 8, 3)),
        (nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)),
        (timm.layers.StdConv2d(8, 8, 3), nn.Conv2d(8, 8, 3)),
    ],
    ids=["norm", "no_norm", "shape", "groups", "kind", "bias", "norms", "transposed", "affine", "standardised"],
)
def test_layers_that_differ_are_left(ann, snn):
    assert transfer(ann, snn).copied == {}


def test_a_bias_that_the_source_has_not_is_nought():
    snn = create_snn("sew_resnet34", 10)
    result = transfer(create_ann("resnet34", 10), snn)
    assert result.kept == [] and result.share == 1
    biases = [f"{n}.bias" for n, m in snn.named_modules() if isinstance(m, nn.Conv2d)]
    assert result.zeroed == biases and len(biases) == 36


def test_a_norm_of_timm_with_an_activation_is_a_batch_norm_and_learned_leaks_are_kept():
    ann = nn.Sequential(nn.Conv2d(3, 8, 3), timm.layers.BatchNormAct2d(8), nn.Conv2d(8, 5, 1))
    leaky = SpikingNeuron(NeuronConfig(learnable_leak=True))
    snn = nn.ModuleDict(
        {"conv": nn.Conv2d(3, 8, 3), "norm": nn.BatchNorm2d(8), "spike": leaky, "last": nn.Conv2d(8, 5, 1)}
    )
    result = transfer(ann, snn)
    assert weights(result) == {"conv.weight": "0.weight", "norm.weight": "1.weight", "last.weight": "2.weight"}
    assert result.kept == ["spike.w"] and str(result).endswith("; not copied: spike")


def test_the_report_cannot_be_changed():
    result = copy_weights(nn.Linear(2, 2), nn.Linear(2, 2))
    assert result.copied == {"weight": "weight", "bias": "bias"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.share = 0.5
