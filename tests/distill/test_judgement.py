"""Figures of networks that always answer the same, by hand."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from distill.evaluation import TEACHER
from distill.judgement import calibration_error, judge

LABELS = [0, 1, 2, 2, 2, 0, 1]


@pytest.fixture
def prepared():
    accelerator = Accelerator(cpu=True)
    images = torch.arange(7.0).reshape(7, 1, 1, 1).expand(7, 2, 4, 4).contiguous()
    return accelerator, accelerator.prepare(DataLoader(TensorDataset(images, torch.tensor(LABELS)), 3))


def numbers(images):
    return images[:, 0, 0, 0].long()


def test_top1_and_top5_count_images(prepared):
    # logits that fall with the class: 0 is first, the labels 1 and 2 are in the first five of ten, too
    falling = -torch.arange(10.0)
    found = judge(*prepared, lambda images: {"falling": falling.expand(len(images), 10)})
    figures = found.figures["falling"]
    assert figures.top1 == pytest.approx(200 / 7) and figures.top5 == 100 and found.images == 7
    rising = judge(*prepared, lambda images: {"rising": -falling.expand(len(images), 10)}).figures["rising"]
    assert rising.top1 == rising.top5 == 0 and rising.agreement is None
    # the sixth: class 2 is sixth from the end of seven classes
    late = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    found = judge(*prepared, lambda images: {"late": late.expand(len(images), 7)}).figures["late"]
    assert found.top5 == pytest.approx(300 / 7)  # classes 2 to 6 are the first five: three labels are 2


def test_with_fewer_than_five_classes_the_label_is_always_among_them(prepared):
    found = judge(*prepared, lambda images: {"three": torch.eye(3)[numbers(images) % 3]}).figures["three"]
    assert found.top5 == 100


def test_agreement_is_with_the_teacher_who_has_none(prepared):
    teacher = torch.eye(3)[torch.tensor([0, 1, 2, 2, 1, 1, 0])]
    network = torch.eye(3)[torch.tensor([0, 1, 2, 0, 1, 0, 0])]
    found = judge(
        *prepared, lambda images: {TEACHER: teacher[numbers(images)], "network": network[numbers(images)]}
    ).figures
    assert found["network"].agreement == pytest.approx(500 / 7) and found[TEACHER].agreement is None


def test_the_calibration_error_is_a_weighted_gap_of_bins():
    # bin 10 (0.6, 0.667]: two images, one right: |0.5 - 0.62|; bin 14 (0.867, 0.933]: one, wrong: |0 - 0.9|
    confidence, right = torch.tensor([0.61, 0.63, 0.9]), torch.tensor([1.0, 0.0, 0.0])
    assert calibration_error(confidence, right) == pytest.approx((2 * 0.12 + 0.9) / 3)
    # a bound belongs to the bin below it: 0.6 = 9/15 is in bin 9, not with 0.61 in bin 10
    confidence, right = torch.tensor([0.6, 0.61], dtype=torch.float64), torch.tensor([1.0, 0.0])
    assert calibration_error(confidence, right) == pytest.approx((0.4 + 0.61) / 2)
    assert calibration_error(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0])) == 0
    assert calibration_error(torch.tensor([0.0]), torch.tensor([0.0])) == 0


def test_the_confidence_is_that_of_the_softmax(prepared):
    logits = torch.tensor([math.log(3.0), 0.0])  # 3/4 and 1/4
    found = judge(*prepared, lambda images: {"n": logits.expand(len(images), 2)}).figures["n"]
    assert found.confidence == pytest.approx(0.75) and found.ece == pytest.approx(0.75 - 2 / 7)
