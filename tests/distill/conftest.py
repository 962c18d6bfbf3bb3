"""What a run sets for the whole process is put back after each test."""

import logging

import pytest
import torch
from toy_runs import forget_accelerate

from models import compile_kernels


@pytest.fixture(autouse=True)
def _leave_the_process_as_it_was():
    root = logging.getLogger()
    handlers, level, threads = root.handlers[:], root.level, torch.get_num_threads()
    deterministic = torch.backends.cudnn.deterministic
    yield
    forget_accelerate()
    compile_kernels(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = deterministic
