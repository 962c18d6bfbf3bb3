import numpy as np
import pytest
import torch
from PIL import Image

from distill.data import DataConfig, Preprocessing
from distill.data.timm_augment import _operations, timm_parts

PRE = Preprocessing(input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
IMAGE = Image.new("RGB", (8, 8), (255, 129, 64))


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "v0", "augmix-m10"])
def test_posterize_to_no_bits_is_black_and_to_more_keeps_the_highest(policy):
    (augment,) = timm_parts(DataConfig(auto_augment=policy), PRE).augment.transforms
    posterize = [op.aug_fn for op in _operations(augment) if op.name.startswith("Posterize")]
    assert posterize
    for function in posterize:
        assert np.asarray(function(IMAGE, 0)).max() == 0  # Pillow 13 raises here, timm asks for it
        assert function(IMAGE, 1).getpixel((0, 0)) == (128, 128, 0)
        assert function(IMAGE, 2).getpixel((0, 0)) == (192, 128, 64)
        assert function(IMAGE, 8).getpixel((0, 0)) == (255, 129, 64)


def test_the_last_part_normalises():
    values = timm_parts(DataConfig(random_resized_crop=True), PRE).to_input(IMAGE)
    torch.testing.assert_close(values[:, 0, 0], torch.tensor([1.0, 129 / 127.5 - 1, 64 / 127.5 - 1]))


def test_erasing_and_flips_happen_with_their_probability():
    always = timm_parts(DataConfig(random_resized_crop=True, random_erasing=1.0), PRE)
    never = timm_parts(DataConfig(random_resized_crop=True), PRE)
    assert not torch.equal(always.to_input(IMAGE), never.to_input(IMAGE))
    assert [type(t).__name__ for t in never.crop.transforms] == ["RandomResizedCropAndInterpolation"]
    flipping = timm_parts(DataConfig(random_resized_crop=True, hflip=0.25), PRE)
    assert flipping.crop.transforms[1].p == 0.25


def test_only_grey_and_colour_images_can_be_augmented_by_timm():
    pre = Preprocessing(input_size=(2, 8, 8), mean=(0.5,) * 2, std=(0.5,) * 2)
    with pytest.raises(ValueError, match=r"input_size is \(2, 8, 8\).*1 or 3 channels"):
        timm_parts(DataConfig(random_erasing=0.5), pre)
