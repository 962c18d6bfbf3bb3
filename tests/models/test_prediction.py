"""From image files to names: the pixels are those of evaluation, the numbers those of the network."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from toy_networks import Residual, calibrated, generic, spiking

from models import NeuronConfig, PoissonEncoder, Prediction, create_snn
from models.images import UnreadableImage
from models.prediction import until_sure
from models.preprocessing import Normalize, Preprocessing, preprocessing_of, resize_and_crop

CLASSES = ["cat", "dog", "eel", "fox", "gnu"]
EXTRA = {"input_size": [3, 8, 8], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "classes": CLASSES}


def network(timesteps=3, **extra):
    torch.manual_seed(0)
    snn = spiking(generic(Residual(NeuronConfig(leak=0.5, threshold=0.7))), timesteps)
    snn = calibrated(snn, torch.randn(8, 3, 8, 8, dtype=torch.float64))
    snn.spec["extra"] = EXTRA | extra
    return snn


def image(seed=0, size=(8, 8), mode="RGB"):
    shape = (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).convert(mode)


def by_hand(picture):
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float() / 255
    mean, std = (torch.tensor(EXTRA[name])[:, None, None] for name in ("mean", "std"))
    return ((values - mean) / std).double()[None]


def test_an_image_of_the_input_size_is_normalised_and_named():
    snn, picture = network(), image()
    found = snn.predict(picture)
    logits = snn(by_hand(picture))[0]
    torch.testing.assert_close(found.logits, logits, rtol=0, atol=0)
    order = sorted(range(5), key=lambda k: -logits[k].item())
    total = sum(math.exp(x) for x in logits.tolist())
    assert isinstance(found, Prediction) and found.timesteps == 3
    assert found.indices == tuple(order) and found.classes == tuple(CLASSES[k] for k in order)
    assert found.probabilities == pytest.approx([math.exp(logits[k].item()) / total for k in order])
    assert not found.logits.requires_grad


def test_other_sizes_are_resized_on_the_shorter_side_and_cropped_in_the_middle():
    """16 x 32 pixels, each twice in both directions: "nearest" gives them back once, then the middle is cut out."""
    small = np.random.default_rng(1).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    large = Image.fromarray(small.repeat(2, 0).repeat(2, 1))
    snn = network(interpolation="nearest")
    found = snn.predict(large)
    expected = snn(by_hand(Image.fromarray(small[:, 4:12])))[0]
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=0)


def test_a_network_that_says_so_sees_whole_images_squashed_or_within_a_border():
    """The same 16 x 32 pixels: squashed, every second column is left; within a border, the mean is above and below."""
    small = np.random.default_rng(1).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    large = Image.fromarray(small.repeat(2, 0).repeat(2, 1))
    squashed = network(interpolation="nearest", crop_mode="squash").predict(large)
    snn = network(interpolation="nearest", crop_mode="border")
    columns = np.asarray(large.resize((8, 8), Image.Resampling.NEAREST))
    torch.testing.assert_close(squashed.logits, snn(by_hand(Image.fromarray(columns)))[0], rtol=0, atol=0)
    bordered = np.empty((8, 8, 3), dtype=np.uint8)
    bordered[:] = [102, 128, 153]  # round(255 * mean)
    bordered[2:6] = np.asarray(large.resize((8, 4), Image.Resampling.NEAREST))
    torch.testing.assert_close(snn.predict(large).logits, snn(by_hand(Image.fromarray(bordered)))[0], rtol=0, atol=0)


def test_crop_pct_leaves_the_border_out():
    pre = Preprocessing(input_size=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="nearest", crop_pct=0.5)
    picture = image(size=(16, 16))
    assert torch.equal(
        resize_and_crop(pre)(picture), torch.from_numpy(np.array(picture)).permute(2, 0, 1)[:, 4:12, 4:12]
    )
    pixels = Normalize(Preprocessing(input_size=(1, 1, 2), mean=(0.5,), std=(0.25,)))(torch.tensor([[[0, 255]]]))
    assert pixels.flatten().tolist() == [-2.0, 2.0]


def test_files_and_images_alone_and_in_lists(tmp_path):
    snn, pictures = network(), [image(seed) for seed in range(5)]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    expected = [snn.predict(picture) for picture in pictures]
    paths = [tmp_path / "0.png", str(tmp_path / "1.png"), *pictures[2:]]
    for batch_size in (2, 32):
        found = snn.predict(paths, topk=2, batch_size=batch_size)
        assert [len(p.classes) for p in found] == [2] * 5
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-12, atol=1e-12)
            assert ours.indices == theirs.indices[:2]
    assert isinstance(snn.predict(str(tmp_path / "3.png")), Prediction) and snn.predict([]) == []


def test_grey_and_transparent_images_become_what_the_network_takes():
    snn, picture = network(), image(mode="L")
    for given in (picture, picture.convert("RGBA"), picture.convert("P")):
        assert torch.equal(snn.predict(given).logits, snn(by_hand(picture.convert("RGB")))[0])


def test_sixteen_bits_of_grey_are_seen_by_their_high_byte_and_32_are_refused():
    snn, picture = network(), image(mode="L")
    deep = np.asarray(picture).astype(np.uint16) * 256 + 7
    assert torch.equal(snn.predict(Image.fromarray(deep)).logits, snn.predict(picture).logits)
    with pytest.raises(ValueError, match="mode 'I', 32 bits"):
        snn.predict(Image.fromarray(deep.astype(np.int32)))


def test_without_names_classes_are_numbers():
    snn = network()
    snn.spec["extra"] = {name: value for name, value in EXTRA.items() if name != "classes"}
    found = snn.predict(image())
    assert found.classes == tuple(map(str, found.indices))


def test_poisson_input_is_drawn_from_the_pixels():
    snn = network()
    snn.input_encoder = PoissonEncoder(mean=EXTRA["mean"], std=EXTRA["std"])
    torch.manual_seed(1)
    found = snn.predict(image())
    torch.manual_seed(1)
    torch.testing.assert_close(found.logits, snn(by_hand(image()))[0], rtol=0, atol=0)


# -- early exit ---------------------------------------------------------------------------------------


def logits_of(*margins):
    """Two classes whose probabilities differ by a margin: sigmoid(x) - sigmoid(-x) = tanh(x / 2)."""
    return torch.tensor([[2 * math.atanh(m), 0.0] for m in margins], dtype=torch.float64)


def test_each_image_keeps_the_logits_of_the_step_at_which_it_was_sure():
    steps = [logits_of(0.95, 0.1, 0.0), logits_of(0.2, 0.89, 0.1), logits_of(0.0, 0.91, 0.2), logits_of(0.3, 0.3, 0.3)]
    logits, taken = until_sure(iter(steps), 0.9)
    assert taken.tolist() == [1, 3, 4]
    assert torch.equal(logits, torch.stack([steps[0][0], steps[2][1], steps[3][2]]))


def test_no_step_is_run_when_all_are_sure():
    asked = []

    def steps():
        for number, logits in enumerate([logits_of(0.5, 0.95), logits_of(0.9001, 0.1), logits_of(1 - 1e-9, 0.1)]):
            asked.append(number)
            yield logits

    _, taken = until_sure(steps(), 0.9)
    assert taken.tolist() == [2, 1] and asked == [0, 1]
    for margin in (0.0, 1.01, -1.0):
        with pytest.raises(ValueError, match=r"early_exit is a margin of probabilities in \(0, 1\], found"):
            until_sure(steps(), margin)
    with pytest.raises(ValueError, match="the network has one logit"):
        until_sure(iter([torch.zeros(2, 1)]), 0.5)


def test_early_exit_in_a_network():
    snn, picture = network(4), image()
    each = list(snn.steps(by_hand(picture)))
    probabilities = [logits[0].softmax(0).sort(descending=True).values for logits in each]
    margins = [(p[0] - p[1]).item() for p in probabilities]
    assert max(margins) < 1
    everything = snn.predict(picture, early_exit=1.0)
    assert everything.timesteps == 4
    torch.testing.assert_close(everything.logits, snn.predict(picture).logits, rtol=1e-12, atol=1e-12)
    first = next(number for number, margin in enumerate(margins, 1) if margin >= max(margins))
    found = snn.predict(picture, early_exit=max(margins) - 1e-9)
    assert found.timesteps == first and torch.equal(found.logits, each[first - 1][0])


# -- what is refused ----------------------------------------------------------------------------------


def test_files_that_are_missing_or_no_images_are_named(tmp_path):
    snn = network()
    with pytest.raises(FileNotFoundError, match=r"there is no image at .*none\.png"):
        snn.predict(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UnreadableImage, match=r"cannot read the image .*text.png: not in a format that Pillow knows"):
        snn.predict([image(), tmp_path / "text.png"])
    image(size=(64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(UnreadableImage, match=r"cannot read the image .*half.png: .*truncated"):
        snn.predict(tmp_path / "half.png")
    with pytest.raises(FileNotFoundError, match="there is no image at"):
        snn.predict(tmp_path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"input_size": [2, 8, 8], "mean": [0, 0], "std": [1, 1]}, "SpikingResidual takes 2: networks of event frames"),
        ({"classes": ["a"]}, "the network gives 5 logits, its extra.classes names 1 classes"),
        ({"interpolation": "magic"}, "interpolation is 'magic'"),
        ({"mean": None}, "does not say how its images are made"),
    ],
)
def test_networks_that_do_not_say_enough_are_refused(extra, message):
    with pytest.raises(ValueError, match=message):
        network(**extra).predict(image())


def test_mistakes_are_named():
    snn = network()
    for argument in ("topk", "batch_size"):
        with pytest.raises(ValueError, match=f"{argument} must be at least 1, found 0"):
            snn.predict(image(), **{argument: 0})
    with pytest.raises(TypeError, match="predict takes PIL images and paths of images, found Tensor"):
        snn.predict(torch.rand(1, 3, 8, 8))
    with pytest.raises(TypeError, match="predict takes PIL images and paths of images, found int"):
        snn.predict([image(), 7])
    with pytest.raises(ValueError, match=r"evaluation mode: call eval\(\)"):
        snn.train().predict(image())
    with pytest.raises(ValueError, match=r"how its images are made: extra.input_size is missing"):
        create_snn("resnet18_cifar", width=8).eval().predict(image())
    with pytest.raises(ValueError, match=r"extra.std is missing"):
        preprocessing_of({"extra": {"input_size": [1, 2, 2], "mean": [0]}})
    snn.eval()._step_mode = "s"
    with pytest.raises(ValueError, match='predict runs whole images: it does not go with step mode "s"'):
        snn.predict(image())
