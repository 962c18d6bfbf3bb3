"""Two classes and temperature 2, where every softmax is a simple fraction.

Logits (2 ln 3, 0) are softened to (3/4, 1/4), and are (9/10, 1/10) as they stand; (0, 0) is (1/2, 1/2) either way.
"""

from math import log

import pytest
import torch

from distill import HybridOutput, LossConfig, distillation_losses, kd_loss

SURE, UNSURE = [2 * log(3), 0.0], [0.0, 0.0]
KD = 4 * (0.75 * log(1.5) + 0.25 * log(0.5))  # tau^2 sum p ln(p / q) = 0.5232
LABELS = torch.tensor([0])


def logits(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def output(student=UNSURE, **hybrids):
    hybrid_logits = {name: logits(row) for name, row in hybrids.items()}
    return HybridOutput(logits(student), logits(SURE), hybrid_logits)


def test_the_kd_loss_of_two_classes():
    assert kd_loss(logits(SURE), logits(UNSURE), 2.0).item() == pytest.approx(KD, abs=1e-12)


def test_the_kd_loss_is_a_mean_over_images():
    teacher, student = logits(SURE, SURE), logits(UNSURE, SURE)  # the second image costs nothing
    assert kd_loss(teacher, student, 2.0).item() == pytest.approx(KD / 2, abs=1e-12)


def test_the_kd_loss_has_the_gradient_tau_times_the_difference_of_the_softened_probabilities():
    student = logits(UNSURE).requires_grad_()
    kd_loss(logits(SURE), student, 2.0).backward()
    assert student.grad.tolist() == [pytest.approx([2 * (0.5 - 0.75), 2 * (0.5 - 0.25)], abs=1e-12)]


def test_the_temperature_softens_both_sides():
    # at temperature 1 the teacher says (9/10, 1/10)
    expected = 0.9 * log(1.8) + 0.1 * log(0.2)
    assert kd_loss(logits(SURE), logits(UNSURE), 1.0).item() == pytest.approx(expected, abs=1e-12)


def test_the_parts_and_their_weighted_sum():
    weights = LossConfig(student_ce=2.0, student_kd=3.0, hybrid_ce=5.0, hybrid_kd=7.0, temperature=2.0)
    parts = distillation_losses(output(layer1=SURE, layer2=UNSURE), LABELS, weights)
    expected = {
        "student_ce": log(2),
        "student_kd": KD,
        "hybrid_ce/layer1": -log(0.9),
        "hybrid_kd/layer1": 0.0,
        "hybrid_ce/layer2": log(2),
        "hybrid_kd/layer2": KD,
    }
    expected["total"] = 2 * log(2) + 3 * KD + 5 * (log(2) - log(0.9)) / 2 + 7 * KD / 2
    assert {name: value.item() for name, value in parts.items()} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["student_ce", "student_kd", "hybrid_ce", "hybrid_kd"])
def test_each_weight_multiplies_its_own_part(name):
    silent = dict(student_ce=0.0, student_kd=0.0, hybrid_ce=0.0, hybrid_kd=0.0)
    parts = distillation_losses(output(layer1=UNSURE), LABELS, LossConfig(**{**silent, name: 3.0}))
    expected = {"student_ce": log(2), "student_kd": KD, "hybrid_ce": log(2), "hybrid_kd": KD}
    assert parts["total"].item() == pytest.approx(3 * expected[name], abs=1e-12)


def test_the_mean_over_taps_does_not_grow_with_their_number():
    one = distillation_losses(output(a=UNSURE), LABELS, LossConfig())
    three = distillation_losses(output(a=UNSURE, b=UNSURE, c=UNSURE), LABELS, LossConfig())
    assert one["total"].item() == pytest.approx(three["total"].item(), abs=1e-12)


def test_without_taps_it_is_plain_logit_distillation():
    parts = distillation_losses(output(), LABELS, LossConfig())
    assert parts["total"].item() == pytest.approx(log(2) + KD, abs=1e-12)
    assert parts.keys() == {"total", "student_ce", "student_kd"}
