"""One process at a time where data is downloaded or prepared, also of several machines that share a file system."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

LOCK = ".spikeswap.lock"


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process is in here with the same folder; look again then, the work may have been done.

    The system frees the lock of a process that is gone, so that none has to be removed by hand; NFS passes such locks
    (fcntl's, not flock's) on to other machines. A file system without locks is named in a warning, and nobody waits.
    """
    lock = None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / LOCK, os.O_WRONLY | os.O_CREAT, 0o666)
        except OSError as error:  # where nothing can be written by this process the work itself says so
            if (folder / LOCK).exists():
                _warn(folder, error)
        if lock is not None and fcntl is not None:
            _wait_for(lock, folder)
        yield
    finally:
        if lock is not None:
            os.close(lock)  # and with it what is locked


def _wait_for(lock: int, folder: Path) -> None:
    try:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            log.info("waiting for another process that is preparing data in %s", folder)
            fcntl.lockf(lock, fcntl.LOCK_EX)
    except OSError as error:
        _warn(folder, error)


def _warn(folder: Path, error: OSError) -> None:
    log.warning(
        "warning: %s cannot be locked (%s): let one machine alone prepare the data, and start the others then",
        folder,
        error.strerror,
    )
