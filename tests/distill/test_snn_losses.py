"""The losses on labels, with numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from distill import SnnLossConfig, snn_losses
from distill.snn_losses import scale_gradient

# two steps, one image, two classes; the label is class 0. CE of (0, 0) is ln 2, of (ln 3, 0) it is ln(4/3)
LOGITS = torch.tensor([[[0.0, 0.0]], [[math.log(3), 0.0]]], dtype=torch.float64)
LABEL = torch.tensor([0])
CE = (math.log(2) + math.log(4 / 3)) / 2
MSE = (1 + 1 + (math.log(3) - 1) ** 2 + 1) / 4  # to a target of 1


def test_cross_entropy_is_that_of_the_mean_logits():
    found = snn_losses(LOGITS.mean(0), LABEL, SnnLossConfig(), 2)
    assert found.keys() == {"total"}
    # mean logits (ln(3)/2, 0): softmax of class 0 is sqrt(3) / (1 + sqrt(3))
    assert found["total"].item() == pytest.approx(math.log((1 + 3**0.5) / 3**0.5), abs=1e-12)


def test_label_smoothing_mixes_in_the_other_classes():
    found = snn_losses(LOGITS[1], LABEL, SnnLossConfig(label_smoothing=0.5), 2)["total"]
    # targets 3/4 and 1/4, probabilities 3/4 and 1/4
    assert found.item() == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), abs=1e-12)


def test_tet_is_the_mean_of_each_steps_cross_entropy_and_a_share_of_the_regulariser():
    found = snn_losses(LOGITS, LABEL, SnnLossConfig(name="tet", tet_lambda=0.25), 2)
    assert found.keys() == {"total", "ce", "mse"}
    assert found["ce"].item() == pytest.approx(CE, abs=1e-12) and found["mse"].item() == pytest.approx(MSE, abs=1e-12)
    assert found["total"].item() == pytest.approx(0.75 * CE + 0.25 * MSE, abs=1e-12)
    other = snn_losses(LOGITS, LABEL, SnnLossConfig(name="tet", tet_target=0.0), 2)
    assert other["mse"].item() == pytest.approx(math.log(3) ** 2 / 4, abs=1e-12)
    assert SnnLossConfig().tet_lambda == 0.05 and SnnLossConfig().tet_target == 1.0  # the authors'


def test_tets_gradient():
    logits = LOGITS.clone().requires_grad_()
    snn_losses(logits, LABEL, SnnLossConfig(name="tet", tet_lambda=0.25), 2)["total"].backward()
    # of CE/T: (p - y) / 2; of MSE: 2 (o - 1) / 4
    ce = torch.tensor([[[-0.5, 0.5]], [[-0.25, 0.25]]], dtype=torch.float64) / 2
    expected = 0.75 * ce + 0.25 * (LOGITS - 1) / 2
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-12)


def test_tet_of_one_step_alone_is_its_own_share_of_the_mean():
    config = SnnLossConfig(name="tet")
    steps = [snn_losses(step[None], LABEL, config, 2)["total"].item() for step in LOGITS]
    assert sum(steps) / 2 == pytest.approx(snn_losses(LOGITS, LABEL, config, 2)["total"].item(), abs=1e-12)


@pytest.mark.parametrize(("name", "logits"), [("ce", LOGITS.mean(0)), ("tet", LOGITS)])
def test_the_gradients_scale_leaves_the_loss_as_it_is(name, logits):
    def value_and_gradient(scale):
        leaf = logits.clone().requires_grad_()
        loss = snn_losses(leaf, LABEL, SnnLossConfig(name=name, gradient_scale=scale), 5)["total"]
        loss.backward()
        return loss.item(), leaf.grad

    (value, gradient), (scaled_value, scaled_gradient) = value_and_gradient("none"), value_and_gradient("1/T")
    assert scaled_value == pytest.approx(value, abs=1e-12) and gradient.abs().max() > 0.1
    torch.testing.assert_close(scaled_gradient, gradient / 5, rtol=0, atol=1e-12)


def test_a_scaled_gradient_by_hand():
    x = torch.tensor(3.0, requires_grad=True)
    y = scale_gradient(x * x, 0.25)
    y.backward()
    assert (y.item(), x.grad.item()) == (9.0, 1.5)


def test_losses_of_half_precision_logits_are_computed_in_float32():
    logits = torch.randn(4, 3).bfloat16()
    labels = torch.tensor([0, 1, 2, 0])
    found = snn_losses(logits, labels, SnnLossConfig(), 2)["total"]
    assert found.dtype == torch.float32 and found.item() == F.cross_entropy(logits.float(), labels).item()


def test_tet_of_mean_logits_is_refused():
    with pytest.raises(ValueError, match=r"tet takes the logits of each step \(S, B, K\), found shape \(1, 2\)"):
        snn_losses(LOGITS.mean(0), LABEL, SnnLossConfig(name="tet"), 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_cross_entropy_with_probabilities_does_not_smooth_them(smoothing):
    mixed = torch.tensor([[0.625, 0.375]])
    found = snn_losses(LOGITS[1], mixed, SnnLossConfig(label_smoothing=smoothing), 2)["total"]
    assert found.item() == pytest.approx(-(0.625 * math.log(0.75) + 0.375 * math.log(0.25)), abs=1e-12)


def test_tet_with_probabilities_is_the_mean_of_each_steps_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)  # S, B, K all different
    targets = torch.rand(2, 4, generator=generator).softmax(1)
    expected = -(targets.double() * logits.log_softmax(2)).sum(2).mean()
    found = snn_losses(logits, targets, SnnLossConfig(name="tet", tet_lambda=0.25), 3)
    assert found["ce"].item() == pytest.approx(expected.item(), abs=1e-12)
    assert found["total"].item() == pytest.approx((0.75 * expected + 0.25 * found["mse"]).item(), abs=1e-12)
    hard = torch.tensor([3, 1])
    one_hot = F.one_hot(hard, 4).float()
    config = SnnLossConfig(name="tet")
    soft, index = (snn_losses(logits, labels, config, 3)["ce"].item() for labels in (one_hot, hard))
    assert soft == pytest.approx(index, abs=1e-12)
