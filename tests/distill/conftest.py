"""What a run sets for the whole process is put back after each test."""

import logging

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from toy_runs import forget_accelerate

from distill import results
from distill.spike_examples import spike_examples
from models import compile_kernels

LEAVE_REPORT = results.leave_report


@pytest.fixture(autouse=True, scope="session")
def _runs_draw_nothing():
    """To draw a report takes two seconds: runs record the spikes alone, and what is wrong with that shows."""

    def record(accelerator, folder, *of_network):
        spike_examples(accelerator, *of_network)

    results.leave_report = record
    yield
    results.leave_report = LEAVE_REPORT


@pytest.fixture
def reports(monkeypatch):
    """Runs of this test leave a report, as those of users do."""
    monkeypatch.setattr(results, "leave_report", LEAVE_REPORT)


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


@pytest.fixture
def learning_rates():
    """Of each optimizer step that is taken."""
    rates = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, args, kwargs: rates.append(optimizer.param_groups[0]["lr"])
    )
    yield rates
    handle.remove()
