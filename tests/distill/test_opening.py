"""The folder of a run is found again: --resume means one of those of a name."""

import hashlib
import json
import logging
import os
from pathlib import Path

import pytest
import yaml
from toy_folders import RESOLVED, changed, opened, resume

from distill import RunConfig
from distill.opening import open_run, stages_begun
from distill.runs import CONFIG


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_run_is_kept_under_its_name_or_where_run_dir_says(tmp_path):
    assert open_run(RunConfig(name="mine"), False, RESOLVED).path == Path("runs/mine")
    assert open_run(RunConfig(name="mine", dir="elsewhere/deep"), False, RESOLVED).path == Path("elsewhere/deep")
    assert yaml.safe_load((tmp_path / "runs" / "mine" / CONFIG).read_text()) == RESOLVED
    assert yaml.safe_load((tmp_path / "elsewhere" / "deep" / CONFIG).read_text()) == RESOLVED


def test_resuming_finds_the_run(caplog):
    caplog.set_level(logging.INFO)
    first = opened()
    assert resume() == first and f"resuming the run in {first}" in caplog.text and not Path("mine-2").exists()


def test_resuming_finds_the_unfinished_run_of_that_very_name():
    opened()
    opened(done=True)
    assert resume().name == "mine" and resume("mine-2").name == "mine-2"


def test_resuming_finds_the_unfinished_run_that_saved_last_and_names_the_others(caplog):
    for age in (3, 1, 2):
        opened(age=age)
    assert resume().name == "mine-2"
    assert "The one in mine-2 is taken, the newest of this configuration" in caplog.text
    assert "give its folder to --run.dir: mine (under another name), mine-3" in caplog.text
    caplog.clear()
    assert resume("mine-3").name == "mine-3" and "more than one" not in caplog.text
    Path("mine").rename("other")
    assert resume("other").name == "other" and "more than one" not in caplog.text


def test_resuming_drops_a_run_that_has_saved_nothing_for_one_that_has(caplog):
    opened(saved=False, age=1)
    day = opened("mine-2", age=2)  # where the fixed command went
    assert resume() == day and "more than one" not in caplog.text
    (day / "summary.json").write_text("{}")
    assert resume() == Path("mine")  # a finished run is no reason to


@pytest.mark.parametrize("saved", [True, False])
def test_resuming_finds_the_run_of_this_configuration_before_newer_ones_of_another(saved, caplog):
    """Also one that was stopped before it saved anything: with the other's configuration it would be refused."""
    opened(config=changed(train__lr=0.2), age=1)
    opened("mine-2", saved=saved, age=9)
    opened("mine-3", config=changed(train__lr=0.3), age=2)
    assert resume().name == "mine-2" and "mine (under another name), mine-3" in caplog.text
    assert resume(config=changed(train__lr=0.2)).name == "mine"
    with pytest.raises(ValueError, match=r"the run in mine cannot be resumed .* train\.lr \(was 0\.2, is 0\.4\)"):
        resume(config=changed(train__lr=0.4))
    assert open_run(RunConfig(dir="mine"), True, changed(train__lr=0.4), ["train.lr"]).path.name == "mine"


def test_a_run_that_holds_a_teacher_has_saved_something():
    opened(saved=False)
    (opened("mine-2", saved=False) / "teacher").mkdir()
    assert resume().name == "mine-2"


def test_a_sibling_whose_configuration_cannot_be_read_is_no_obstacle():
    opened()
    (opened() / CONFIG).write_text("a: [")
    assert resume().name == "mine"


def test_resuming_finds_the_newest_unfinished_sibling_of_a_finished_run():
    opened(done=True)
    for number in range(2, 12):
        path = opened(age=20 - number)
    assert resume().name == "mine-11"  # and not -9
    (path / "summary.json").write_text("{}")
    assert resume().name == "mine-10"


def test_resuming_where_all_are_finished_finds_the_newest():
    for age in (3, 1, 2):
        opened(done=True, age=age)
    assert resume().name == "mine-2"


def test_resuming_where_there_is_no_run_starts_with_a_note(caplog):
    caplog.set_level(logging.INFO)
    path = resume()
    assert path.name == "mine" and (path / CONFIG).exists()
    assert "nothing to resume in mine: the run starts from the beginning" in caplog.text


def test_resuming_where_nothing_was_saved_yet_starts_with_a_note_and_the_new_configuration(caplog):
    caplog.set_level(logging.INFO)
    first, other = opened(saved=False), changed(train__lr=0.2)
    assert resume(config=other) == first and "nothing was saved yet in mine" in caplog.text
    assert yaml.safe_load((first / CONFIG).read_text()) == other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(train__lr=0.2), r"train\.lr \(was 0\.1, is 0\.2\)"),
        (dict(run__seed=1), r"run\.seed \(was 0, is 1\)"),
        (dict(taps=["layer1"]), r"taps \(was None, is \['layer1'\]\)"),
        (dict(train__new=1), r"train\.new \(was None, is 1\)"),
        (dict(train__lr=0.2, train__epochs=4), r"train\.epochs \(was 3, is 4\), train\.lr"),
    ],
)
def test_resuming_with_another_configuration_is_refused_by_field(change, message):
    opened()
    with pytest.raises(ValueError, match=message):
        resume(config=changed(**change))
    assert yaml.safe_load(Path("mine", CONFIG).read_text()) == RESOLVED and not Path("mine-2").exists()


def test_what_changes_no_number_may_differ_when_a_run_is_resumed():
    opened()
    other = changed(run__threads=2, run__trackers=["wandb"], run__name="x", run__dir="mine", data__workers=3)
    assert resume(config=other).name == "mine"


@pytest.mark.parametrize(
    ("before", "now"), [("error", "error"), ("skip", "skip"), ("error", "skip"), ("skip", "error")]
)
def test_where_images_lie_may_differ_only_where_none_is_skipped(before, now):
    path = opened()
    (path / CONFIG).write_text(yaml.safe_dump(changed(data__in_memory=True, data__on_corrupt=before)))
    other = changed(data__in_memory=False, data__on_corrupt=now)
    if before == now == "error":
        assert resume(config=other).name == "mine"
        return
    with pytest.raises(ValueError, match=r"data\.in_memory \(was True, is False\)"):
        resume(config=other)
    allowed = ["data.in_memory", "data.on_corrupt"]
    assert open_run(RunConfig(dir="mine"), True, other, allowed).path.name == "mine"


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("text", "holds no configuration")])
def test_a_configuration_that_cannot_be_read_is_named(text, message):
    (opened() / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=f"mine/config.yaml {message}"):
        resume()


def test_a_path_that_is_a_file_is_a_users_mistake(tmp_path):
    from distill.cli import USER_ERRORS

    (tmp_path / "mine").write_text("a file")
    with pytest.raises(USER_ERRORS, match="mine"):
        open_run(RunConfig(dir="mine"), False, RESOLVED)


def test_a_field_that_is_allowed_may_change_and_the_old_configuration_is_kept(tmp_path, caplog):
    opened()
    other = changed(train__lr=0.2)
    path = open_run(RunConfig(dir="mine"), True, other, ["train.lr"]).path
    assert yaml.safe_load((path / CONFIG).read_text()) == other
    assert yaml.safe_load((path / "config.1.yaml").read_text()) == RESOLVED
    third = changed(train__lr=0.3, train__epochs=5)
    open_run(RunConfig(dir="mine"), True, third, ["train"])  # a whole group
    assert yaml.safe_load((path / "config.2.yaml").read_text()) == other


@pytest.mark.parametrize(
    ("allowed", "resume", "message"),
    [
        (["train.epochs"], True, r"train\.lr \(was 0\.1, is 0\.2\).*--allow-changed train\.lr$"),
        (["train.lr2"], True, r"--allow-changed train\.lr2: there is no such field; allowed: train\.lr"),
        (["train.lr"], False, "--allow-changed means nothing without --resume"),
    ],
)
def test_other_fields_may_not(allowed, resume, message):
    opened()
    with pytest.raises(ValueError, match=message):
        open_run(RunConfig(dir="mine"), resume, changed(train__lr=0.2), allowed)
    assert not Path("mine", "config.1.yaml").exists()


def test_a_stage_has_begun_where_a_whole_checkpoint_is():
    path = opened()  # its only checkpoint has no manifest
    assert stages_begun(RunConfig(dir="mine"), RESOLVED) == set()
    made_whole(path)
    assert stages_begun(RunConfig(dir="mine"), RESOLVED) == {"student"}


def test_the_stages_that_have_begun_are_those_of_the_run_that_is_resumed():
    made_whole(opened(), age=2)
    opened("mine-2", age=1)
    assert resume().name == "mine-2" and stages_begun(RunConfig(dir="mine"), RESOLVED) == set()
    other = changed(train__lr=0.2)
    made_whole(opened("mine-3", config=other))
    assert stages_begun(RunConfig(dir="mine"), RESOLVED) == set()
    assert stages_begun(RunConfig(dir="mine"), other) == {"student"}
    assert stages_begun(RunConfig(dir="mine"), RESOLVED, ["train.lr"]) == {"student"}  # which it then resumes


def made_whole(path, age=0):
    """Its checkpoint gets a manifest."""
    manifest = {"files": {}, "sha256": hashlib.sha256(b'{"files": {}}').hexdigest()}
    checkpoint = path / "checkpoints" / "student" / "epoch_0001"
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    os.utime(checkpoint, (1e9 - age, 1e9 - age))
