"""SIGTERM, by which a cluster takes a machine back: the run saves a checkpoint within the step and ends."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator

from distill.processes import Agreement

log = logging.getLogger(__name__)

LAUNCHERS = ("accelerate", "accelerate-launch", "accelerate.commands.launch")

EXIT_PREEMPTED = 75
"""The exit status of a run that was asked to stop and can be resumed (EX_TEMPFAIL: try again later)."""

STOPPED = "SPIKESWAP_STOPPED"
"""Environment variable with the path of a file in which a run that was asked to stop says so: its exit status does not
get past launchers."""


class Preempted(SystemExit):
    """Ends the run with EXIT_PREEMPTED, after everything that is to be kept was written."""

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_PREEMPTED)
        self.message = message

    def tell(self) -> None:
        """Leaves the message for whoever would start the run again, where he has asked for it; on the main process."""
        if path := os.environ.get(STOPPED):
            try:
                Path(path).write_text(f"{self.message}\n")
            except OSError as error:
                log.warning("warning: %s cannot be written (%s): start the run again by hand", path, error.strerror)


class Interruption:
    """Whether this process was asked to stop. All its parts look at it where they can leave off."""

    def __init__(self) -> None:
        self.asked = False
        self._listening = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes SIGTERM as a request while it is open; afterwards the signal means what it meant before.

        Of several, one in the other, the outermost counts: what came between two trainings is not forgotten.
        """
        # Python allows handlers in the main thread alone
        if self._listening or threading.current_thread() is not threading.main_thread():
            yield
            return
        self.asked, self._listening = False, True
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            self._listening = False

    def leave_if_asked(self, accelerator: Accelerator, where: str) -> None:
        """Ends the run if any of its processes was asked to; all of them call it, at the same place.

        Args:
            where: what is left off, for the message.

        Raises:
            Preempted: on all processes alike.
        """
        if any(Agreement(accelerator).any_of(self.asked)):
            raise Preempted(f"asked to stop (SIGTERM) in {where}")

    def _ask(self, *_: object) -> None:
        self.asked = True


INTERRUPTION = Interruption()
"""This process's: a run has one from its first line to its last."""


def follow_launcher() -> None:
    """Has the system send SIGTERM when the launcher of this process ends.

    `accelerate launch` of a single process waits for it and hands no signal on: the run would outlive its launcher, and
    one that is started again with --resume would write beside it. Linux only; a shell that ends is nobody's launcher.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return
    if not any(Path(os.fsdecode(word)).name in LAUNCHERS for word in words[:3]):
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the system knew
        os.kill(os.getpid(), signal.SIGTERM)
