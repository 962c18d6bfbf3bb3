"""How a process gets memory for large tensors on a CPU: in large pages, and kept once it has it.

Imports nothing of the project and no PyTorch, so that it comes before the first tensor wherever it is called from.
"""

from __future__ import annotations

import ctypes
import os
import platform

LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Has PyTorch ask Linux for pages of 2 MB for large tensors: with small ones a CPU spends a tenth of a training step on
them. PyTorch reads it when it allocates its first tensor."""
OF_THE_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")
"""What says how glibc is to give memory back; so does GLIBC_TUNABLES, where it is empty or speaks of `glibc.malloc`."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's numbers of its settings (malloc.h)."""
_LARGEST, _KEPT = 2**30, 2**31 - 1
"""Bytes: the largest block that is kept, and how many may be free at the heap's end."""


def keep_memory() -> bool:
    """Asks for large pages, and has glibc keep freed blocks of up to a gigabyte for the next step.

    As it comes, it gives each block of more than 32 MiB back at once, and Linux fills it with zeros when the next step
    asks for it again: of many time steps a layer's spikes are such blocks, and a training step takes a fifth longer.
    Forked processes (of loaders) inherit it. Where another allocator is preloaded nobody asks glibc for memory.

    Returns:
        whether glibc keeps them: not where the user has said how, not before glibc 2.35, which refuses so large a
        block, and not with another C library.
    """
    os.environ.setdefault(LARGE_PAGES, "1")
    tunables = os.environ.get("GLIBC_TUNABLES")
    said = any(name in os.environ for name in OF_THE_USER) or tunables == "" or "glibc.malloc" in (tunables or "")
    if said or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))
