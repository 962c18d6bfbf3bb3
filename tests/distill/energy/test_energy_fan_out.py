"""How many synapses a spike reaches, by hand and against a convolution with ones."""

import pytest
import torch
import torch.nn.functional as F

from distill.energy.fan_out import axis_fan_out, fan_out, padding_before


def test_a_place_counts_the_outputs_that_see_it():
    # three places, kernel 3, stride 2, a zero in front: output 0 sees -1, 0, 1, output 1 sees 1, 2, 3
    assert axis_fan_out(3, 2, 3, 2, 1, 1).tolist() == [1, 2, 1]
    # stride 3 and kernel 2 skip a place
    assert axis_fan_out(5, 2, 2, 3, 0, 1).tolist() == [1, 1, 0, 1, 1]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("padding", [0, 1, 2, (0, 2), "same", "valid"])
@pytest.mark.parametrize(("kernel", "dilation"), [((3, 3), (1, 1)), ((4, 2), (2, 1)), ((1, 5), (1, 3))])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (3, 2)])
def test_it_is_the_gradient_of_a_convolution_with_ones(padding, kernel, dilation, stride):
    if padding == "same" and stride != (1, 1):
        return  # PyTorch refuses it
    x = torch.zeros(1, 1, 13, 17, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x, torch.ones(1, 1, *kernel, dtype=torch.float64), None, stride, padding, dilation)
    (expected,) = torch.autograd.grad(y.sum(), x)
    before = padding_before(padding, kernel, dilation)
    assert fan_out((13, 17), y.shape[2:], kernel, stride, before, dilation).equal(expected[0, 0])
