"""Mean and variance of each channel over all steps."""

import pytest
import torch

from models import moments


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_moments_are_at_least_float32_and_over_all_steps(dtype, steps, channels_last):
    folded = (torch.randn(steps * 4, 5, 6, 7, dtype=torch.float64) + 3).to(dtype)
    if channels_last:
        folded = folded.to(memory_format=torch.channels_last)
    exact = folded.double()
    mean, var = moments.moments(folded, steps)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert mean.dtype == var.dtype == wanted
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=tolerance, atol=0)
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3), correction=0), rtol=tolerance, atol=0)
