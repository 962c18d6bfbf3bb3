"""Every test starts from the same random numbers, with the fused passes as they are written."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: processes of several threads each only wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from models import compile_kernels


def pytest_collection_modifyitems(items):
    """Files whose tests start processes of their own come first: one that is begun last leaves the other cores idle."""
    longest = ("test_scripts.py", "test_processes.py", "test_killed_runs.py")
    items.sort(key=lambda item: item.path.name not in longest)


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    compile_kernels(False)
