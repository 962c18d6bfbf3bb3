"""SIGTERM, by which a cluster takes a machine back: the run saves a checkpoint within the step and ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

EXIT_PREEMPTED = 75
"""The exit status of a run that was asked to stop and can be resumed (EX_TEMPFAIL: try again later)."""


class Preempted(SystemExit):
    """Ends the run with EXIT_PREEMPTED, after everything that is to be kept was written."""

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_PREEMPTED)
        self.message = message


class Interruption:
    """Whether this process was asked to stop. All its parts look at it where they can leave off."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes SIGTERM as a request while it is open; afterwards the signal means what it meant before."""
        if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
            yield
            return
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask(self, *_: object) -> None:
        self.asked = True
