import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from distill.data import DataConfig, Preprocessing
from distill.data.files import find_split, list_split
from distill.data.seeds import SampleKey
from distill.data.transforms import CropFlipTransform, EvalTransform, ResizedCropTransform, train_transform

DATA = Path(__file__).parents[3] / os.environ.get("DISTILL_DATA", "../shared/data")
KEY = SampleKey(0, 0, 0)


def preprocessing(channels=3, height=8, width=8, **fields) -> Preprocessing:
    """mean 0 and std 1/255, so that normalised values are the pixels' own, up to rounding."""
    return Preprocessing(
        input_size=(channels, height, width), mean=(0.0,) * channels, std=(1 / 255,) * channels, **fields
    )


def picture(height=8, width=8, channels=3) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels if channels == 3 else pixels[..., 0])


def pixels(tensor: torch.Tensor) -> np.ndarray:
    return tensor.round().to(torch.uint8).numpy()


def both_halves(transform, image, key=KEY):
    return transform.finish(transform.prepare(image), key)


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_values_of_a_two_by_two_image(kind):
    pre = Preprocessing(input_size=(1, 2, 2), mean=(0.5,), std=(0.25,))
    transform = EvalTransform(pre) if kind == "eval" else train_transform(DataConfig(), pre)
    image = Image.fromarray(np.array([[0, 255], [51, 102]], dtype=np.uint8))
    result = both_halves(transform, image)  # 0, 1, 0.2, 0.4 in [0, 1]; minus 1/2, times 4
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.tensor([[[-2.0, 2.0], [-1.2, -0.4]]]))


def test_each_channel_has_its_own_mean_and_std():
    pre = Preprocessing(input_size=(3, 1, 1), mean=(0.0, 0.2, 0.4), std=(1.0, 0.5, 0.1))
    result = both_halves(EvalTransform(pre), Image.fromarray(np.array([[[51, 153, 255]]], dtype=np.uint8)))
    torch.testing.assert_close(result.flatten(), torch.tensor([0.2, 0.8, 6.0]))  # (0.6 - 0.2) / 0.5, (1 - 0.4) / 0.1


def test_random_crops_are_windows_of_the_image_padded_by_numpy():
    image, padding = picture(height=5, width=6), 2
    transform = CropFlipTransform(preprocessing(height=5, width=6), padding, hflip=0.5)
    chw = np.asarray(image).transpose(2, 0, 1)
    padded = np.pad(chw, ((0, 0), (padding, padding), (padding, padding)), mode="reflect")
    windows = {}
    for top in range(5):
        for left in range(5):
            window = padded[:, top : top + 5, left : left + 6]
            windows[window.tobytes()] = (top, left, False)
            windows[window[:, :, ::-1].tobytes()] = (top, left, True)
    assert len(windows) == 50  # all distinct, so a crop names its window
    seen = [windows[pixels(both_halves(transform, image, SampleKey(0, 0, i))).tobytes()] for i in range(1000)]
    assert set(seen) == set(windows.values())
    # 1000 draws: 500 +- 5 standard deviations (15.8) flips, and the first row of windows 200 +- 5 x 12.6 times
    assert 420 < sum(flip for _, _, flip in seen) < 580
    assert 135 < sum(top == 0 for top, _, _ in seen) < 265


def test_crops_depend_on_seed_epoch_and_image():
    transform, stored = CropFlipTransform(preprocessing(), 4, 0.5), picture()
    stored = transform.prepare(stored)

    def crops(seed, epoch):
        return torch.stack([transform.finish(stored, SampleKey(seed, epoch, i)) for i in range(20)])

    assert torch.equal(crops(0, 0), crops(0, 0))
    assert not torch.equal(crops(0, 0), crops(1, 0))
    assert not torch.equal(crops(0, 0), crops(0, 1))
    assert len({crop.numpy().tobytes() for crop in crops(0, 0)}) > 10


@pytest.mark.parametrize(("hflip", "step"), [(0.0, 1), (1.0, -1)])
def test_flips_of_probability_zero_and_one_are_certain(hflip, step):
    transform, image = CropFlipTransform(preprocessing(), 0, hflip), picture()
    expected = np.asarray(image).transpose(2, 0, 1)[:, :, ::step]
    for index in range(50):
        assert (pixels(both_halves(transform, image, SampleKey(0, 0, index))) == expected).all()


def test_finishing_leaves_the_stored_image_as_it_was():
    for config in (DataConfig(), DataConfig(crop_padding=2, hflip=1.0), DataConfig(random_erasing=1.0)):
        transform = train_transform(config, preprocessing())
        stored = transform.prepare(picture())
        before = stored.clone()
        transform.finish(stored, KEY)
        assert torch.equal(stored, before)


def test_training_resizes_the_whole_image_when_its_size_differs():
    image = Image.fromarray(np.repeat(np.array([[10, 20], [30, 40]], dtype=np.uint8), 6, axis=1))  # 2 x 12
    pre = preprocessing(channels=1, height=4, width=2, interpolation="nearest")
    result = pixels(both_halves(train_transform(DataConfig(), pre), image))
    assert result.tolist() == [[[10, 20], [10, 20], [30, 40], [30, 40]]]


def test_padding_as_large_as_the_image_is_refused():
    assert CropFlipTransform(preprocessing(), 7, 0.0).stored_shape == (3, 8, 8)
    with pytest.raises(ValueError, match="crop_padding is 8; a 8x8 image allows 0 to 7"):
        CropFlipTransform(preprocessing(), 8, 0.0)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize(("size", "crop_pct"), [((32, 32), 1.0), ((32, 32), 0.875), ((24, 32), 0.9)])
@pytest.mark.parametrize("image_size", [(32, 32), (40, 50), (20, 20), (90, 17), (16, 33)])
def test_evaluation_equals_timm_bit_by_bit(size, crop_pct, crop_mode, image_size):
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    options = {"interpolation": "bicubic", "crop_pct": crop_pct, "crop_mode": crop_mode, "mean": mean, "std": std}
    expected = create_transform((3, *size), is_training=False, **options)(picture(*image_size))
    result = both_halves(EvalTransform(Preprocessing(input_size=(3, *size), **options)), picture(*image_size))
    assert torch.equal(result, expected)


@pytest.mark.parametrize("crop_mode", ["squash", "border"])
def test_evaluation_of_grey_images_equals_timm(crop_mode):
    options = {"crop_pct": 0.875, "crop_mode": crop_mode, "mean": (0.3,), "std": (0.4,)}
    expected = create_transform((1, 8, 8), is_training=False, interpolation="bilinear", **options)
    image = picture(9, 20, 1)
    found = both_halves(EvalTransform(Preprocessing(input_size=(1, 8, 8), **options)), image)
    assert torch.equal(found, expected(image))


def test_evaluation_keeps_the_pixels_of_an_image_of_the_right_size_unless_it_crops():
    image = picture(32, 32)
    raw = np.asarray(image).transpose(2, 0, 1)
    assert (pixels(both_halves(EvalTransform(preprocessing(3, 32, 32)), image)) == raw).all()
    # floor(32 / 0.99) is still 32; floor(32 / 0.95) is 33: enlarged, then cropped
    assert (pixels(both_halves(EvalTransform(preprocessing(3, 32, 32, crop_pct=0.99)), image)) == raw).all()
    assert (pixels(both_halves(EvalTransform(preprocessing(3, 32, 32, crop_pct=0.95)), image)) != raw).any()


def test_evaluation_of_a_photo_equals_timm():
    if not (DATA / "imagenet_sample").is_dir():
        pytest.skip(f"no real data in {DATA}: set DISTILL_DATA")
    photo = list_split(find_split(str(DATA / "imagenet_sample"), "val")).files[123].open("RGB")
    options = {"interpolation": "bicubic", "crop_pct": 0.875, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    expected = create_transform((3, 224, 224), is_training=False, **options)(photo)
    assert torch.equal(both_halves(EvalTransform(Preprocessing(input_size=(3, 224, 224), **options)), photo), expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "fields",
    [
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
        {"auto_augment": "augmix-m5-w3"},
        {"random_erasing": 0.9},
        {"random_resized_crop": True, "hflip": 0.5},
        {"random_resized_crop": True, "auto_augment": "v0", "random_erasing": 0.5},
    ],
)
def test_timms_augmentation_repeats_for_a_key_and_leaves_the_generators_alone(fields, channels):
    transform = train_transform(DataConfig(**fields), preprocessing(channels, 16, 16))
    stored = transform.prepare(picture(20, 24, channels))
    torch.manual_seed(0)
    expected_next = torch.rand(())
    torch.manual_seed(0)
    results = [transform.finish(stored, SampleKey(0, 0, i)) for i in range(8)]
    assert torch.rand(()) == expected_next
    assert all(result.shape == (channels, 16, 16) and result.dtype == torch.float32 for result in results)
    for index, result in enumerate(results):
        assert torch.equal(transform.finish(stored, SampleKey(0, 0, index)), result)
    assert len({result.numpy().tobytes() for result in results}) > 2


def test_crop_and_flip_come_before_timms_part():
    image = picture()
    plain = CropFlipTransform(preprocessing(), 3, 0.5)
    erased = train_transform(DataConfig(crop_padding=3, hflip=0.5, random_erasing=1.0), preprocessing())
    for index in range(20):
        expected, result = (both_halves(t, image, SampleKey(0, 0, index)) for t in (plain, erased))
        same = (result == expected).all(dim=0).float().mean()
        assert 0.5 < same < 1  # timm erases 2 to 33 % of the area, rounded to whole pixels


def test_a_resized_crop_starts_from_the_image_at_its_own_size():
    transform = train_transform(DataConfig(random_resized_crop=True), preprocessing())
    assert isinstance(transform, ResizedCropTransform)
    assert transform.stored_shape is None
    assert transform.prepare(picture(30, 20)).size == (20, 30)


def test_no_colour_jitter_without_being_asked_for():
    grey = Image.new("RGB", (20, 20), (10, 100, 200))  # any crop of one colour is that colour
    transform = train_transform(DataConfig(random_resized_crop=True, hflip=0.5), preprocessing())
    for index in range(10):
        result = pixels(both_halves(transform, grey, SampleKey(0, 0, index)))
        assert (result == np.array([10, 100, 200]).reshape(3, 1, 1)).all()
