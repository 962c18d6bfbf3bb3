"""The folder of a new run: of several processes one gets it, and what another run has left stays as it is."""

import errno
import logging
from pathlib import Path

import pytest
import yaml
from toy_folders import RESOLVED, changed, held, opened, resume

from distill import RunConfig, runs
from distill.opening import open_run
from distill.runs import CONFIG


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("config", [RunConfig(name="mine"), RunConfig(dir="mine")])
def test_a_taken_folder_is_left_alone_for_the_next_free_suffix(config, caplog):
    caplog.set_level(logging.INFO)
    first = open_run(config, False, RESOLVED).path
    (first / "metrics.jsonl").write_text("kept\n")
    second = open_run(config, False, changed(train__lr=0.2))
    third = open_run(config, False, changed(train__lr=0.3))
    assert [second.path.name, third.path.name] == ["mine-2", "mine-3"]  # also while nothing is in them
    assert (first / "metrics.jsonl").read_text() == "kept\n"
    assert yaml.safe_load((first / CONFIG).read_text()) == RESOLVED
    assert "holds a run already: this one is kept in" in caplog.text


def test_a_gap_between_suffixes_is_filled():
    for folder in ("mine", "mine-3"):
        opened(folder)
    assert open_run(RunConfig(dir="mine"), False, RESOLVED).path.name == "mine-2"


def test_a_folder_without_a_run_is_used(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("hello")
    assert open_run(RunConfig(dir="mine"), False, RESOLVED).path.name == "mine"
    assert (tmp_path / "mine" / "notes.txt").read_text() == "hello"


def test_names_that_only_look_alike_are_other_runs():
    open_run(RunConfig(dir="mine-new"), False, RESOLVED)
    open_run(RunConfig(dir="mine-2x"), False, RESOLVED)
    assert open_run(RunConfig(dir="mine"), False, RESOLVED).path.name == "mine"


def test_two_processes_never_write_to_one_run():
    opened()
    with held("resume") as name:
        assert name == "mine"
        with pytest.raises(ValueError, match="another process is writing to the run in mine: end it"):
            resume()
    assert resume() == Path("mine")


def test_a_new_run_takes_the_place_of_one_that_ended_before_it_had_saved_anything(caplog):
    caplog.set_level(logging.INFO)
    other = changed(train__lr=0.2)
    with held("anew") as name:  # it has just made its folder, and lives
        assert name == "mine"
        second = open_run(RunConfig(dir="mine"), False, other)
        assert second.path == Path("mine-2")
    Path("mine", "tracking").mkdir()
    Path("mine", "tracking", "wandb_id").write_text("of the run that is gone")
    first = open_run(RunConfig(dir="mine"), False, other)
    assert first.path == Path("mine") and "ended before it had saved anything" in caplog.text
    assert yaml.safe_load(Path("mine", CONFIG).read_text()) == other and not Path("mine", "tracking").exists()
    with held("anew") as name:  # and it keeps the others out
        assert name == "mine-3"


@pytest.mark.parametrize("left", ["metrics.jsonl", "notes.txt", "bad_steps", "checkpoints", "config.1.yaml"])
def test_a_run_that_has_left_anything_keeps_its_folder(left):
    path = opened(saved=False)
    (path / left).mkdir()
    assert open_run(RunConfig(dir="mine"), False, RESOLVED).path.name == "mine-2"


@pytest.mark.parametrize("machine", ["another", "", None])
def test_a_run_of_another_machine_keeps_its_folder_as_its_lock_may_not_be_seen_here(machine):
    """So does one of which it is not known, and a folder with a config.yaml that no run has made."""
    lock = opened(saved=False) / ".lock"
    lock.unlink() if machine is None else lock.write_text(machine)
    assert open_run(RunConfig(dir="mine"), False, RESOLVED).path.name == "mine-2"
    assert lock.exists() == (machine is not None)


def test_a_folder_that_this_process_has_open_is_not_taken_over_and_stays_locked():
    path = Path("mine")
    first = open_run(RunConfig(dir="mine"), False, RESOLVED)
    assert open_run(RunConfig(dir="mine"), False, RESOLVED).path.name == "mine-2"
    assert first.locked and first.path == path
    with held("anew") as name:
        assert name not in ("mine", "mine-1")


def test_where_nothing_can_be_locked_no_folder_is_taken_over(monkeypatch, caplog):
    opened(saved=False)
    monkeypatch.setattr(runs.fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    names = [open_run(RunConfig(dir="mine"), False, RESOLVED).path.name for _ in range(2)]
    assert names == ["mine-2", "mine-3"] and "mine-2 cannot be locked (no locks)" in caplog.text
