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

from distill.layouts import Layout
from distill.taps import append_rows, check_taps, default_tap_names, hooks, tap_names

DEFAULTS = {
    "resnet18": ["layer1", "layer2", "layer3"],
    "regnetx_002": ["s1", "s2", "s3"],
    "densenet121": ["features.denseblock1", "features.denseblock2", "features.denseblock3"],
    "convnext_atto": ["stages.0", "stages.1", "stages.2"],  # feature_info has no entry of the stem
}


@pytest.mark.parametrize("family", DEFAULTS)
def test_the_default_taps_leave_out_the_stem_and_the_last_entry(family):
    assert default_tap_names(teacher_of(family)) == DEFAULTS[family]


def timm_of(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7, **kwargs).eval()


def vit_of(image_size=32, depth=4, **kwargs):
    kwargs = {"patch_size": 8, "embed_dim": 16, "num_heads": 2, **kwargs}
    return timm_of("vit_tiny_patch16_224", img_size=image_size, depth=depth, **kwargs)


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(2, [0]), (3, [0, 1]), (4, [0, 1, 2]), (6, [0, 2, 3]), (12, [2, 5, 8]), (24, [5, 11, 17])],
)
def test_blocks_of_one_resolution_are_tapped_at_quarters_of_the_depth(depth, expected):
    assert default_tap_names(vit_of(depth=depth)) == [f"blocks.{block}" for block in expected]


def test_a_stem_without_a_name_is_left_out_like_any_other():
    network = Toy()  # TResNet's first entry
    network.feature_info = [{"module": ""}, {"module": "act1"}, {"module": "act2"}]
    assert default_tap_names(network) == ["act1"]


def test_a_list_of_names_passes_as_it_is_written():
    assert tap_names(Toy(), ["second", "no such name"], images_of()) == ["second", "no such name"]
    assert tap_names(Toy(), (), images_of()) == []


@pytest.mark.parametrize("family", DEFAULTS)
def test_stages_are_the_default_taps(family):
    assert tap_names(teacher_of(family), "stages", images_of()) == DEFAULTS[family]


def test_another_word_is_refused():
    with pytest.raises(
        ValueError, match=r"taps must be a list of names or one of \['stages', 'blocks'\], found 'layer1'"
    ):
        tap_names(teacher_of("resnet18"), "layer1", images_of())


def numbered(pattern, *counts):
    return [pattern.format(stage, block) for stage, count in enumerate(counts) for block in range(count)]


SWIN = {"img_size": 32, "embed_dim": 8, "depths": (1, 2, 1), "num_heads": (1, 1, 2), "window_size": 4}
BLOCKS = {
    "resnet18": (
        dict(channels=(8, 8, 8, 8)),
        ["layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1", "layer4.0"],
    ),
    "regnetx_002": ({}, ["s1.b1", "s2.b1", *[f"s3.b{i}" for i in (1, 2, 3, 4)], *[f"s4.b{i}" for i in range(1, 7)]]),
    # the head's first convolution is one of timm's blocks, and the one left out
    "mobilenetv3_small_050": ({}, numbered("blocks.{}.{}", 1, 2, 3, 2, 3)),
    # here timm ends the stages in front of that convolution: neither it nor the last block
    "rexnet_100": ({}, [f"features.{i}" for i in range(15)]),
    "convnext_atto": (dict(depths=(1, 1, 2, 2), dims=(8, 8, 16, 16)), numbered("stages.{}.blocks.{}", 1, 1, 2, 1)),
    # a dense block's layers are no cuts, the dense block is; a norm is no block
    "densenet121": (
        dict(block_config=(2, 2, 2, 2), growth_rate=8),
        [f"features.{kind}{i}" for i in (1, 2, 3) for kind in ("denseblock", "transition")],
    ),
    "cs3darknet_s": ({}, ["stages.0", "stages.1", "stages.2"]),  # a split goes around its blocks
    # a stage reshapes its blocks' tokens by the number of images: the stages, not the blocks
    "pvt_v2_b0": ({}, ["stages.0", "stages.1", "stages.2"]),
    "swin_tiny_patch4_window7_224": (SWIN, numbered("layers.{}.blocks.{}", 1, 2)),
    "vit_tiny_patch16_224": (
        dict(img_size=32, patch_size=8, depth=4, embed_dim=16, num_heads=2),
        numbered("blocks.{1}", 3),
    ),
}


@pytest.mark.parametrize("network", BLOCKS)
def test_blocks_are_all_that_are_cuts_but_the_last(network):
    kwargs, expected = BLOCKS[network]
    teacher, images = timm_of(network, **kwargs), images_of()
    names = tap_names(teacher, "blocks", images)
    assert names == expected
    assert [tap.name for tap in check_taps(teacher, names, images)] == names
    assert not any(module._forward_hooks for module in teacher.modules())


class Stage(nn.Module):
    """Two blocks, and a norm behind them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*[Block() for _ in range(2)])
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.blocks(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x):
        return x + self.act(self.conv(x))


class Staged(Toy):
    """Three stages on top of a stem."""

    feature_info = [{"module": f"stages.{stage}"} for stage in range(3)]  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.stages = nn.Sequential(Stage(), Stage(), Stage())

    def forward(self, x):
        return self.tail(self.stages(self.act1(self.first(x))))


def test_a_stage_that_ends_in_a_norm_is_tapped_at_its_blocks():
    expected = numbered("stages.{}.blocks.{}", 2, 2, 1)
    assert tap_names(Staged().eval(), "blocks", images_of()) == expected
    assert tap_names(Staged().eval(), "stages", images_of()) == ["stages.0", "stages.1"]


@pytest.mark.parametrize("network", ["vgg", "twins_svt_small"])
def test_a_network_without_blocks_wants_its_taps_named(network):
    if network == "vgg":  # layers, one behind the other
        teacher, images = teacher_of("vgg"), images_of()
    else:  # timm's names are no modules
        teacher, images = timm_of(network, img_size=32, embed_dims=(16, 16, 16, 16), depths=(1, 1, 1, 1)), images_of()
    with pytest.raises(ValueError, match=r"has no blocks that are cuts: name your taps as taps=\["):
        tap_names(teacher, "blocks", images)


def test_tokens_are_a_map_of_patches_with_a_class_token():
    (tap,) = check_taps(vit_of(), ["blocks.1"], images_of())
    assert tap.shape == (16, 4, 4) and tap.layout == Layout("BNC", 1) and tap.activation is None


def test_an_activation_on_tokens_is_found():
    network = vit_of()
    network.blocks[1] = nn.Sequential(network.blocks[1], nn.GELU())
    (tap,) = check_taps(network, ["blocks.1"], images_of())
    assert type(tap.activation) is nn.GELU and tap.layout == Layout("BNC", 1)


@pytest.mark.parametrize(("size", "shape"), [((32, 16), (4, 2)), ((16, 32), (2, 4))])
def test_images_need_not_be_square(size, shape):
    images = torch.randn(2, 3, *size)
    (tap,) = check_taps(vit_of(size), ["blocks.1"], images)
    assert tap.shape == (16, *shape) and tap.layout == Layout("BNC", 1)
    swin = timm_of("swin_tiny_patch4_window7_224", **(SWIN | {"img_size": size, "window_size": 2}))
    (tap,) = check_taps(swin, ["layers.0"], images)
    assert tap.shape == (8, 2 * shape[0], 2 * shape[1]) and tap.layout == Layout("BHWC")


@pytest.mark.parametrize("name", ["blocks.1.attn", "blocks.1.mlp", "blocks.1.norm1"])
def test_a_place_inside_of_a_transformer_block_is_refused(name):
    with pytest.raises(ValueError, match=f"tap '{name}' is not a cut of VisionTransformer"):
        check_taps(vit_of(), [name], images_of())


class ClassTokenAround(nn.Module):
    """The class token leaves in front of `mix`, a block on patches, and comes back behind it."""

    num_prefix_tokens = 1

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 8)
        self.both, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1)
        x = self.both(torch.cat([x[:, :1], self.mix(x[:, 1:])], 1))
        return self.head(x.mean(1))


def test_a_class_token_that_goes_around_a_tap_is_found():
    torch.manual_seed(0)
    network = ClassTokenAround().eval()
    assert check_taps(network, ["both"], images_of())[0].layout == Layout("BNC", 1)
    with pytest.raises(ValueError, match="tap 'mix' is not a cut of ClassTokenAround"):
        check_taps(network, ["mix"], images_of())


class Shuffled(nn.Module):
    """Patches in an order of their own: those at even places first."""

    def __init__(self, shuffled):
        super().__init__()
        self.embed, self.block, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 5)
        self.shuffled = shuffled

    def forward(self, x):
        x = self.embed(x)
        if self.shuffled:
            x = torch.cat([x[..., row::2, column::2].flatten(2) for row in (0, 1) for column in (0, 1)], 2)
        return self.head(self.block(x.flatten(2).transpose(1, 2)).square().mean(1))


def test_tokens_that_do_not_lie_in_the_order_of_the_image_are_refused():
    torch.manual_seed(0)
    (tap,) = check_taps(Shuffled(False).eval(), ["block"], images_of())
    assert tap.shape == (8, 8, 8) and tap.layout == Layout("BNC")
    with pytest.raises(ValueError, match=r"tap 'block' yields places \(64,\) in an order that is not the image's"):
        check_taps(Shuffled(True).eval(), ["block"], images_of())


class KeepsCount(Toy):
    """Behind `second` it reshapes by the number of images that came in."""

    def forward(self, x):
        count = len(x)
        x = self.act2(self.second(self.act1(self.first(x))))
        return self.tail(x.reshape(count, 4, 32, 32))


class KeepsFirst(Toy):
    """Behind `second` only as many rows go on as images came in."""

    def forward(self, x):
        return self.tail(self.act2(self.second(self.act1(self.first(x))))[: len(x)])


@pytest.mark.parametrize("network", [KeepsCount, KeepsFirst])
def test_a_place_behind_which_rows_cannot_be_appended_is_refused(network):
    with pytest.raises(ValueError, match=f"tap 'second' takes no rows beside those of the images: {network.__name__}"):
        check_taps(network().eval(), ["second"], images_of())


class Windows(Toy):
    """`second` works on windows, four to an image, as rows of their own."""

    def forward(self, x):
        x = self.act1(self.first(x))
        b, c, h, w = x.shape
        x = self.second(x.reshape(b, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, h // 2, w // 2))
        x = x.reshape(b, 2, 2, c, h // 2, w // 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)
        return self.tail(self.act2(x))


def test_a_place_with_other_rows_than_images_is_refused():
    with pytest.raises(ValueError, match=r"tap 'second' yields shape \(8, 4, 16, 16\) for 2 images"):
        check_taps(Windows().eval(), ["second"], images_of())


def test_a_teacher_that_gives_all_images_the_same_logits_shows_no_cut():
    network = Toy().eval()
    nn.init.zeros_(network.head.weight)
    with pytest.raises(ValueError, match="Toy gives all images the same logits"):
        check_taps(network, ["act1"], images_of())


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
