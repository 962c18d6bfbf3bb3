"""A loader process that is killed in the middle of a run: one line says so, and the run can be resumed."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from PIL import Image
from toy_runs import TEACHER, metrics_of, start

from distill import DataConfig, RunConfig, TeacherConfig, TrainConfig, cli, loop
from distill.config import TeacherTrainingConfig
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
