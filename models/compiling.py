"""Whether the fused passes are compiled by `torch.compile` or run as written, which is said once in the log."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

log = logging.getLogger(__name__)

_compiling = False


def compile_kernels(enabled: bool) -> None:
    """Chooses whether the fused passes are compiled (a few seconds for each kind of layer) or run as written.

    Compiled passes are several times as fast and give the same numbers to rounding.
    """
    global _compiling
    _compiling = enabled


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Runs kernels as written: for a probe, compiling costs more than it saves."""
    global _compiling
    kept, _compiling = _compiling, False
    try:
        yield
    finally:
        _compiling = kept


def is_compiling() -> bool:
    """Whether the fused passes are compiled now."""
    return _compiling


def compilable(kernel: Callable, *, inlined: bool = False) -> Callable:
    """A pass that is compiled at its first call, where compiling is on.

    Args:
        inlined: what the compiler would keep in memory, because it is used often, it computes anew where it is used,
            in the same loop but once. How long it takes to compile doubles with each value that is used twice by the
            next.
    """
    compiled = None

    @functools.wraps(kernel)
    def call(*args: Any) -> Any:
        nonlocal compiled
        if not _compiling:
            return kernel(*args)
        try:
            # one for each combination of steps, terms and types: the default of 8 is soon used up. The setting belongs
            # to a thread, and backward passes on a GPU run in one of their own
            if torch._dynamo.config.recompile_limit < 128:
                torch._dynamo.config.recompile_limit = 128
            if compiled is None:
                compiled = torch.compile(kernel, dynamic=True, options=_inlining() if inlined else None)
            return compiled(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # dynamo and inductor raise what their many backends raise
            result = kernel(
                *args
            )  # what is wrong with the numbers themselves is raised here, and is not the compiler's
            compile_kernels(False)
            log.warning(
                "fused passes run uncompiled, several times slower: torch.compile failed (%s)", first_line(error)
            )
            return result

    return call


def _inlining() -> dict[str, Any]:
    """Options of the compiler that move the sizes at which it writes a value to memory out of reach."""
    import torch._inductor.config as settings

    names = ("realize_reads_threshold", "realize_opcount_threshold", "realize_acc_reads_threshold")
    return {name: 10**6 for name in names if hasattr(settings, name)}


def first_line(error: BaseException) -> str:
    """An error's type and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
