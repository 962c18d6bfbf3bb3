"""Every test starts from the same random numbers, with the fused passes as they are written."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: processes of several threads each only wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from models import compile_kernels


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    compile_kernels(False)
