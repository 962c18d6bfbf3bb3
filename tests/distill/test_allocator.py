"""How a process gets memory for large tensors."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill import allocator, cli

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LIBRARY, VERSION = platform.libc_ver()
GLIBC = pytest.mark.skipif(LIBRARY != "glibc", reason="another C library")
OLD = LIBRARY == "glibc" and tuple(map(int, VERSION.split(".")[:2])) < (2, 35)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    for name in (allocator.LARGE_PAGES, "GLIBC_TUNABLES", *allocator.OF_THE_USER):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone, too
        monkeypatch.delenv(name)


def faults(program, **said):
    """How often Linux gives the process a page while `program` runs as a script does, after its imports."""
    text = f"""
import resource
from distill import cli, distillation, session
from distill.config import DistillConfig
import torch

def main():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    {program}
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

cli.run(main)
"""
    environment = {**os.environ, **said}
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=environment, check=True)
    return int(done.stdout)


@pytest.mark.parametrize("said", [None, "0"])
def test_large_tensors_are_asked_to_be_in_large_pages_unless_the_user_says_otherwise(said, monkeypatch):
    if said is not None:
        monkeypatch.setenv(allocator.LARGE_PAGES, said)
    seen = []
    cli.run(lambda: seen.append(os.environ[allocator.LARGE_PAGES]))
    assert seen == [said or "1"]


@pytest.mark.skipif(not PAGES.exists() or "[never]" in PAGES.read_text(), reason="the system has no large pages")
def test_nothing_that_the_scripts_import_comes_before_the_large_pages():
    found = faults("torch.empty(2**26, dtype=torch.uint8).fill_(1)")
    assert found < 2**26 / 4096 / 2  # a fault for each small page would be twice as many


@GLIBC
@pytest.mark.skipif(OLD, reason="glibc before 2.35 keeps no block of this size")
@pytest.mark.skipif(PAGES.exists() and "[always]" in PAGES.read_text(), reason="all pages are large")
def test_a_large_block_is_kept_for_the_next_step_unless_the_user_says_otherwise():
    program = "for _ in range(8): torch.empty(2**26, dtype=torch.uint8).fill_(1)"
    small_pages = {allocator.LARGE_PAGES: "0"}
    pages = 2**26 / 4096
    assert faults(program, **small_pages) < 3 * pages
    assert faults(program, **small_pages, MALLOC_TRIM_THRESHOLD_="131072") > 7 * pages


@GLIBC
@pytest.mark.parametrize(
    ("name", "value"),
    [
        (None, ""),
        *((name, "1") for name in allocator.OF_THE_USER),
        ("GLIBC_TUNABLES", ""),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1"),
        ("MALLOC_ARENA_MAX", "1"),
        ("GLIBC_TUNABLES", "glibc.cpu.x86_ibt=on"),
    ],
)
def test_glibc_is_left_alone_where_the_user_has_set_how_it_gives_memory_back(name, value, monkeypatch):
    calls = []
    library = SimpleNamespace(mallopt=lambda *arguments: calls.append(arguments) or 1)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: library)
    if name is not None:
        monkeypatch.setenv(name, value)
    asked = name in (None, "MALLOC_ARENA_MAX") or "cpu" in value
    assert allocator.keep_memory() == asked and calls == [(-3, 2**30), (-1, 2**31 - 1)] * asked


@GLIBC
def test_an_older_glibc_that_refuses_is_said_to_keep_nothing(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *arguments: 0))
    assert not allocator.keep_memory()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    assert not allocator.keep_memory() and os.environ[allocator.LARGE_PAGES] == "1"
