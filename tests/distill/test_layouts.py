"""Which axis holds what, tokens as a grid, and the way to a map and back."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distill.layouts import Layout, change_quadrants, find_layout, grid_of, quadrants_followed


def teacher(**attributes):
    network = nn.Identity()
    for name, value in attributes.items():
        setattr(network, name, value)
    return network


def layout_of(shape, image_size=(64, 64), name="tap", **attributes):
    return find_layout(teacher(**attributes), name, torch.zeros(2, *shape), image_size)


@pytest.mark.parametrize(
    ("tokens", "image_size", "grid"),
    [
        (16, (64, 64), (4, 4)),
        (1, (64, 64), (1, 1)),
        (15, (64, 64), None),
        (17, (64, 64), None),
        (2, (64, 64), None),
        (0, (64, 64), None),
        (8, (64, 32), (4, 2)),
        (8, (32, 64), (2, 4)),
        (6, (48, 32), (3, 2)),
        (28, (100, 64), (7, 4)),  # 100 / 16 = 6.25, rounded up
        (24, (100, 64), (6, 4)),  # and rounded down
        (20, (72, 64), (5, 4)),  # two convolutions of stride 4, padded: 72 / 16 = 4.5, rounded up
        (4, (160, 40), (4, 1)),
        (36, (64, 32), (9, 4)),  # stride 7, rounded down
        (26, (64, 32), None),  # 13 x 2: no stride makes 13 of 64 and 2 of 32
    ],
)
def test_tokens_form_the_grid_that_a_stride_makes_of_the_image(tokens, image_size, grid):
    assert grid_of(tokens, image_size) == grid


def test_every_stride_of_every_image_gives_its_grid_back():
    """An independent search over strides: what is found is a grid of some stride with that many tokens."""
    for h, w in [(30, 30), (30, 20), (25, 40), (31, 17)]:
        strides = [s / 7 for s in range(7, 7 * max(h, w))]
        rounds = (math.floor, math.ceil)
        grids = {(r(h / s), r(w / s)) for s in strides for r in rounds} - {(0, 0)}
        grids = {grid for grid in grids if 0 not in grid}
        assert len(grids) > 10
        for height, width in grids:
            found = grid_of(height * width, (h, w))
            assert found is not None and found[0] * found[1] == height * width
            if [g[0] * g[1] for g in grids].count(height * width) == 1:
                assert found == (height, width)


def test_tokens_are_rows_of_patches_behind_the_class_token():
    patches = torch.arange(2 * 6 * 5.0).reshape(2, 6, 5)
    prefix = -torch.ones(2, 1, 5)
    layout = Layout("BNC", 1)
    feature = torch.cat([prefix, patches], 1)
    found = layout.to_map(feature, (48, 32))  # a grid of 3 x 2
    assert found.shape == (2, 5, 3, 2) and layout.size(feature, (48, 32)) == (3, 2)
    for row in range(3):
        for column in range(2):
            assert torch.equal(found[:, :, row, column], patches[:, 2 * row + column])
    assert torch.equal(layout.prefix(feature), prefix)
    assert torch.equal(layout.from_map(found, layout.prefix(feature)), feature)


def test_channels_last_becomes_channels_first():
    feature = torch.randn(2, 3, 4, 5)
    found = Layout("BHWC").to_map(feature, (30, 40))
    assert found.shape == (2, 5, 3, 4) and found[1, 4, 2, 3] == feature[1, 2, 3, 4]
    assert Layout("BHWC").size(feature, (30, 40)) == (3, 4) and Layout("BHWC").prefix(feature) is None
    assert torch.equal(Layout("BHWC").from_map(found, None), feature)


def test_a_map_stays_as_it_is():
    feature = torch.randn(2, 5, 3, 4)
    assert Layout().to_map(feature, (30, 40)) is feature and Layout().from_map(feature, None) is feature
    assert Layout().size(feature, (30, 40)) == (3, 4) and Layout().prefix(feature) is None


@pytest.mark.parametrize("layout", [Layout(), Layout("BHWC"), Layout("BNC"), Layout("BNC", 2)])
def test_the_way_back_lets_a_gradient_through(layout):
    features = torch.randn(2, 5, 3, 4, requires_grad=True)
    prefix = torch.randn(2, layout.prefix_tokens, 5) if layout.prefix_tokens else None
    out = layout.from_map(features, prefix)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    torch.testing.assert_close(features.grad, layout.to_map(weight, (30, 40)))


def test_prefix_tokens_take_the_type_of_the_patches():
    out = Layout("BNC", 1).from_map(torch.zeros(2, 5, 3, 4, dtype=torch.bfloat16), torch.ones(2, 1, 5))
    assert out.dtype == torch.bfloat16 and out.shape == (2, 13, 5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "NHWC"}, r"kind must be one of \['BCHW', 'BHWC', 'BNC'\], found 'NHWC'"),
        ({"kind": "BNC", "prefix_tokens": -1}, "prefix_tokens must be 0 or more, found -1"),
        ({"kind": "BHWC", "prefix_tokens": 1}, "prefix_tokens must be 0 in a map, found 1"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Layout(**kwargs)


def test_missing_or_superfluous_prefix_tokens_are_refused():
    with pytest.raises(ValueError, match="have 1 prefix tokens, found 0"):
        Layout("BNC", 1).from_map(torch.zeros(2, 5, 3, 4), None)
    with pytest.raises(ValueError, match="have 0 prefix tokens, found 2"):
        Layout().from_map(torch.zeros(2, 5, 3, 4), torch.zeros(2, 2, 5))


def test_tokens_that_form_no_grid_are_refused():
    with pytest.raises(ValueError, match=r"18 tokens less 1 form no grid .* 64 x 64 pixels"):
        Layout("BNC", 1).to_map(torch.zeros(2, 18, 5), (64, 64))


@pytest.mark.parametrize(
    ("tokens", "told", "prefix"),
    [
        (17, {"num_prefix_tokens": 1}, 1),
        (16, {"num_prefix_tokens": 1}, 0),  # XCiT and CaiT: the class token comes later
        (21, {"num_prefix_tokens": 5}, 5),
        (25, {"num_prefix_tokens": 9}, 9),  # more than would be guessed
        (18, {}, 2),
        (21, {}, 5),
        (16, {}, 0),
        (16, {"num_prefix_tokens": None}, 0),
    ],
)
def test_prefix_tokens_are_timms_where_they_fit_else_as_few_as_possible(tokens, told, prefix):
    assert layout_of((tokens, 48), **told) == Layout("BNC", prefix)


def test_prefix_tokens_of_an_image_that_is_not_square():
    assert layout_of((7, 48), (48, 32), num_prefix_tokens=1) == Layout("BNC", 1)
    assert layout_of((8, 48), (48, 32)) == Layout("BNC", 2)  # 3 x 2 exactly, though 4 x 2 is a stride of 11
    assert layout_of((8, 48), (47, 32)) == Layout("BNC", 0)


@pytest.mark.parametrize(
    ("shape", "image_size", "attributes", "kind"),
    [
        ((8, 16, 16), (64, 64), {}, "BCHW"),
        ((16, 16, 8), (64, 64), {}, "BHWC"),  # equal sides of an image with equal sides
        ((16, 16, 16), (64, 64), {}, "BCHW"),
        ((16, 16, 16), (64, 64), {"output_fmt": "NHWC"}, "BHWC"),
        ((16, 16, 16), (64, 64), {"output_fmt": "NCHW"}, "BCHW"),
        ((8, 16, 16), (64, 64), {"output_fmt": "NHWC"}, "BCHW"),  # a convolution inside of a Swin
        ((8, 4, 16), (64, 32), {}, "BHWC"),
        ((4, 8, 4), (64, 32), {}, "BCHW"),
        ((61, 61, 29), (128, 64), {}, "BCHW"),  # without padding the ratio is not kept: undecided
        ((61, 29, 64), (128, 64), {"output_fmt": "NHWC"}, "BHWC"),
    ],
)
def test_channels_lie_where_the_image_leaves_room_for_them(shape, image_size, attributes, kind):
    assert layout_of(shape, image_size, **attributes) == Layout(kind)


@pytest.mark.parametrize(("channels", "kind"), [(29, "BHWC"), (64, "BCHW"), (7, "BCHW")])
@pytest.mark.parametrize("as_object", [True, False])
def test_timm_tells_how_many_channels_a_stage_has(channels, kind, as_object):
    info = [{"module": "other", "num_chs": 29}, {"module": "tap", "num_chs": channels}]
    info = SimpleNamespace(info=info) if as_object else info
    assert layout_of((64, 61, 29), (128, 64), feature_info=info) == Layout(kind)


@pytest.mark.parametrize("shape", [(4, 16, 192), (16, 4, 192), (1, 16, 384)])
def test_windows_with_patches_in_each_are_no_map(shape):
    with pytest.raises(ValueError, match=r"tap 'tap' yields shape \(2, .* no two axes are a map"):
        layout_of(shape)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 5)])
def test_other_numbers_of_axes_are_refused_by_name(shape):
    with pytest.raises(ValueError, match=r"tap 'tap' yields shape \(2, .*not a map"):
        layout_of(shape)


def test_tokens_without_a_grid_are_refused_by_name():
    with pytest.raises(ValueError, match=r"tap 'tap' yields shape \(2, 24, 48\): its tokens, less up to 5 in front"):
        layout_of((24, 48))


def test_one_quadrant_at_a_time_is_changed():
    image = torch.randn(1, 3, 7, 8)
    versions = change_quadrants(image)
    assert versions.shape == (5, 3, 7, 8) and torch.equal(versions[:1], image)
    changed = (versions != image).all(1)
    assert not changed[0].any()
    for version, rows, columns in zip(changed[1:], [(0, 3), (0, 3), (4, 7), (4, 7)], [(0, 4), (4, 8)] * 2, strict=True):
        expected = torch.zeros(7, 8, dtype=torch.bool)
        expected[slice(*rows), slice(*columns)] = True
        assert torch.equal(version, expected)


def of_quadrants(change):
    """Maps (5, 1, 8, 8): in the version with quadrant q changed, q's places change by 6 and the others by 2."""
    maps = torch.zeros(5, 1, 8, 8)
    for quadrant, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        maps[quadrant + 1] = 2
        maps[quadrant + 1, :, row : row + 4, column : column + 4] = change
    return maps


@pytest.mark.parametrize("change", [6, -6])
def test_a_map_in_order_follows_its_own_quadrants(change):
    assert quadrants_followed(Layout(), of_quadrants(change), (64, 64)) == (pytest.approx(3), 1)
    tokens = Layout("BNC").from_map(of_quadrants(change))
    tokens = torch.cat([torch.zeros(5, 1, 1), tokens], 1)
    assert quadrants_followed(Layout("BNC", 1), tokens, (64, 64)) == (pytest.approx(3), 1)


def test_tokens_in_an_order_of_their_own_follow_other_quadrants():
    maps = of_quadrants(6)
    # places of all four quadrants side by side: (2 4) (2 4) -> (4 2) (4 2), as Hiera's pooling units lie
    mixed = maps.reshape(5, 1, 2, 4, 2, 4).transpose(2, 3).transpose(4, 5).reshape(5, 1, 8, 8)
    assert quadrants_followed(Layout(), mixed, (64, 64)) == (pytest.approx(3), 0.25)


def test_a_map_that_mixes_all_follows_none():
    maps = of_quadrants(2)
    assert quadrants_followed(Layout(), maps, (64, 64))[0] == pytest.approx(1)


def test_a_change_is_measured_in_all_channels_together():
    maps = torch.cat([of_quadrants(6), of_quadrants(6) * 0.1], 1)
    assert quadrants_followed(Layout(), maps, (64, 64)) == (pytest.approx(3), 1)


@pytest.mark.parametrize("size", [(3, 8), (8, 3), (2, 2)])
def test_a_small_map_is_not_judged(size):
    assert quadrants_followed(Layout(), torch.randn(5, 2, *size), size) == (1, 1)
