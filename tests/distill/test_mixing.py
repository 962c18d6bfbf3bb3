"""Mixup and CutMix against their definition, with the share of each image read back from the labels."""

import numpy as np
import pytest
import torch

from distill import TrainConfig
from distill.mixing import Mixing

LABELS = torch.tensor([0, 1, 2, 3])
PARTNERS = [3, 2, 1, 0]


def images_of(count=4, size=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, size, size, generator=generator)


def mixing_of(classes=5, label_smoothing=0.0, seed=0, **fields):
    return Mixing(TrainConfig(**fields), classes, label_smoothing, seed)


def share_of(labels):
    """lam, from the first image's label (B, K): class 0 with lam, its partner's class 3 with 1 - lam."""
    return labels[0, 0].item()


@pytest.mark.parametrize("step", range(4))
def test_mixup_mixes_images_and_labels_by_the_same_share(step):
    images = images_of()
    mixed, labels = mixing_of(mixup=1.0)(images, LABELS, step)
    lam = share_of(labels)
    assert 0 < lam < 1
    torch.testing.assert_close(mixed, lam * images + (1 - lam) * images[PARTNERS], rtol=0, atol=1e-6)
    one_hot = torch.eye(5)[LABELS]
    torch.testing.assert_close(labels, lam * one_hot + (1 - lam) * one_hot[PARTNERS], rtol=0, atol=1e-6)
    assert labels.dtype == torch.float32 and labels.shape == (4, 5)


@pytest.mark.parametrize("step", range(6))
def test_cutmix_pastes_one_box_whose_area_is_in_the_labels(step):
    images = images_of()
    mixed, labels = mixing_of(cutmix=1.0)(images, LABELS, step)
    pasted = (mixed == images[PARTNERS]).all(1)
    assert (pasted | (mixed == images).all(1)).all()  # each place is of one of the two images, with all channels
    assert (pasted == pasted[:1]).all()  # the same box for all
    rows, columns = pasted[0].any(1), pasted[0].any(0)
    assert (pasted[0] == rows[:, None] & columns[None, :]).all()  # a rectangle
    for line in (rows, columns):  # without a gap
        assert (line.int().diff() == 1).sum() <= 1 and (line.int().diff() == -1).sum() <= 1
    assert share_of(labels) == pytest.approx(1 - pasted[0].float().mean().item(), abs=1e-6)
    assert labels[0, 0] + labels[0, 3] == pytest.approx(1, abs=1e-6)


def test_the_boxes_are_not_all_the_same_and_some_are_cut_at_the_border():
    images = images_of()
    mix = mixing_of(cutmix=1.0)
    boxes = [(mix(images, LABELS, step)[0] == images[PARTNERS]).all(1)[0] for step in range(12)]
    assert len({tuple(box.flatten().tolist()) for box in boxes}) > 6
    sides = [(box.any(1).sum().item(), box.any(0).sum().item()) for box in boxes]
    assert any(height != width for height, width in sides)  # a box in the middle of a square image is a square


def test_the_labels_are_smoothed_before_they_are_mixed():
    _, plain = mixing_of(mixup=1.0)(images_of(), LABELS, 3)
    _, smoothed = mixing_of(mixup=1.0, label_smoothing=0.5)(images_of(), LABELS, 3)
    torch.testing.assert_close(smoothed, 0.5 * plain + 0.5 / 5, rtol=0, atol=1e-6)


def test_alpha_is_that_of_a_beta_distribution():
    images = images_of(2, size=2)
    mixes = {alpha: mixing_of(mixup=alpha) for alpha in (0.2, 8.0)}
    lams = {a: torch.tensor([share_of(m(images, LABELS[:2], s)[1]) for s in range(400)]) for a, m in mixes.items()}
    for alpha, lam in lams.items():  # variance 1 / (4 (2 alpha + 1))
        assert lam.mean() == pytest.approx(0.5, abs=0.06)
        assert lam.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.2)


def kind_of(mixing, step):
    images = images_of()
    mixed, labels = mixing(images, LABELS, step)
    if torch.equal(mixed, images):
        assert torch.equal(labels, torch.eye(5)[LABELS])
        return "none"
    return "cutmix" if ((mixed == images) | (mixed == images[PARTNERS])).all() else "mixup"


def test_the_shares_of_batches_that_are_mixed_and_that_cutmix_mixes():
    mix = mixing_of(mixup=1.0, cutmix=1.0, mixup_prob=0.75, mixup_switch_prob=0.25)
    kinds = [kind_of(mix, step) for step in range(400)]
    shares = {kind: kinds.count(kind) / 400 for kind in ("none", "cutmix", "mixup")}
    assert shares == pytest.approx({"none": 1 / 4, "cutmix": 3 / 16, "mixup": 9 / 16}, abs=0.07)
    assert {kind_of(mixing_of(mixup=1.0, cutmix=1.0, mixup_switch_prob=1.0), s) for s in range(10)} == {"cutmix"}
    assert {kind_of(mixing_of(mixup=1.0, cutmix=1.0, mixup_switch_prob=0.0), s) for s in range(10)} == {"mixup"}


def test_it_depends_on_seed_step_and_rank_and_on_nothing_else():
    images = images_of()

    def share(seed, step, rank):
        return share_of(mixing_of(mixup=1.0, seed=seed)(images, LABELS, step, rank)[1])

    first = mixing_of(mixup=1.0, cutmix=1.0)
    np.random.seed(1)
    found = first(images, LABELS, 5, 2)
    first(images, LABELS, 6, 2)
    np.random.seed(2)
    torch.manual_seed(3)
    for mixing in (first, mixing_of(mixup=1.0, cutmix=1.0)):
        again = mixing(images, LABELS, 5, 2)
        assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])
    keys = [(seed, step, rank) for seed in range(3) for step in range(3) for rank in range(3)]
    assert len({share(*key) for key in keys}) == 27  # (0, 1, 2) is not (0, 2, 1)


def test_numpys_generator_goes_on_as_if_nothing_had_been_drawn():
    np.random.seed(7)
    expected = np.random.rand(3).tolist()
    np.random.seed(7)
    found = [np.random.rand()]
    mixing_of(mixup=1.0, cutmix=1.0)(images_of(), LABELS, 0)
    found.append(np.random.rand())
    with pytest.raises(RuntimeError):
        mixing_of(mixup=1.0)(images_of(), torch.tensor([0, 1, 2, 99]), 0)  # a label out of range, inside of timm
    found.append(np.random.rand())
    assert found == expected


@pytest.mark.parametrize("fields", [dict(mixup=1.0), dict(cutmix=1.0), dict(mixup=1.0, mixup_prob=0.0)])
def test_the_callers_images_stay_and_so_does_their_memory_format(fields):
    images, labels = images_of().contiguous(memory_format=torch.channels_last), LABELS.clone()
    before = images.clone()
    mixed, _ = mixing_of(**fields)(images, labels, 0)
    assert torch.equal(images, before) and torch.equal(labels, LABELS)
    assert mixed.data_ptr() != images.data_ptr()
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert mixing_of(**fields)(before.contiguous(), labels, 0)[0].is_contiguous()


def test_without_mixup_and_cutmix_a_batch_stays_as_it_is():
    mix = mixing_of()
    images = images_of(3)
    assert not mix.enabled and mixing_of(mixup=0.1).enabled and mixing_of(cutmix=0.1).enabled
    found = mix(images, LABELS[:3], 0)
    assert found[0] is images and torch.equal(found[1], LABELS[:3])


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(ValueError, match=r"event frames have no mixup or cutmix, found shape \(4, 2, 3, 8, 8\)"):
        mixing_of(mixup=1.0)(torch.zeros(4, 2, 3, 8, 8), LABELS, 0)
    with pytest.raises(ValueError, match="an even number of images, found 3"):
        mixing_of(mixup=1.0)(images_of(3), LABELS[:3], 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(mixup=-1.0), "mixup must be at least 0, found -1.0"),
        (dict(cutmix=-0.5), "cutmix must be at least 0, found -0.5"),
        (dict(mixup_prob=1.5), r"mixup_prob must be in \[0, 1\], found 1.5"),
        (dict(mixup_switch_prob=-0.5), r"mixup_switch_prob must be in \[0, 1\], found -0.5"),
        (dict(mixup=1.0, batch_size=7), "batch_size must be even with mixup or cutmix, found 7"),
        (dict(cutmix=1.0, batch_size=7), "batch_size must be even with mixup or cutmix, found 7"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    TrainConfig(batch_size=7)  # odd is fine where nothing is mixed
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)
