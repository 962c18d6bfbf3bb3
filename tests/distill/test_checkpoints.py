"""Checkpoints: whole or not there, the damaged recognised, the newest and the best kept."""

import errno
import hashlib
import json
import logging
import os
from pathlib import Path

import pytest

from distill.checkpoints import UNFINISHED, CheckpointError, Checkpoints, damage_of


def alone(error):
    """What `everywhere` does for one process."""
    if error is not None:
        raise CheckpointError(f"{type(error).__name__}: {error}")


def save(checkpoints, epochs, batches=0, write=None, score=None, is_main=True, **options):
    def state(path):
        (path / "state").write_text(f"{epochs}/{batches}")

    options = {"aside": UNFINISHED, "needed": [], **options}
    checkpoints.save(epochs, batches, write or state, alone, is_main, {"score": score}, **options)


def names(checkpoints):
    return sorted(path.name for path in checkpoints.path.iterdir())


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "student")


def test_the_newest_is_found_by_what_is_done(checkpoints):
    assert checkpoints.newest() is None
    for epochs, batches in ((9, 0), (9, 100), (10, 0), (10, 5)):
        save(checkpoints, epochs, batches)
    found = checkpoints.newest()
    assert (found.epochs, found.batches, (found.path / "state").read_text()) == (10, 5, "10/5")
    assert names(checkpoints) == ["epoch_0010", "epoch_0010_batch_00000005"]
    assert checkpoints.newest(epoch_ends=True).path.name == "epoch_0010"


def test_the_manifest_holds_the_checksum_of_each_file(checkpoints):
    def write(path):
        (path / "deep").mkdir()
        (path / "deep" / "state").write_bytes(b"abc")

    save(checkpoints, 1, write=write, score=2.5)
    manifest = json.loads((checkpoints.newest().path / "manifest.json").read_text())
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4, appendix B.1
    text = '{"files": {"deep/state": "' + abc + '"}, "score": 2.5}'  # sorted, as the manifest's own checksum is taken
    assert manifest == json.loads(text) | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def other_manifest(path, **changes):
    found = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(found | changes))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: (path / "state").write_text("1/1"), "another checksum"),
        (lambda path: os.truncate(path / "state", 1), "another checksum"),
        (lambda path: (path / "state").unlink(), "state is missing"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda path: os.truncate(path / "manifest.json", 20), "manifest.json cannot be read"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda path: other_manifest(path, files=[]), "manifest.json has another checksum"),
        (lambda path: other_manifest(path, files={}), "manifest.json has another checksum"),
        (lambda path: other_manifest(path, score=9.0), "manifest.json has another checksum"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_is_used(checkpoints, caplog, harm, words):
    save(checkpoints, 1)
    save(checkpoints, 2)
    newest = checkpoints.newest().path
    harm(newest)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest().epochs == 1
    assert str(newest) in caplog.text and words in caplog.text and words in damage_of(newest)
    checkpoints.drop_newer(checkpoints.newest(say=False))
    assert names(checkpoints) == ["epoch_0001", "epoch_0002"]
    save(checkpoints, 1, batches=5)  # of steps that are made again
    assert names(checkpoints) == ["epoch_0001", "epoch_0001_batch_00000005"]
    save(checkpoints, 2)
    assert names(checkpoints) == ["epoch_0001_batch_00000005", "epoch_0002"]


def test_where_all_are_damaged_there_is_none(checkpoints):
    save(checkpoints, 1)
    (checkpoints.newest().path / "state").write_text("?")
    assert checkpoints.newest(say=False) is None
    checkpoints.drop_newer(None)
    save(checkpoints, 0, batches=1)
    assert names(checkpoints) == ["epoch_0000_batch_00000001"]


def test_an_unfinished_one_is_never_found_and_is_no_obstacle(checkpoints):
    def crash(path):
        (path / "state").write_text("half")
        raise KeyboardInterrupt

    save(checkpoints, 1)
    with pytest.raises(KeyboardInterrupt):
        save(checkpoints, 2, write=crash, aside="unfinished_a")
    assert names(checkpoints) == ["epoch_0001", "unfinished_a"] and checkpoints.newest().epochs == 1
    save(checkpoints, 2, aside="unfinished_b")
    assert checkpoints.newest().epochs == 2 and names(checkpoints) == ["epoch_0001", "epoch_0002"]


def test_one_that_lacks_a_file_of_some_process_is_none(checkpoints):
    save(checkpoints, 1, needed=["state"])
    with pytest.raises(CheckpointError, match=r"theirs is missing in .*: all machines must see the same run\.dir"):
        save(checkpoints, 2, needed=["state", "theirs"])
    assert names(checkpoints) == ["epoch_0001"] and checkpoints.newest().epochs == 1


def test_files_that_a_list_of_the_folder_does_not_show_yet_are_in_the_manifest(checkpoints, monkeypatch):
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: [])  # a network disk's, as old as the folder
    save(checkpoints, 1, needed=["state"])
    assert list(json.loads((checkpoints.path / "epoch_0001" / "manifest.json").read_text())["files"]) == ["state"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed")])
def test_a_full_disk_leaves_the_older_ones(checkpoints, error):
    def full(path):
        (path / "state").write_text("half")
        raise error

    save(checkpoints, 1)
    with pytest.raises(CheckpointError, match=r"No space left|write failed"):
        save(checkpoints, 2, write=full)
    assert names(checkpoints) == ["epoch_0001"] and checkpoints.newest().epochs == 1


def test_an_error_of_another_process_is_this_ones_too(checkpoints):
    def everywhere(error):
        raise CheckpointError("of rank 1")

    save(checkpoints, 1)
    with pytest.raises(CheckpointError, match="of rank 1"):
        checkpoints.save(2, 0, lambda path: None, everywhere, True, {}, UNFINISHED, [])
    assert names(checkpoints) == ["epoch_0001"]


def test_older_ones_go_only_after_the_newer_is_whole(checkpoints, monkeypatch):
    save(checkpoints, 1)
    save(checkpoints, 2)

    def crash(path, **_):
        if "epoch" in Path(path).name:
            raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        save(checkpoints, 3)
    assert names(checkpoints) == ["epoch_0001", "epoch_0002", "epoch_0003"] and checkpoints.newest().epochs == 3


def test_the_best_is_kept_besides(tmp_path):
    checkpoints = Checkpoints(tmp_path / "student", keep=1)
    for epochs, score in enumerate([1.0, 3.0, 2.0, None, 3.0, 0.0], 1):
        save(checkpoints, epochs, score=score)
        save(checkpoints, epochs, batches=7)
    # of equal scores the newest; the newest end of an epoch, where one goes on whose batches are others
    assert names(checkpoints) == ["epoch_0005", "epoch_0006", "epoch_0006_batch_00000007"]
    assert checkpoints.newest(epoch_ends=True).epochs == 6


def test_a_process_that_is_not_the_main_one_only_writes_its_own(tmp_path):
    checkpoints = Checkpoints(tmp_path / "student")
    calls = []
    save(checkpoints, 1, write=lambda path: calls.append(path), is_main=False)
    assert calls == [tmp_path / "student" / "unfinished"] and not checkpoints.path.exists()


def test_names_that_only_look_alike_are_none(checkpoints):
    for name in ("epoch_x", "epoch_1_batch_", "epoch_0001.bak"):
        (checkpoints.path / name).mkdir(parents=True)
    assert checkpoints.newest(say=False) is None
    checkpoints.drop_newer(None)
    save(checkpoints, 1)
    assert len(names(checkpoints)) == 4
