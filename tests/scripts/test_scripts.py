"""The scripts as a user starts them: in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import models

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("--teacher.kwargs", "{channels: [8, 8, 8, 8]}", "--teacher.input_size", "[1, 8, 8]"),
    *("--data.max_train_samples", "128", "--data.max_eval_samples", "50", "--train.epochs", "1"),
    *("--run.threads", "1", "--run.trackers", "[]", "--run.compile", "false"),
]
DISTIL = [*TINY, "--teacher_train.epochs", "1", "--teacher.min_top1", "0", "--student.timesteps", "2"]


def call(folder, script, *arguments, launcher=()):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "SPIKESWAP_"))}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "80", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, str(ROOT / "scripts" / script), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def succeed(*args, **kwargs):
    done = call(*args, **kwargs)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def read(path):
    return json.loads(path.read_text())


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    done = succeed(folder, "train_teacher.py", *TINY, "--run.name", "mine")
    return folder / "runs" / "mine", done


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled")
    done = succeed(folder, "distill.py", *DISTIL)
    assert [path.name for path in folder.iterdir()] == ["runs"]
    return folder / "runs" / "digits", done  # what the default recipe says


def test_distillation_runs_from_nothing_to_a_student(distilled):
    run, done = distilled
    summary = read(run / "summary.json")
    assert list(summary["hybrid_top1"]) == ["layer1", "layer2", "layer3"]
    assert list(summary["student_top1_by_timesteps"]) == ["1", "2", "4"]
    assert "top-1 (%)" in done.stderr and "everything is in runs/digits" in done.stderr
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["max_train_samples"] == 128 and config["train"]["batch_size"] == 64  # line, then recipe
    assert [line["stage"] for line in metrics(run)] == ["teacher", "student"]
    snn = models.load_snn(run / "student")
    assert snn(torch.zeros(2, 1, 8, 8)).shape == (2, 10) and snn.timesteps == 2
    assert "Warning" not in done.stderr and done.stdout == ""


def test_a_teacher_of_its_own_script_teaches(teacher_run, tmp_path):
    run, done = teacher_run
    assert "teacher top-1" in done.stderr
    weights = run / "teacher"
    assert (weights / "model.safetensors").is_file() and (run / "summary.json").is_file()
    succeed(tmp_path, "distill.py", *DISTIL, "--teacher.weights", str(weights), "--run.dir", "here")
    assert read(tmp_path / "here" / "summary.json")["teacher_top1"] == read(run / "summary.json")["teacher_top1"]
    assert not (tmp_path / "here" / "teacher").exists() and not (tmp_path / "runs").exists()


def test_a_network_learns_from_labels_alone(tmp_path):
    arguments = [
        *("--ann.input_size", "[1, 8, 8]", "--student.width", "8", "--student.timesteps", "2"),
        *("--student.algorithm", "sltt", *TINY[4:], "--eval_timesteps", "[]"),
    ]
    done = succeed(tmp_path, "train_snn.py", *arguments)
    run = tmp_path / "runs" / "digits_snn"  # what the default recipe says
    assert [line["stage"] for line in metrics(run)] == ["student"] and "Warning" not in done.stderr
    assert list(read(run / "summary.json")["student_top1_by_timesteps"]) == ["2"]
    assert "top-1 (%)" in done.stderr and "everything is in runs/digits_snn" in done.stderr and done.stdout == ""
    snn = models.load_snn(run / "student")
    assert snn.algorithm == "sltt" and snn.spec["width"] == 8 and snn(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    "script",
    ["distill.py", *(pytest.param(name, marks=pytest.mark.slow) for name in ("train_teacher.py", "train_snn.py"))],
)
def test_help_is_shown(script, tmp_path):
    done = succeed(tmp_path, script, "--help")
    assert "--train.lr" in done.stdout and "--resume" in done.stdout and done.stderr == ""


RESNET = "teacher: {name: resnet18, input_size: [1, 8, 8], kwargs: {channels: [8, 8, 8, 8]}, cifar_stem: true}\n"


def no_mean(folder):
    (folder / "recipe.yaml").write_text(RESNET)
    return ["--config", "recipe.yaml"]


def other_weights(folder):
    save_file({"conv1.weight": torch.zeros(1)}, folder / "other.safetensors")
    return ["--teacher.weights", "other.safetensors"]


MISTAKES = {
    "unknown key": (lambda folder: ["--train.epoch", "3"], ["train.epoch", "train.epochs"]),
    "bad value": (lambda folder: ["--train.epochs", "0"], ["train.epochs", "at least 1", "0"]),
    "wrong data path": (
        lambda folder: ["--data.name", "folder", "--data.root", "nowhere"],
        ["nowhere", "train/", "train.tar"],
    ),
    "missing weights": (lambda folder: ["--teacher.weights", "none.safetensors"], ["no weights at none.safetensors"]),
    "mismatched weights": (other_weights, ["other.safetensors does not fit ResNet", "missing keys"]),
    "missing mean and std": (no_mean, ["teacher.mean", "teacher.std"]),
}


ELSEWHERE = ("bad value", "missing weights", "missing mean and std")
"""Mistakes that tests of the configuration and of teachers make in their own process, in a hundredth of the time."""


@pytest.mark.parametrize(
    "mistake", [pytest.param(name, marks=pytest.mark.slow) if name in ELSEWHERE else name for name in MISTAKES]
)
def test_a_mistake_gives_one_clear_line_and_status_2(mistake, tmp_path):
    arguments, texts = MISTAKES[mistake]
    done = call(tmp_path, "distill.py", *arguments(tmp_path), "--run.trackers", "[]", "--run.threads", "1")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("distill.py: error: ")]
    assert errors == done.stderr.splitlines()[-1:] and list(tmp_path.glob("*/*")) == []  # no folder is left behind
    for text in texts:
        assert text in errors[0]


def test_two_processes_on_the_cpu_write_one_run(tmp_path):
    # accelerate launch --cpu starts several processes with MPI only; torchrun sets the same environment
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    arguments = [
        *(*DISTIL, "--train.batch_size", "8", "--teacher_train.batch_size", "16", "--run.dir", "run"),
        # some parameters have no part in a step, of which DDP has to know
        *("--schedule.name", "stochastic", "--train.accumulate", "2"),
    ]
    done = succeed(tmp_path, "distill.py", *arguments, launcher=launcher)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    # 128 images, 16 on each of two processes: four optimizer steps an epoch
    found = [(line["stage"], line["epoch"], line["steps"]) for line in metrics(tmp_path / "run")]
    assert found == [("teacher", 1, 4), ("student", 1, 4)]
    summary = read(tmp_path / "run" / "summary.json")
    assert list(summary["hybrid_top1"]) == ["layer1", "layer2", "layer3"] and summary["schedule"] == "stochastic"
    for accuracy in (summary["teacher_top1"], summary["student_top1"], *summary["hybrid_top1"].values()):
        assert accuracy * 50 / 100 == pytest.approx(round(accuracy * 50 / 100))  # each of the 50 images counts once
    assert done.stderr.count("top-1 (%)") == 1
    assert models.load_snn(tmp_path / "run" / "student").timesteps == 2
    again = call(tmp_path, "distill.py", *arguments, "--resume", "--train.lr", "0.5", launcher=launcher)
    assert again.returncode != 0 and "train.lr (was 0.05, is 0.5)" in again.stderr


@pytest.mark.slow  # in the suite: one process and two with the same images, test_processes.py
@pytest.mark.parametrize("schedule", ["stochastic", "progressive"])
def test_two_processes_train_in_every_schedule(teacher_run, schedule, tmp_path):
    # where some parameters have no part in a step, or in a stage, DDP has to know of it
    run, _ = teacher_run
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    arguments = [
        *(*TINY, "--student.timesteps", "2", "--teacher.weights", str(run / "teacher"), "--run.dir", "run"),
        *("--schedule.name", schedule, "--train.epochs", "4", "--train.batch_size", "8", "--train.accumulate", "2"),
        *("--data.max_train_samples", "64", "--eval_timesteps", "[]", "--teacher.min_top1", "0"),
    ]
    succeed(tmp_path, "distill.py", *arguments, launcher=launcher)
    stages = [line["stage"] for line in metrics(tmp_path / "run")]
    several = ["stage1_layer1", "stage2_layer2", "stage3_layer3", "student"]
    assert stages == (several if schedule == "progressive" else ["student"] * 4)
    summary = read(tmp_path / "run" / "summary.json")
    assert list(summary["hybrid_top1"]) == ["layer1", "layer2", "layer3"] and summary["schedule"] == schedule
    assert sorted(path.name for path in (tmp_path / "run" / "hybrids").iterdir()) == ["layer1", "layer2", "layer3"]
    succeed(tmp_path, "distill.py", *arguments, "--resume", launcher=launcher)
    again = read(tmp_path / "run" / "summary.json")
    assert again["hybrid_top1"] == summary["hybrid_top1"] and again["student_top1"] == summary["student_top1"]


def test_what_a_run_leaves_can_be_evaluated(distilled, tmp_path):
    run, _ = distilled
    summary = read(run / "summary.json")
    data = ("--data.max_train_samples", "128", "--data.max_eval_samples", "50", "--threads", "1")
    options = ("--model", str(run / "hybrids" / "layer2"), "--timesteps", "[1]", "--out", "out.json")
    done = succeed(tmp_path, "evaluate.py", *options, *data)
    found, expected = read(tmp_path / "out.json")["top1_by_timesteps"], summary["hybrid_top1"]["layer2"]
    assert found["2"] == pytest.approx(expected, abs=2.01)  # rounding may flip a spike
    assert "top-1 (%)" in done.stderr and "Warning" not in done.stderr
    wrong = call(tmp_path, "evaluate.py", "--model", str(run))
    assert wrong.returncode == 2 and "holds no saved network" in wrong.stderr and "Traceback" not in wrong.stderr
    missing = call(tmp_path, "evaluate.py")
    assert missing.returncode == 2 and "model" in missing.stderr and "Traceback" not in missing.stderr


@pytest.mark.slow  # in the suite: a killed run ends like a whole one, test_killed_runs.py
def test_a_killed_run_goes_on_where_it_was(tmp_path):
    arguments = [*DISTIL, "--train.epochs", "40", "--run.dir", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "distill.py"), *arguments]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "run" / "checkpoints" / "student"
    while process.poll() is None and not list(checkpoints.glob("epoch_0003")):
        try:
            process.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    process.wait()
    assert not (tmp_path / "run" / "summary.json").exists()  # it was killed on its way
    done = succeed(tmp_path, "distill.py", *arguments, "--resume")
    assert "resuming the run in run" in done.stderr
    assert [line["epoch"] for line in metrics(tmp_path / "run")] == [1, *range(1, 41)]
    assert (tmp_path / "run" / "summary.json").exists()
