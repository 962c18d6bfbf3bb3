"""Which places of a teacher are cuts, what an adapter has to end in there, and what is refused by name."""

import contextlib
import copy

import pytest
import timm
import torch
from torch import nn
from toy_teachers import (
    FAMILIES,
    RECTIFIED,
    Around,
    Functional,
    Toy,
    Twice,
    YieldsPair,
    images_of,
    teacher_of,
)

from distill.taps import append_rows, check_taps, default_tap_names, hooks

DEFAULTS = {
    "resnet18": ["layer1", "layer2", "layer3"],
    "regnetx_002": ["s1", "s2", "s3"],
    "densenet121": ["features.denseblock1", "features.denseblock2", "features.denseblock3"],
    "convnext_atto": ["stages.0", "stages.1", "stages.2"],  # feature_info has no entry of the stem
}


@pytest.mark.parametrize("family", DEFAULTS)
def test_the_default_taps_leave_out_the_stem_and_the_last_entry(family):
    assert default_tap_names(teacher_of(family)) == DEFAULTS[family]


def test_a_network_without_feature_info_wants_its_taps_named():
    with pytest.raises(ValueError, match=r"Toy names no cuts in feature_info: .*taps=\["):
        default_tap_names(Toy())


def test_feature_info_without_module_names_is_refused():
    network = Toy()
    network.feature_info = [{"num_chs": 4}] * 4
    with pytest.raises(ValueError, match="Toy names no cuts"):
        default_tap_names(network)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tap_knows_its_shape_and_what_its_feature_has_passed(family):
    teacher, images = teacher_of(family), images_of()
    shapes = {}
    names = default_tap_names(teacher)
    keep = [(teacher.get_submodule(n), lambda m, a, out, n=n: shapes.update({n: tuple(out.shape[1:])})) for n in names]
    with hooks(keep):
        teacher(images)
    taps = check_taps(teacher, names, images)
    assert [tap.name for tap in taps] == names and {tap.name: tap.shape for tap in taps} == shapes
    for tap in taps:
        assert isinstance(tap.activation, nn.ReLU) if family in RECTIFIED else tap.activation is None


def test_the_activation_is_a_copy_that_does_not_work_in_place():
    teacher = teacher_of("resnet18")
    (tap,) = check_taps(teacher, ["layer1"], images_of())
    assert teacher.layer1[-1].act2.inplace and not tap.activation.inplace
    assert tap.activation is not teacher.layer1[-1].act2


@pytest.mark.parametrize(("name", "kind"), [("act1", nn.ReLU), ("layer1.1.act2", nn.ReLU), ("maxpool", nn.ReLU)])
def test_a_tap_may_be_an_activation_or_come_after_one(name, kind):
    (tap,) = check_taps(teacher_of("resnet18"), [name], images_of())
    assert isinstance(tap.activation, kind)


def test_another_activation_than_relu_is_found_too():
    network = Toy().eval()
    network.act1 = nn.SiLU()
    (tap,) = check_taps(network, ["act1"], images_of())
    assert type(tap.activation) is nn.SiLU


def test_an_activation_that_is_a_function_is_known_by_its_sign():
    (tap,) = check_taps(Functional().eval(), ["block"], images_of())
    assert isinstance(tap.activation, nn.ReLU)


def test_taps_come_in_the_order_in_which_they_fire():
    taps = check_taps(teacher_of("resnet18"), ["layer3", "layer1", "layer2"], images_of())
    assert [tap.name for tap in taps] == ["layer1", "layer2", "layer3"]


@pytest.mark.parametrize(
    ("network", "name", "reason"),
    [
        (Toy, "third", r"tap 'third' is no module of the teacher; there are \['first', 'act1'"),
        (Toy, "", "tap '' is no module"),
        (Twice, "second", "tap 'second' fires more than once"),
        (Toy, "unused", "tap 'unused' does not fire"),
        (YieldsPair, "second", "tap 'second' yields a tuple"),
        (Toy, "head", r"tap 'head' yields shape \(2, 5\)"),
        (Around, "act2", "tap 'act2' is not a cut of Around"),
        (Around, "second", "tap 'second' is not a cut of Around"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_place_that_cannot_serve_is_refused_by_name(network, name, reason, dtype):
    with pytest.raises(ValueError, match=reason):
        check_taps(network().to(dtype).eval(), [name], images_of(dtype))


def test_the_same_network_is_cut_where_nothing_goes_around():
    assert [tap.name for tap in check_taps(Around().eval(), ["act1"], images_of())] == ["act1"]


@pytest.mark.parametrize("name", ["layer2.0.act1", "layer2.0.bn2", "layer2.0.downsample", "layer1.0.conv1"])
def test_a_place_inside_of_a_residual_is_refused(name):
    with pytest.raises(ValueError, match=f"tap '{name}' is not a cut of ResNet"):
        check_taps(teacher_of("resnet18"), [name], images_of())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_taps_of_xception41_are_refused(dtype):
    torch.manual_seed(0)
    teacher = timm.create_model("xception41", num_classes=7).to(dtype).eval()
    for name in default_tap_names(teacher):
        with pytest.raises(ValueError, match=f"tap '{name}' is not a cut of XceptionAligned"):
            check_taps(teacher, [name], images_of(dtype))


def test_a_missing_module_is_explained_at_the_place_where_the_name_goes_wrong():
    with pytest.raises(ValueError, match=r"tap 'layer2.7.act2' is no module of the teacher; there are \['0', '1'\]"):
        check_taps(teacher_of("resnet18"), ["layer2.7.act2"], images_of())


def test_the_same_tap_twice_is_refused():
    with pytest.raises(ValueError, match="taps must differ"):
        check_taps(teacher_of("resnet18"), ["layer1", "layer1"], images_of())


@pytest.mark.parametrize("names", [["layer1", "layer2"], ["layer1", "layer9"], ["layer2.0.act1"]])
def test_the_check_leaves_the_teacher_as_it_was(names):
    teacher, images = teacher_of("resnet18"), images_of()
    before, logits = copy.deepcopy(teacher.state_dict()), teacher(images)
    with contextlib.suppress(ValueError):
        check_taps(teacher, names, images)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert torch.equal(teacher(images), logits) and not teacher.training
    assert not any(module._forward_hooks for module in teacher.modules())


def test_hooks_go_also_when_the_forward_pass_fails():
    module = nn.Identity()
    with pytest.raises(KeyError), hooks([(module, lambda *_: None)]):
        raise KeyError
    assert not module._forward_hooks


def test_appended_rows_come_last_in_the_type_of_the_others():
    rows = torch.ones(3, 4, dtype=torch.float32)
    out = append_rows(rows)(None, (), torch.zeros(2, 4, dtype=torch.float64))
    assert out.dtype == torch.float64 and out.tolist() == [[0.0] * 4] * 2 + [[1.0] * 4] * 3


@pytest.mark.parametrize("images", [images_of(count=1), torch.ones(2, 3, 32, 32)])
def test_one_image_or_equal_ones_cannot_show_a_cut(images):
    with pytest.raises(ValueError, match="two or more different images"):
        check_taps(teacher_of("resnet18"), ["layer1"], images)


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 32, 32), torch.ones(3, 3, 32, 32)], ids=["one", "equal"])
def test_a_cut_cannot_be_checked_on_one_image(images):
    with pytest.raises(ValueError, match="two or more different images"):
        check_taps(teacher_of("resnet18"), ["layer1"], images)
