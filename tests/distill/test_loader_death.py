"""Loader processes that are killed in the middle of a run, or are there when it fails: in both cases it ends."""

import atexit
import importlib
import multiprocessing.util
import os
import signal
import sys
import time
import traceback

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from toy_runs import TEACHER, metrics_of, start

from distill import DataConfig, RunConfig, TeacherConfig, TrainConfig, cli, loop
from distill.config import TeacherTrainingConfig
from distill.data import loaders
from distill.teacher_training import run


def test_a_killed_loader_process_ends_the_run_with_one_line_and_it_goes_on(tmp_path, monkeypatch, capsys):
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(6):
                pixels = torch.randint(0, 256, (8, 8), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(tmp_path / split / label / f"{number}.png")
    config = TeacherTrainingConfig(
        run=RunConfig(dir=str(tmp_path / "r"), trackers=[], compile=False, threads=1, save_every="1 steps"),
        data=DataConfig(name="folder", root=str(tmp_path), in_memory=False, workers=1),
        teacher=TeacherConfig(**TEACHER),
        train=TrainConfig(epochs=2, batch_size=4, lr=0.05),
    )
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # waited for at the end
    step, killed = loop._Fit._pass, []
    others = {process.pid for process in multiprocessing.active_children()}  # of other tests

    def kill(fit, *args):
        step(fit, *args)
        if fit.progress.batches == 2 and not killed:
            killed.extend({process.pid for process in multiprocessing.active_children()} - others)
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
            time.sleep(60)  # the signal of its death ends this: torch raises wherever the main process is

    monkeypatch.setattr(loop._Fit, "_pass", kill)
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: run(config, start(config), False))
    assert ended.value.code == 2 and len(killed) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert f"a process that loads images died (pid {killed[0]}), most likely because" in line and "data.workers" in line
    run(config, start(config, True), True)
    assert [entry["epoch"] for entry in metrics_of(tmp_path / "r")] == [1, 2]


def test_daemons_that_end_by_themselves_are_left_alone_at_the_end():
    assert not loaders._ignores_sigterm(os.getpid()) and not loaders._ignores_sigterm(None)
    kept = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert loaders._ignores_sigterm(os.getpid())
    finally:
        signal.signal(signal.SIGTERM, kept)


def test_a_run_that_fails_ends_though_its_traceback_holds_loader_processes(tmp_path):
    def main():
        init = loaders._stay_until_told
        batches = iter(DataLoader(list(range(64)), 4, num_workers=2, persistent_workers=True, worker_init_fn=init))
        next(batches)
        raise RuntimeError("CUDA out of memory, as it were")

    said = tmp_path / "said.txt"
    if (child := os.fork()) == 0:  # Python's end of a program, without the seconds in which one imports torch
        try:
            sys.stderr = said.open("w", buffering=1)
            sys.unraisablehook = sys.__unraisablehook__  # no more pytest's
            multiprocessing.process._children.clear()  # loaders of other tests: not its own to end, or to wait for
            atexit._clear()
            atexit.register(multiprocessing.util._exit_function)
            atexit.register(time.sleep, 0.1)  # torch's hooks are in between, when the signal of their death comes
            importlib.reload(loaders)
            cli.run(main)
        except RuntimeError as error:
            sys.last_exc = error  # as Python keeps it
            traceback.print_exc()
            atexit._run_exitfuncs()
        finally:
            os._exit(1)
    for _ in range(200):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    text = said.read_text()
    assert ended, f"it waits for its loaders: {text}"
    assert os.waitstatus_to_exitcode(status) == 1
    assert text.startswith("Traceback") and text.endswith("RuntimeError: CUDA out of memory, as it were\n")
