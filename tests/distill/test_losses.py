"""Two classes and temperature 2, where every softmax is a simple fraction.

Logits (2 ln 3, 0) are softened to (3/4, 1/4), and are (9/10, 1/10) as they stand; (0, 0) is (1/2, 1/2) either way.
"""

from math import log, sqrt

import numpy as np
import pytest
import torch

from distill import HybridOutput, LossConfig, distillation_losses, kd_loss
from distill.losses import check_tap_weights, cross_entropy, feature_loss

SURE, UNSURE = [2 * log(3), 0.0], [0.0, 0.0]
KD = 4 * (0.75 * log(1.5) + 0.25 * log(0.5))  # tau^2 sum p ln(p / q) = 0.5232
LABELS = torch.tensor([0])


def logits(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def output(student=UNSURE, features=None, **hybrids):
    hybrid_logits = {name: logits(row) for name, row in hybrids.items()}
    feature_losses = {name: scalar(value) for name, value in (features or {}).items()}
    return HybridOutput(None if student is None else logits(student), logits(SURE), hybrid_logits, feature_losses)


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


# (9/10, 1/10) is what the student says where it is SURE: a label smoothed by 1/2 is (3/4, 1/4)
SMOOTHED = -(0.75 * log(0.9) + 0.25 * log(0.1))


def test_label_smoothing_is_that_of_every_cross_entropy_and_of_no_divergence():
    config = LossConfig(label_smoothing=0.5)
    parts = distillation_losses(output(student=SURE, layer1=SURE, layer2=UNSURE), LABELS, config)
    expected = {"student_ce": SMOOTHED, "hybrid_ce/layer1": SMOOTHED, "hybrid_ce/layer2": log(2)}
    expected |= {"student_kd": 0.0, "hybrid_kd/layer1": 0.0, "hybrid_kd/layer2": KD}
    expected["total"] = SMOOTHED + (SMOOTHED + log(2) + KD) / 2
    assert {name: value.item() for name, value in parts.items()} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_labels_that_are_probabilities_are_taken_as_they_are(smoothing):
    mixed = torch.tensor([[0.625, 0.375]])  # float32, as the mixer makes them
    parts = distillation_losses(output(student=SURE, layer1=SURE), mixed, LossConfig(label_smoothing=smoothing))
    expected = -(0.625 * log(0.9) + 0.375 * log(0.1))
    assert parts["student_ce"].item() == pytest.approx(expected, abs=1e-12)
    assert parts["hybrid_ce/layer1"].item() == pytest.approx(expected, abs=1e-12)


def test_the_cross_entropy_of_many_images_against_numpy():
    generator = np.random.default_rng(0)
    scores, labels = generator.normal(size=(5, 4)), generator.integers(4, size=5)
    targets = 0.8 * np.eye(4)[labels] + 0.2 / 4
    log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    expected = -(targets * log_p).sum(1).mean()
    for given, smoothing in ((torch.tensor(labels), 0.2), (torch.tensor(targets), 0.0), (torch.tensor(targets), 0.2)):
        assert cross_entropy(torch.tensor(scores), given, smoothing).item() == pytest.approx(expected, abs=1e-12)


def test_without_a_student_there_are_the_hybrids_alone():
    parts = distillation_losses(output(student=None, layer1=UNSURE), LABELS, LossConfig(hybrid_kd=3.0))
    assert parts.keys() == {"total", "hybrid_ce/layer1", "hybrid_kd/layer1"}
    assert parts["total"].item() == pytest.approx(log(2) + 3 * KD, abs=1e-12)


def test_of_nothing_the_loss_is_nothing():
    parts = distillation_losses(output(student=None), LABELS, LossConfig())
    assert parts.keys() == {"total"} and parts["total"].item() == 0
    parts["total"].backward()


def test_with_all_weights_zero_every_gradient_is_zero():
    student = logits(UNSURE).requires_grad_()
    zeros = LossConfig(student_ce=0.0, student_kd=0.0, hybrid_ce=0.0, hybrid_kd=0.0)
    parts = distillation_losses(HybridOutput(student, logits(SURE), {"layer1": 2 * student}), LABELS, zeros)
    parts["total"].backward()
    assert parts["total"].item() == 0 and student.grad.tolist() == [[0, 0]]
    assert parts["student_ce"].item() == pytest.approx(log(2), abs=1e-12)


def test_a_taps_weight_is_that_of_its_term_in_a_mean_over_the_active_taps():
    config = LossConfig(
        student_ce=0.0, student_kd=0.0, hybrid_ce=2.0, hybrid_kd=3.0, hybrid_feature=5.0, feature="mse",
        tap_weights={"a": 0.25, "c": 4.0, "asleep": 9.0},
    )  # fmt: skip
    found = output(features=dict(a=0.5, b=7.0, c=0.125), a=SURE, b=UNSURE, c=UNSURE)
    parts = distillation_losses(found, LABELS, config)
    assert [parts[f"hybrid_feature/{tap}"].item() for tap in "abc"] == [0.5, 7.0, 0.125]  # unweighted
    assert parts["hybrid_ce/c"].item() == pytest.approx(log(2), abs=1e-12)
    ce = (0.25 * -log(0.9) + 1 * log(2) + 4 * log(2)) / 3
    kd = (0.25 * 0 + 1 * KD + 4 * KD) / 3
    feature = (0.25 * 0.5 + 1 * 7.0 + 4 * 0.125) / 3
    assert parts["total"].item() == pytest.approx(2 * ce + 3 * kd + 5 * feature, abs=1e-12)
    one = distillation_losses(output(features=dict(c=0.125), c=UNSURE), LABELS, config)  # one active tap
    assert one["total"].item() == pytest.approx(4 * (2 * log(2) + 3 * KD + 5 * 0.125), abs=1e-12)


def test_a_tap_of_weight_zero_counts_in_the_mean():
    parts = distillation_losses(output(a=UNSURE, b=UNSURE), LABELS, LossConfig(student_ce=0.0, student_kd=0.0))
    without = LossConfig(student_ce=0.0, student_kd=0.0, tap_weights={"b": 0.0})
    half = distillation_losses(output(a=UNSURE, b=UNSURE), LABELS, without)
    assert half["total"].item() == pytest.approx(parts["total"].item() / 2, abs=1e-12)


def test_weights_of_taps_that_are_not_there_are_refused():
    check_tap_weights(LossConfig(tap_weights={"layer1": 2.0}), ["layer1", "layer2"])
    check_tap_weights(LossConfig(), [])
    with pytest.raises(ValueError, match=r"'layer9' is no tap \(close to it: 'layer\d'\); .* \['layer1', 'layer2'\]"):
        check_tap_weights(LossConfig(tap_weights={"layer2": 1.0, "layer9": 2.0}), ["layer1", "layer2"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(label_smoothing=1.0), r"label_smoothing must be in \[0, 1\), found 1.0"),
        (dict(label_smoothing=-0.5), r"label_smoothing must be in \[0, 1\), found -0.5"),
        (dict(tap_weights={"layer1": 1.0, "layer2": -1.0}), "tap_weights.layer2 must be at least 0, found -1.0"),
        (dict(hybrid_feature=-1.0), "hybrid_feature must be at least 0, found -1.0"),
        (dict(feature="l2"), "feature must be none, mse or cosine, found 'l2'"),
    ],
)
def test_a_loss_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**values)


def test_the_mean_square_of_two_features():
    adapted, teacher = torch.zeros(1, 2, 1, 2), torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 2, 1, 2)
    assert feature_loss("mse", adapted, teacher).item() == (1 + 4 + 9 + 16) / 4


def test_the_cosine_of_two_features_is_over_channels_at_each_place():
    # two images of one and the same 1x2 map, channels (3, 4) and (1, 0); the teacher's are (4, 3) and (-2, 0)
    adapted = torch.tensor([[3.0, 1.0], [4.0, 0.0]], dtype=torch.float64).reshape(1, 2, 1, 2)
    teacher = torch.tensor([[4.0, -2.0], [3.0, 0.0]], dtype=torch.float64).reshape(1, 2, 1, 2)
    expected = ((1 - 24 / 25) + (1 - -1)) / 2
    assert feature_loss("cosine", adapted, teacher).item() == pytest.approx(expected, abs=1e-12)
    scaled = feature_loss("cosine", 7 * adapted, 0.01 * teacher)  # lengths do not count
    assert scaled.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_the_feature_loss_of_random_maps_against_numpy(kind):
    generator = np.random.default_rng(0)
    f, a = generator.normal(size=(2, 3, 5, 4, 2))
    lengths = np.sqrt((f**2).sum(1) * (a**2).sum(1))
    expected = ((f - a) ** 2).mean() if kind == "mse" else (1 - (f * a).sum(1) / lengths).mean()
    assert feature_loss(kind, torch.tensor(f), torch.tensor(a)).item() == pytest.approx(expected, abs=1e-12)


def test_the_cosine_pulls_a_feature_across_its_own_direction():
    adapted = torch.tensor([1.0, 0.0], dtype=torch.float64).reshape(1, 2, 1, 1).requires_grad_()
    feature_loss("cosine", adapted, torch.ones_like(adapted)).backward()
    assert adapted.grad.flatten().tolist() == pytest.approx([0.0, -1 / sqrt(2)], abs=1e-12)


def test_a_silent_place_costs_a_whole_cosine_and_has_a_bounded_gradient():
    adapted = torch.zeros(1, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    loss = feature_loss("cosine", adapted, torch.ones_like(adapted))
    loss.backward()
    assert loss.item() == 1 and adapted.grad.abs().max() <= 1e4


def test_features_in_half_precision_are_compared_in_float32():
    adapted, teacher = torch.randn(2, 3, 4, 4).bfloat16(), torch.randn(2, 3, 4, 4).bfloat16()
    for kind in ("mse", "cosine"):
        found = feature_loss(kind, adapted, teacher)
        assert found.dtype == torch.float32 and found.item() == feature_loss(kind, adapted.float(), teacher.float())


def test_features_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"of one shape, found \(1, 2, 4, 4\) and \(1, 2, 2, 2\)"):
        feature_loss("mse", torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2))
    with pytest.raises(ValueError, match="feature must be 'mse' or 'cosine', found 'none'"):
        feature_loss("none", torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))
