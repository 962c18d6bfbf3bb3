"""Data is prepared by one process at a time, and the others wait where they can."""

import errno
import os
import time

import pytest

from distill.data import locks
from distill.data.locks import alone_in


def test_a_process_waits_for_another_one_in_the_same_folder(tmp_path, caplog):
    caplog.set_level("INFO")
    begun, done = tmp_path / "begun", tmp_path / "done"
    if (child := os.fork()) == 0:
        with alone_in(tmp_path / "data"):
            begun.touch()
            time.sleep(0.3)
            done.touch()
            os._exit(0)  # as one that is killed: nobody else takes its lock away
    while not begun.exists():
        time.sleep(0.01)
    with alone_in(tmp_path / "other"):
        assert not done.exists()
    with alone_in(tmp_path / "data"):
        assert done.exists()
    assert os.waitpid(child, 0) == (child, 0)
    assert caplog.messages == [f"waiting for another process that is preparing data in {tmp_path / 'data'}"]


def test_a_file_system_without_locks_is_named_and_nobody_waits(tmp_path, caplog, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "lockf", no_locks)
    with alone_in(tmp_path):
        pass
    assert f"{tmp_path} cannot be locked (No locks available): let one machine alone prepare" in caplog.text


def test_a_folder_that_cannot_be_written_needs_no_lock(tmp_path):
    (tmp_path / "file").touch()
    with alone_in(tmp_path / "file" / "data"):
        pass
    with pytest.raises(ZeroDivisionError), alone_in(tmp_path):  # errors of the work get out
        raise ZeroDivisionError
