"""What the checks let pass, and what not."""

import pytest
import torch
from export_toys import images, job
from torch import nn

from distill.export.agreement import close, exact


class Two(nn.Module):
    """Logits (x, -x) of the first pixel."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, x):
        first = x[:, 0, 0, :1] * self.one
        return torch.cat([first, -first], 1)


@pytest.mark.parametrize(
    ("shift", "passed"), [(0.0, True), (5e-10, True), (2e-9, False), (-2e-9, False), (float("nan"), False)]
)
def test_in_float64_a_logit_may_be_off_by_1e_9(tmp_path, shift, passed):
    network = Two().double()
    samples = images(100) / 10  # all logits are below 1
    part = exact(job(network, samples, tmp_path, "onnx"), network, lambda x: network(x) + shift)
    assert part.passed is passed and part.figures["float64"]["bound"] == 1e-9 and "on 16 images" in part.line


def test_of_large_logits_the_share_counts(tmp_path):
    network = Two().double()
    part = exact(job(network, 1000 * images(100), tmp_path, "onnx"), network, lambda x: network(x) + 2e-9)
    largest = network(1000 * images(16).double()).abs().max().item()
    assert part.passed and part.figures["float64"]["bound"] == pytest.approx(1e-9 * largest)


def test_float32_is_no_check_in_float64(tmp_path):
    network = Two().double()
    assert not exact(job(network, images(100), tmp_path, "onnx"), network, lambda x: network(x).float()).passed


@pytest.mark.parametrize(("flipped", "passed"), [(0, True), (5, True), (6, False)])
def test_99_of_100_predictions_must_be_equal(tmp_path, flipped, passed):
    network, samples = Two(), torch.full((500, 1, 1, 1), 0.01)
    samples[::2] = 3.0  # these give the logits their deviation, the flipped ones hardly a difference
    wrong = torch.zeros(500, 1)
    wrong[1 : 2 * flipped : 2] = 1.0
    seen = 0

    def theirs(x):
        nonlocal seen
        part = wrong[seen : seen + len(x)]
        seen += len(x)
        return network(x) * (1 - 2 * part)

    part = close(job(network, samples, tmp_path, "onnx"), theirs, "onnxruntime")
    assert part.figures["onnxruntime"]["equal_predictions"] == pytest.approx(1 - flipped / 500)
    assert part.passed is passed


@pytest.mark.parametrize(("factor", "passed"), [(1.049, True), (1.051, False), (float("nan"), False)])
def test_logits_may_differ_by_a_twentieth_of_their_deviation(tmp_path, factor, passed):
    # x in {1, -1}: logits of deviation 1 (1.0025 of this sample), whose mean difference is |factor - 1|
    network, samples = Two(), torch.ones(100, 1, 1, 1)
    samples[::2] = -1
    part = close(job(network, samples, tmp_path, "onnx"), lambda x: network(x) * factor, "nir")
    assert part.passed is passed
