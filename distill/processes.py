"""What the processes of a run tell each other besides gradients: small numbers and errors, over the CPU.

A group of its own (gloo) carries them, so that nobody waits for a GPU to know whether to stop.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from accelerate import Accelerator

if TYPE_CHECKING:  # a build of PyTorch without processes has no such name
    from torch.distributed import ProcessGroup

Result = TypeVar("Result")

PATIENCE = timedelta(hours=2)
"""How long processes wait for each other: while one of them downloads, unpacks or prepares data. NCCL's own ten minutes
would end the run meanwhile; a process that ends by itself is noticed by its launcher, and not by this."""

_groups: WeakKeyDictionary[ProcessGroup, Any] = WeakKeyDictionary()
"""One for each group of all processes, made once: each holds sockets until the end."""


class Agreement:
    """Lets all processes take the same decision in the same step. The first of a run is made on all at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._several = accelerator.num_processes > 1
        gloo = not self._several or dist.get_backend() == "gloo"
        self._group: Any = None if gloo else _gloo_group()
        """None for the processes' usual one."""

    def any_of(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it is set on any process."""
        if not self._several:
            return list(flags)
        told = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(told, dist.ReduceOp.MAX, self._group)
        return [bool(flag) for flag in told.tolist()]

    def smallest(self, number: int) -> int:
        """The smallest of all processes' numbers."""
        if not self._several:
            return number
        told = torch.tensor(number)
        dist.all_reduce(told, dist.ReduceOp.MIN, self._group)
        return int(told)

    def gather(self, value: object) -> list:
        """Every process's value, in the order of their ranks."""
        if not self._several:
            return [value]
        values: list = [None] * self.accelerator.num_processes
        dist.all_gather_object(values, value, self._group)  # between processes of this run, which trust each other
        return values

    def first_error(self, error: BaseException | None) -> str | None:
        """What went wrong on the first process that hands in an error; waits for all."""
        if not any(self.any_of(error is not None)):
            return None
        text = None if error is None else f"{type(error).__name__}: {error}"
        return next(text for text in self.gather(text) if text is not None)

    def together(self, work: Callable[[], Result]) -> Result:
        """What `work` gives on this process, where it succeeds on all; waits for all.

        `work` may use this, too. A process that fails outside of it there meets the others, which are still in it; what
        all know then is not exchanged again.

        Raises:
            Exception: this process's own error.
            RuntimeError: where another process alone fails; says how.
        """
        error: Exception | None = None
        try:
            result = work()
        except Exception as found:
            if vars(found).get(_KNOWN):
                raise
            error = found
        text = self.first_error(error)
        if error is None and text is not None:
            error = RuntimeError(f"on another process: {text}")
        if error is not None:
            vars(error)[_KNOWN] = True
            raise error
        return result


_KNOWN = "_known_to_all_processes"
"""An attribute of errors that all processes have been told of."""


def _gloo_group() -> Any:
    world = dist.group.WORLD
    assert world is not None, "several processes have a group"
    if world not in _groups:
        _groups[world] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _groups[world]


def cpus_of_a_process(processes: int = 1) -> int:
    """How many CPUs each process of this machine has: those that this one may use, shared by the launcher's.

    Args:
        processes: how many share them where the launcher does not say.
    """
    # as torch counts them before it warns of too many workers; Linux only
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", processes)))


def first_to_fail() -> bool:
    """Whether no process of this run has called this before: each calls it once, with an error that ends it.

    Of a mistake that all processes find, or of errors that follow from the one of another process, people want the
    first. Before the processes know of each other the first of each machine speaks.
    """
    if not dist.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("spikeswap/failures", 1) == 1
    except RuntimeError:  # the process that kept the count is gone
        return True
