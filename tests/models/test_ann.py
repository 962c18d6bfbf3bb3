"""Analogue networks by timm's names, with a stem for small images."""

import pytest
import timm
import torch
from torch import nn

from models import create_ann

NARROW = {"channels": [8, 16, 16, 16]}


def test_a_plain_name_is_timms_network():
    torch.manual_seed(1)
    ours = create_ann("resnet18", num_classes=7, in_chans=1, kwargs=NARROW).eval()
    torch.manual_seed(1)
    theirs = timm.create_model("resnet18", num_classes=7, in_chans=1, **NARROW).eval()
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(ours(images), theirs(images))
    assert ours.ann_spec == {
        "name": "resnet18",
        "num_classes": 7,
        "in_chans": 1,
        "cifar_stem": False,
        "kwargs": NARROW,
    }


def test_timms_own_number_of_classes_is_the_default():
    ann = create_ann("resnet18", kwargs=NARROW)
    assert ann.num_classes == 1000 and ann.ann_spec["num_classes"] == 1000


def test_the_callers_arguments_are_left_alone():
    kwargs = dict(NARROW)
    create_ann("resnet18", num_classes=3, kwargs=kwargs)
    assert kwargs == NARROW


@pytest.mark.parametrize("name", ["resnet18", "regnetx_002", "densenet121", "mobilenetv2_035"])
def test_the_cifar_stem_keeps_the_size_of_small_images(name):
    kwargs = {"resnet18": NARROW, "densenet121": {"block_config": (2, 2), "growth_rate": 8}}.get(name)
    ann = create_ann(name, num_classes=7, cifar_stem=True, kwargs=kwargs).eval()
    plain = create_ann(name, num_classes=7, kwargs=kwargs)
    convs = [next(m for m in net.modules() if isinstance(m, nn.Conv2d)) for net in (ann, plain)]
    stem, was = convs
    assert (stem.kernel_size, stem.stride, stem.padding) == ((3, 3), (1, 1), (1, 1))
    assert (stem.in_channels, stem.out_channels, stem.bias is None) == (3, was.out_channels, was.bias is None)
    sizes = []
    for module in ann.modules():  # nothing but the stem's own activation may come before the first block
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d)):
            module.register_forward_hook(lambda m, args, out: sizes.append((type(m).__name__, tuple(out.shape[2:]))))
    assert ann(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert sizes[0] == ("Conv2d", (32, 32))
    assert all(kind != "MaxPool2d" for kind, _ in sizes), "the max pool behind the stem is dropped"
    assert ann.ann_spec["cifar_stem"] is True


def test_the_stem_of_grey_images():
    ann = create_ann("resnet18", num_classes=7, in_chans=1, cifar_stem=True, kwargs=NARROW)
    assert ann.conv1.in_channels == 1 and ann(torch.randn(2, 1, 28, 28)).shape == (2, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet81"}, "timm knows no network 'resnet81'; close to it: .*resnet18"),
        ({"name": "qqqqqqqqqq"}, "timm knows no network 'qqqqqqqqqq'$"),
        ({"name": "resnet18.no_such_tag"}, "resnet18.no_such_tag"),
        ({"name": "resnet18", "kwargs": {"wings": 2}}, "'resnet18' does not take these arguments: .*wings"),
        ({"name": "resnet18", "cifar_stem": True, "pretrained": True}, "without pretrained weights"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_made_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_ann(**arguments)


def test_a_network_whose_first_convolution_is_unknown_has_no_cifar_stem(monkeypatch):
    class Bare(nn.Module):
        num_classes, pretrained_cfg = 5, {"first_conv": "nowhere.conv"}

    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: Bare())
    with pytest.raises(ValueError, match="cifar_stem: the first convolution of 'resnet18' could not be found"):
        create_ann("resnet18", cifar_stem=True)


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("no pretrained weights exist")], ids=str)
def test_weights_that_cannot_be_had_are_the_users_to_know(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(ValueError, match=f"pretrained weights of 'resnet18' could not be loaded: {error}"):
        create_ann("resnet18", pretrained=True)
