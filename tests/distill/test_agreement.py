"""What processes tell each other; with several see test_fault_processes.py."""

import types

import pytest
import torch.distributed as dist

from distill.processes import Agreement


@pytest.fixture
def made(monkeypatch):
    """The groups that are made of those that exchange tensors on GPUs; of a single process, for the test."""
    made, new_group = [], dist.new_group
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "new_group", lambda **options: made.append(new_group(**options)) or made[-1])
    return made


def test_a_run_makes_one_group_for_all_that_its_processes_tell_each_other(made):
    accelerator = types.SimpleNamespace(num_processes=2)
    for run in (1, 2):  # in one process, as tests have them
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            for _ in range(3):
                assert Agreement(accelerator).any_of(True, False) == [True, False]
            assert len(made) == run
        finally:
            dist.destroy_process_group()
