"""Trackers are told of a run, and end none."""

import sys
from types import SimpleNamespace

import pytest
from accelerate.utils import LoggerType
from toy_runs import start, tiny


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package: `calls` of wandb.init, and of each run what was logged."""
    module = SimpleNamespace(calls=[], logged=[], finished=[], error=None)

    def note(place):
        def noted(*args, **kwargs):
            if module.error is not None:
                raise module.error
            place.append(kwargs or args)

        return noted

    def init(**options):
        note(module.calls)(**options)
        return SimpleNamespace(log=lambda values, step: note(module.logged)(step, values), finish=note(module.finished))

    module.init = init
    module.config = SimpleNamespace(update=lambda values, allow_val_change: None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD, LoggerType.WANDB])
    return module


def opened(folder, *trackers, resume=False):
    session = start(tiny(folder, run=dict(trackers=list(trackers))), resume)
    assert session.folder.path == folder
    return session.accelerator


def test_a_resumed_run_goes_on_in_its_run_of_wandb(tmp_path, wandb, monkeypatch):
    opened(tmp_path / "mine", "wandb")
    (tmp_path / "mine" / "teacher").mkdir()  # something was saved
    opened(tmp_path / "mine", "wandb", resume=True)
    monkeypatch.setenv("WANDB_PROJECT", "elsewhere")
    opened(tmp_path / "other" / "mine", "wandb")
    first, again, other = wandb.calls
    assert first["project"] == "spikeswap" and first["name"] == "mine" and first["resume"] == "allow"
    assert first["dir"] == str(tmp_path / "mine" / "tracking")
    assert again == first and len(first["id"]) == 32
    assert other["project"] == "elsewhere" and other["id"] != first["id"]


def test_a_tracker_that_cannot_start_is_one_warning_and_the_others_are_told(tmp_path, wandb, capsys):
    wandb.error = ConnectionError("no route\nto host")
    accelerator = opened(tmp_path / "r", "wandb", "tensorboard")
    accelerator.log({"loss": 1.0}, step=1)
    accelerator.end_training()
    said = "warning: the tracker wandb has failed (ConnectionError: no route to host): the run goes on without it\n"
    assert capsys.readouterr().err == said
    assert list((tmp_path / "r" / "tracking").glob("events.out.tfevents.*"))


def test_a_tracker_that_fails_later_is_one_warning_and_the_others_are_told(tmp_path, wandb, capsys):
    accelerator = opened(tmp_path / "r", "tensorboard", "wandb")
    accelerator.log({"loss": 1.0}, step=1)
    wandb.error = RuntimeError("the service is gone")
    for step in (2, 3):
        accelerator.log({"loss": 0.5}, step=step)
    accelerator.end_training()
    assert wandb.logged == [(1, {"loss": 1.0})]
    assert capsys.readouterr().err.count("the tracker wandb has failed (RuntimeError: the service is gone)") == 1
    (board,) = (tracker for tracker in accelerator.trackers if tracker.name == "tensorboard")
    assert board.tracker is not None


def test_the_end_of_a_run_ends_its_trackers(tmp_path, wandb, capsys):
    accelerator = opened(tmp_path / "r", "wandb")
    accelerator.end_training()
    assert len(wandb.finished) == 1
    wandb.error = OSError("no space left")
    accelerator.end_training()
    assert "the tracker wandb has failed (OSError: no space left)" in capsys.readouterr().err


def test_a_run_that_names_its_folder_itself_has_its_trackers_files_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = start(tiny(tmp_path, run=dict(dir=None, trackers=["tensorboard"])))
    path = session.folder.path
    session.accelerator.end_training()
    assert path.resolve().parent == tmp_path / "runs" and list((path / "tracking").glob("events.out.tfevents.*"))
    assert [child.name for child in (tmp_path / "runs").iterdir()] == [path.name]
