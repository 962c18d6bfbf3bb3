"""Which module of a student stands for a tap of its teacher: by name in a twin, by stage elsewhere."""

import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from timm.models.vgg import VGG
from torch import nn
from toy_teachers import Toy

from distill.matching import match_taps
from models import SpikeTrain, create_snn, list_snns, spiking_twin
from models.registry import FEEDBACK_NETWORKS

SIZE = (3, 48, 48)  # what vggsnn_dvs takes
IMAGES = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0))

TEACHERS = {
    "resnet": (("layer1", "layer2", "layer3"), ["layer1", "layer2", "layer3", "layer4"]),
    "efficientnet": (
        ("blocks.0", "blocks.1", "blocks.2", "blocks.4"),
        ["blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6"],
    ),
    "vit": (("blocks.0", "blocks.2", "blocks.4"), [f"blocks.{i}" for i in range(6)]),
    "mixer": (("blocks.0", "blocks.1", "blocks.2"), [f"blocks.{i}" for i in range(4)]),
    "vgg": (("features.2", "features.6", "features.10"), ["features.2", "features.6", "features.10", "features.14"]),
    "convnext": (("stages.0", "stages.1", "stages.2"), ["stages.0", "stages.1", "stages.2", "stages.3"]),
}
"""The usual taps and the stages of each."""


def teacher_of(family):
    if family == "vgg":
        cfg = [8, "M", 12, "M", 16, "M", 16]
        return VGG(cfg=cfg, num_classes=10, norm_layer=nn.BatchNorm2d, mlp_ratio=0.01).eval()
    if family == "mixer":
        return MlpMixer(num_classes=10, img_size=64, patch_size=32, num_blocks=4, embed_dim=16).eval()
    name, kwargs = {
        "resnet": ("resnet18", dict(channels=(8, 8, 16, 16))),
        "efficientnet": ("efficientnet_lite0", {}),
        "vit": ("vit_tiny_patch16_224", dict(img_size=48, depth=6, embed_dim=24, num_heads=2)),
        "convnext": ("convnext_atto", dict(depths=(1, 1, 2, 1), dims=(8, 8, 16, 16))),
    }[family]
    return timm.create_model(name, num_classes=10, **kwargs).eval()


def images_for(family):
    return torch.randn(2, 3, 64, 64) if family == "mixer" else IMAGES


FOUR = {
    "resnet": (1, 2, 3),
    "efficientnet": (1, 1, 2, 3),  # a stage more than the student: both first ones go to its first
    "vit": (1, 2, 3),  # after a sixth, half and five sixths; the last block alone goes with the last stage
    "mixer": (1, 2, 3),  # after a quarter, half and three quarters
    "vgg": (1, 2, 3),
    "convnext": (1, 2, 3),
}
"""The student's stage of each usual tap, where the student has four stages."""
FIVE = FOUR | {
    "resnet": (2, 3, 4),
    "efficientnet": (1, 2, 3, 4),
    "vit": (1, 3, 4),  # of a student with five stages: 5/6, 5/2, 25/6, rounded up but for the last
    "mixer": (2, 3, 4),  # 5/4, 10/4, 15/4
    "vgg": (2, 3, 4),
    "convnext": (2, 3, 4),
}
THREE = FOUR | {
    "resnet": (1, 1, 2),
    "efficientnet": (1, 1, 1, 2),
    "vit": (1, 2, 2),  # 3/6, 3/2, 15/6: 1, 2 and 3, which is the last
    "mixer": (1, 2, 2),
    "vgg": (1, 1, 2),
    "convnext": (1, 1, 2),
}
STUDENTS = {
    "preact_resnet34": ("layer", FOUR),
    "resnet18_cifar": ("layer", FOUR),
    "resnet19_cifar": ("layer", THREE),
    "sew_resnet18": ("layer", FOUR),
    "sew_resnet34": ("layer", FOUR),
    "sew_resnet50": ("layer", FOUR),
    "vgg11_cifar": ("stage", FIVE),
    "vgg13_cifar": ("stage", FIVE),
    "vggsnn_cifar": ("stage", FOUR),
    "vggsnn_dvs": ("stage", FOUR),
}


def test_every_network_of_the_papers_is_matched_below():
    assert sorted([*STUDENTS, *FEEDBACK_NETWORKS]) == list_snns()


@pytest.mark.parametrize("name", STUDENTS)
def test_the_stages_of_a_network_are_all_named_and_the_last_is_the_last(name):
    student = create_snn(name, width=8)
    stages = [child for child, _ in student.named_children() if child.startswith(("layer", "stage"))]
    named = [entry["module"] for entry in student.feature_info]
    assert named[-len(stages) :] == stages and named[: -len(stages)] in ([], ["conv0"])
    order = []
    for child, module in student.named_children():
        module.register_forward_hook(lambda module, args, output, child=child: order.append(child))
    student.eval()(IMAGES)
    assert order == [*named, "avg_pool", "classifier"]


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("family", TEACHERS)
def test_a_network_of_the_papers_is_matched_by_stage(family, name):
    if name == "vggsnn_dvs" and family == "mixer":
        pytest.skip("one takes images of 48x48 pixels, the other of 64x64")
    prefix, stages = STUDENTS[name]
    taps, images = TEACHERS[family][0], images_for(family)
    student = create_snn(name, width=8)
    matched = match_taps(taps, teacher_of(family), student, images)
    assert matched == {tap: f"{prefix}{stage}" for tap, stage in zip(taps, stages[family], strict=True)}

    maps = {}
    for module in set(matched.values()):
        student.get_submodule(module).register_forward_hook(
            lambda m, args, out, module=module: maps.update({module: out})
        )
    student.eval()(images)
    assert maps.keys() == set(matched.values())
    assert all(isinstance(train, SpikeTrain) and train.ndim == 4 for train in maps.values())


@pytest.mark.parametrize("family", ["resnet", "efficientnet", "vgg"])
def test_a_twin_answers_by_name_even_inside_a_stage(family):
    teacher = teacher_of(family)
    inside = {"resnet": "layer2.0.conv1", "efficientnet": "blocks.1.0", "vgg": "features.3"}[family]
    taps = [*TEACHERS[family][0], inside]
    assert match_taps(taps, teacher, spiking_twin(teacher, input_size=SIZE), IMAGES) == {tap: tap for tap in taps}


def test_a_twin_of_another_depth_answers_by_name_while_it_has_all_names():
    teacher = timm.create_model("resnet34", num_classes=10, channels=(8, 8, 16, 16)).eval()
    student = spiking_twin(teacher_of("resnet"), input_size=SIZE)
    assert match_taps(["layer3", "layer1.1"], teacher, student, IMAGES) == {"layer3": "layer3", "layer1.1": "layer1.1"}
    # one name is missing: all go by stage
    assert match_taps(["layer3", "layer1.2"], teacher, student, IMAGES) == {"layer3": "layer3", "layer1.2": "layer1"}


def test_a_name_that_both_have_for_other_stages_is_no_match():
    """The third of three stages is not the third of four."""
    matched = match_taps(["layer3"], teacher_of("resnet"), create_snn("resnet19_cifar", width=8), IMAGES)
    assert matched == {"layer3": "layer2"}


@pytest.mark.parametrize(
    ("family", "tap", "stage"),
    [
        ("resnet", "bn1", 1),  # in the stem
        ("resnet", "layer2.0", 2),
        ("resnet", "layer3.1.conv2", 3),
        ("resnet", "layer4.0", 4),
        ("resnet", "layer4", 4),
        ("efficientnet", "blocks.3.1", 3),  # between the stages that timm names: part of blocks.4, the fourth of five
        ("efficientnet", "blocks.5.0", 4),
        ("efficientnet", "bn2", 4),  # behind the last stage
        ("vit", "blocks.2.attn", 2),
        ("vit", "blocks.5", 4),
        ("vit", "norm", 4),
        ("convnext", "stages.2.blocks.0", 3),
    ],
)
def test_a_tap_belongs_to_the_stage_that_ends_at_or_behind_it(family, tap, stage):
    student = create_snn("vggsnn_cifar", width=8)
    assert match_taps([tap], teacher_of(family), student, IMAGES) == {tap: f"stage{stage}"}


def test_taps_keep_their_order_and_may_share_a_stage():
    taps = ["layer3", "layer1", "layer3.0"]
    matched = match_taps(taps, teacher_of("resnet"), create_snn("vggsnn_cifar", width=8), IMAGES)
    assert list(matched.items()) == [("layer3", "stage3"), ("layer1", "stage1"), ("layer3.0", "stage3")]
    assert match_taps([], teacher_of("resnet"), create_snn("vggsnn_cifar", width=8), IMAGES) == {}


def test_a_student_of_like_blocks_is_matched_by_depth():
    """Three of four stages are three quarters of eight blocks."""
    blocks = [
        nn.Sequential(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for i in range(8)
    ]
    network = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(8, 10))
    network.feature_info = [{"module": str(i), "reduction": 1, "num_chs": 8} for i in range(8)]
    student = spiking_twin(network, input_size=SIZE)
    matched = match_taps(["layer1", "layer2", "layer3", "layer4"], teacher_of("resnet"), student, IMAGES)
    assert matched == {"layer1": "1", "layer2": "3", "layer3": "5", "layer4": "7"}


class Deep(nn.Sequential):
    """Six convolutions with activations, which names no features."""

    def __init__(self):
        blocks = [nn.Sequential(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1), nn.ReLU()) for i in range(6)]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(8, 10))


@pytest.mark.parametrize(
    ("taps", "stages"),
    [
        (["0", "1", "2", "3", "4", "5"], (1, 1, 2, 2, 3, 3)),
        (["4", "0", "2"], (3, 1, 2)),  # by the order in which they fire
        (["1", "3"], (2, 3)),
        (["5"], (3,)),
    ],
    ids=["six", "three", "two", "one"],
)
def test_without_stages_of_the_teacher_its_taps_are_spread_in_front_of_the_last(taps, stages):
    matched = match_taps(taps, Deep(), create_snn("resnet18_cifar", width=8), IMAGES)
    assert matched == {tap: f"layer{stage}" for tap, stage in zip(taps, stages, strict=True)}


def test_without_stages_on_either_side_names_decide():
    teacher = Toy()
    student = spiking_twin(teacher, input_size=SIZE)
    assert match_taps(["act1", "second"], teacher, student, IMAGES) == {"act1": "act1", "second": "second"}
    with pytest.raises(ValueError, match=r"SpikingToy yields no map .* at \['0', '1'\].*student_taps"):
        match_taps(["0", "1"], Deep(), student, IMAGES)
    with pytest.raises(ValueError, match=r"SpikingToy yields no map .* at \['layer1'\].*student_taps"):
        match_taps(["layer1"], teacher_of("resnet"), student, IMAGES)


def test_a_namesake_that_yields_no_map_does_not_count():
    """`head` is a linear layer in the student."""
    teacher = Deep()
    teacher.add_module("head", nn.Identity())
    with pytest.raises(ValueError, match=r"no map .* at \['head'\]"):
        match_taps(["head"], teacher, spiking_twin(Toy(), input_size=SIZE), IMAGES)


@pytest.mark.parametrize("tap", ["layer9", "unused"])
def test_a_tap_that_is_none_is_refused_by_name(tap):
    teacher = teacher_of("resnet")
    teacher.add_module("unused", nn.Identity())
    with pytest.raises(ValueError, match=f"tap '{tap}' is no module of ResNet that runs"):
        match_taps(["layer1", tap], teacher, create_snn("resnet18_cifar", width=8), IMAGES)


def test_names_of_features_that_are_no_modules_are_passed_over():
    """Some of timm's networks name what they do not have."""
    teacher = teacher_of("resnet")
    entries = [{"module": name, "reduction": 2**i} for i, name in enumerate(["stage0", "stage1", "layer2", "layer4"])]
    teacher.feature_info = entries
    student = create_snn("resnet18_cifar", width=8)
    matched = match_taps(["layer1", "layer2", "layer3", "layer4"], teacher, student, IMAGES)
    assert matched == {"layer1": "layer3", "layer2": "layer3", "layer3": "layer4", "layer4": "layer4"}


def test_matching_leaves_both_networks_as_they_were():
    teacher, student = teacher_of("resnet").train(), create_snn("resnet18_cifar", width=8).train()
    teacher.layer1.eval()
    before = [{k: v.clone() for k, v in network.state_dict().items()} for network in (teacher, student)]
    match_taps(["layer1"], teacher, student, IMAGES)
    for network, state in zip((teacher, student), before, strict=True):
        assert all(torch.equal(state[k], v) for k, v in network.state_dict().items())
        assert not any(m._forward_hooks for m in network.modules())
    assert teacher.training and not teacher.layer1.training and all(m.training for m in student.modules())
