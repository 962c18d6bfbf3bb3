"""What happens where passes are compiled, and where they cannot be."""

import logging

import pytest
import torch

from models import compile_kernels
from models.compiling import _inlining, compilable, is_compiling


@pytest.fixture(autouse=True)
def _uncompiled_again():
    yield
    compile_kernels(False)


def test_the_compiler_knows_the_settings_that_make_one_loop():
    settings = _inlining()
    assert len(settings) == 3
    torch.compile(lambda x: x, options=settings)  # refuses what it does not know


def test_without_a_compiler_the_passes_run_as_written_and_say_so_once(monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("no working C++ compiler\nfound anywhere")

    monkeypatch.setattr(torch, "compile", fail)
    double = compilable(lambda x: 2 * x)
    compile_kernels(True)
    with caplog.at_level(logging.WARNING):
        assert double(3) == 6 and double(4) == 8
    (record,) = caplog.records
    assert "RuntimeError: no working C++ compiler)" in record.getMessage()


def test_an_error_of_the_pass_itself_is_not_swallowed():
    def broken(x):
        raise KeyError(x)

    for enabled in (False, True):
        compile_kernels(enabled)
        with pytest.raises(KeyError):
            compilable(broken)("missing")


def test_a_full_memory_is_not_blamed_on_the_compiler(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: full)
    compile_kernels(True)
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        compilable(torch.neg)(torch.ones(2))


def test_what_is_wrong_with_the_numbers_leaves_the_compiler_on(monkeypatch):
    def broken(x):
        raise RuntimeError("not enough memory: you tried to allocate 1 byte")

    monkeypatch.setattr(torch, "compile", lambda kernel, **kwargs: kernel)
    compile_kernels(True)
    with pytest.raises(RuntimeError, match="not enough memory"):
        compilable(broken)(1)
    assert is_compiling()
