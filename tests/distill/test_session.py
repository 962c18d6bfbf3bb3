"""What is set up before a run."""

import random
from datetime import timedelta

import numpy as np
import pytest
import torch
import yaml
from toy_runs import resolved, start, tiny

from distill import session as sessions


def test_a_session_opens_the_folder_with_the_resolved_configuration(tmp_path):
    config = tiny(tmp_path / "r")
    session = start(config)
    assert not (tmp_path / "r").exists()  # until somebody asks for it: mistakes leave nothing behind
    assert session.folder.path == tmp_path / "r" and session.config_text == resolved(config)
    assert session.folder is session.folder
    assert yaml.safe_load((tmp_path / "r" / "config.yaml").read_text()) == yaml.safe_load(resolved(config))


def test_an_unknown_tracker_is_refused_with_the_known_ones_before_a_folder_is_made(tmp_path):
    with pytest.raises(ValueError, match=r"run.trackers: 'tensorbored' is none of .*'tensorboard', 'wandb'"):
        start(tiny(tmp_path / "r", run=dict(trackers=["tensorbored"])))
    assert not (tmp_path / "r").exists()


def test_the_seed_fixes_every_generator(tmp_path):
    def numbers(seed):
        start(tiny(tmp_path / "r", run=dict(seed=seed)))
        return random.random(), np.random.rand(), torch.rand(()).item()

    first, other, again = numbers(3), numbers(4), numbers(3)
    assert first == again and all(a != b for a, b in zip(first, other, strict=True))


def test_threads_are_those_that_were_asked_for(tmp_path):
    torch.set_num_threads(2)
    start(tiny(tmp_path / "r", run=dict(threads=1)))
    assert torch.get_num_threads() == 1


def test_threads_default_to_all_cores_shared_by_the_processes_of_the_machine(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    start(tiny(tmp_path / "a", run=dict(threads=None)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    start(tiny(tmp_path / "b", run=dict(threads=None)))
    assert chosen == [8, 2]


def test_the_scheduler_is_not_stepped_behind_the_loops_back(tmp_path):
    assert start(tiny(tmp_path / "r")).accelerator.step_scheduler_with_optimizer is False


def test_mixed_precision_is_that_of_the_configuration(tmp_path):
    assert start(tiny(tmp_path / "a", run=dict(mixed_precision="bf16"))).accelerator.mixed_precision == "bf16"
    assert start(tiny(tmp_path / "b")).accelerator.mixed_precision == "no"


def test_processes_wait_for_one_that_downloads_or_prepares_data(tmp_path):
    assert start(tiny(tmp_path / "r")).accelerator.init_handler.timeout >= timedelta(hours=1)


def test_what_a_session_looks_up_of_begun_stages_is_of_the_run_that_it_opens(tmp_path, monkeypatch):
    asked = []
    look = lambda config, *rest: asked.append((config.dir, *rest)) or {"student"}  # noqa: E731
    monkeypatch.setattr(sessions, "stages_begun", look)
    assert start(tiny(tmp_path / "r")).stages_begun() == set() and not asked  # a new run
    resumed = start(tiny(tmp_path / "r"), resume=True)
    assert resumed.stages_begun() == {"student"} and not (tmp_path / "r").exists()
    [(folder, resolved, allowed)] = asked
    assert folder == str(tmp_path / "r") and resolved["run"]["mixed_precision"] == "no" and allowed == ()


def test_a_refused_resume_is_refused_by_the_session(tmp_path):
    folder = start(tiny(tmp_path / "r")).folder
    (folder.path / "teacher").mkdir()  # something was saved
    with pytest.raises(ValueError, match=r"train\.lr \(was 0\.05, is 0\.5\)"):
        assert start(tiny(tmp_path / "r", train=dict(lr=0.5)), resume=True).folder


def test_resuming_under_another_precision_is_refused_also_where_the_launcher_chose_it(tmp_path, monkeypatch):
    folder = start(tiny(tmp_path / "r")).folder
    (folder.path / "teacher").mkdir()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match=r"run\.mixed_precision \(was 'no', is 'bf16'\)"):
        assert start(tiny(tmp_path / "r"), resume=True).folder


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sessions, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match=r"run\.trackers: the package of 'wandb' is not installed"):
        start(tiny(tmp_path / "r", run=dict(trackers=["wandb"])))


def test_kernels_are_compiled_where_the_configuration_says_so(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(sessions, "compile_kernels", chosen.append)
    start(tiny(tmp_path / "a"))
    start(tiny(tmp_path / "b", run=dict(compile=True)))
    assert chosen == [False, True]
