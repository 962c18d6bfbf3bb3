"""SIGTERM reaches the run wherever it is sent, and the run alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image
from toy_runs import forget_accelerate

from distill import cli
from distill.data import DataConfig, Preprocessing, load_data, train_loader
from distill.interruption import INTERRUPTION, Preempted

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("--student.width", "8", "--ann.input_size", "[1, 8, 8]", "--student.timesteps", "2", "--eval_timesteps", "[]"),
    *("--data.max_train_samples", "64", "--data.max_eval_samples", "30", "--train.batch_size", "16"),
    *("--run.threads", "1", "--run.trackers", "[]", "--run.compile", "false", "--run.dir", "run"),
]


def test_a_loader_process_works_on_when_the_whole_job_is_asked_to_stop(tmp_path):
    for i in range(4):
        for split in ("train", "val"):
            folder = tmp_path / split / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4, 3), 10 * i, dtype=np.uint8)).save(folder / f"{i}.png")
    pre = Preprocessing(input_size=(3, 4, 4), mean=(0.0,) * 3, std=(1.0,) * 3)
    data = load_data(DataConfig(name="folder", root=str(tmp_path), in_memory=False), pre)
    batches = iter(train_loader(data.train, 1, seed=0, workers=1))
    next(batches)
    (process,) = batches._workers
    os.kill(process.pid, signal.SIGTERM)
    assert len(list(batches)) == 3 and process.is_alive()


def test_all_processes_leave_where_one_was_asked():
    forget_accelerate()
    accelerator = Accelerator(cpu=True)
    with INTERRUPTION.listening():
        INTERRUPTION.leave_if_asked(accelerator, "a test")
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted, match="75") as raised, INTERRUPTION.listening():
            INTERRUPTION.leave_if_asked(accelerator, "a test")
    assert raised.value.message == "asked to stop (SIGTERM) in a test"
    with INTERRUPTION.listening():  # another run's affair
        INTERRUPTION.leave_if_asked(accelerator, "a test")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_main_process_says_where_it_is_asked_to_that_it_was_stopped(tmp_path, monkeypatch, capsys, rank):
    def main():
        raise Preempted("asked to stop (SIGTERM) in a test")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("SPIKESWAP_STOPPED", str(tmp_path / "note"))
    with pytest.raises(Preempted):
        cli.run(main)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["asked to stop (SIGTERM) in a test\n"] * (rank == "0")


def test_a_note_that_cannot_be_left_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SPIKESWAP_STOPPED", str(tmp_path / "nowhere" / "note"))
    Preempted("asked to stop").tell()
    assert "nowhere/note cannot be written (No such file or directory): start the run again by hand" in caplog.text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent has ended")
def test_a_run_does_not_outlive_its_launcher(tmp_path):
    """`accelerate launch` of one process passes no signal on."""
    launcher = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "scripts" / "train_snn.py"), *TINY,
         "--train.epochs", "10000"],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists():
            break
        time.sleep(0.1)
    launcher.terminate()
    _, said = launcher.communicate(timeout=60)  # to the end of all that write to it: the run's, too
    assert "asked to stop (SIGTERM)" in said and "continue with --resume" in said
    assert not (tmp_path / "run" / "summary.json").exists()
